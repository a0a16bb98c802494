"""Registering an arena with CUDA, exactly its resident rows and no byte more, in segments that can be let go of."""

import contextlib
import logging

import torch

from dynamo.kernels.checks import Rows

__all__ = ["SEGMENT_BYTES", "PinnedRows"]

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 1 << 30
"""Length of a registration where rows may be given back again: smaller ones make copies meet more seams."""

_REGISTER_PORTABLE_MAPPED = 0x1 | 0x2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class PinnedRows:
    """The registrations of one arena's rows; none where there is no CUDA device or it refused. Not thread-safe.

    CUDA copies across the seam of two registrations as long as every byte is registered
    (https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html, cuMemcpyAsync); it refuses a copy that is
    registered in part. So either all resident rows are pinned or none is.
    """

    def __init__(self, rows: Rows) -> None:
        """Registers nothing yet; `rows` are those of the whole arena."""
        self._rows = rows
        self._segments: list[tuple[int, int]] = []
        self._runtime = torch.cuda.cudart() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]

    @property
    def is_pinned(self) -> bool:
        """Whether the resident rows are registered."""
        return bool(self._segments)

    def add(self, ranges: list[tuple[int, int]], *, can_shrink: bool) -> bool:
        """Registers more rows. The first time a refusal is logged and the arena stays pageable for good.

        Args:
            ranges: [start, stop) rows, resident.
            can_shrink: cut them into segments, so that `release` can give parts back.

        Returns:
            False if CUDA refuses and earlier rows are pinned; nothing was registered then.
        """
        if self._runtime is None:
            return True
        per_segment = max(1, SEGMENT_BYTES // self._rows.shape[1]) if can_shrink else self._rows.shape[0]
        added: list[tuple[int, int]] = []
        for first, last in _joined(ranges):
            for start in range(first, last, per_segment):
                stop = min(start + per_segment, last)
                if code := self._register(start, stop):
                    for segment in added:
                        self._unregister(segment)
                    return self._refuse(code, sum(b - a for a, b in ranges) * self._rows.shape[1])
                added.append((start, stop))
        self._segments += added
        return True

    def release(self, start_row: int, stop_row: int) -> int:
        """Lets go of the segments that lie within rows [start_row, stop_row), from the end on.

        A segment that begins before `start_row` stays as it is: its other rows may be being copied right now.

        Returns:
            The row from which on nothing is registered up to `stop_row`.
        """
        gone = [segment for segment in self._segments if start_row <= segment[0] and segment[1] <= stop_row]
        if gone:
            torch.cuda.synchronize()
        for segment in gone:
            self._unregister(segment)
            self._segments.remove(segment)
        return max((stop for start, stop in self._segments if start < start_row < stop), default=start_row)

    def close(self) -> None:
        """Lets go of all. Idempotent."""
        if self._segments:
            torch.cuda.synchronize()
        while self._segments:
            self._unregister(self._segments.pop())

    def _register(self, start: int, stop: int) -> int:
        assert self._runtime is not None
        part = self._rows[start:stop]
        return int(self._runtime.cudaHostRegister(part.ctypes.data, part.nbytes, _REGISTER_PORTABLE_MAPPED))

    def _unregister(self, segment: tuple[int, int]) -> None:
        assert self._runtime is not None
        code = int(self._runtime.cudaHostUnregister(self._rows[segment[0] :].ctypes.data))
        if code != 0:
            logger.warning("the host tier's memory could not be unpinned (CUDA error %d)", code)

    def _refuse(self, code: int, num_bytes: int) -> bool:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # the failed registration fails the next kernel launch: let it be this one
        if self._segments:
            return False
        self._runtime = None
        logger.warning(
            "the host tier's %d bytes could not be pinned (CUDA error %d): copies to the GPU are slower; "
            "check `ulimit -l` and free memory",
            num_bytes,
            code,
        )
        return True


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges as one, empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif stop > start:
            joined.append((start, stop))
    return joined
