"""Copies lists of pieces with the GPU's copy engines, which leave the SMs alone.

Bytes moved: each once over the bus. One call takes many pieces (cudaMemcpyBatchAsync), at most `MAX_BATCH`, because
drivers have been seen to hang on lists of 50,000 (vLLM, https://github.com/vllm-project/vllm/issues/49276). Long stretches
of equal pieces at equal distances become one 2-D copy each. Where batches do not exist (before CUDA 12.8), the rest is
copied piece by piece.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.driver import LEGACY_STREAMS, AccessOrder, CudaDriver, CudaError
from dynamo.kernels.pieces import Pieces
from dynamo.kernels.runs import Runs

__all__ = ["MAX_BATCH", "copy_pieces", "copy_runs"]

Int64s = npt.NDArray[np.int64]

MAX_BATCH = 4096
MIN_ROWS_BESIDE_BATCH = 256  # a 2-D copy costs about 2 µs to submit, a piece of a batch a hundredth of that
MIN_ROWS_WITHOUT_BATCH = 3
WINDOW = MAX_BATCH
"""Pieces looked at together. All temporary arrays stay small: fresh large ones cost more in page faults than the work."""
JOINS_WORTH_A_COPY = 64  # one join in so many pieces
MAX_PITCH = (1 << 31) - 1


def copy_pieces(pieces: Pieces, driver: CudaDriver, stream: int, *, stable_source: bool = False) -> None:
    """Queues all pieces on `stream`, as one step of it: pieces may run in any order among themselves. Never waits.

    >>> import numpy as np
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> from dynamo.kernels.pieces import Pieces
    >>> driver = FakeDriver()
    >>> host, gpu = driver.pinned_buffer_new(4096), driver.device_buffer_new(4096, 0)
    >>> at = np.array([0, 512, 1024])
    >>> pieces = Pieces.of(src=host.data_ptr() + at, dst=gpu.data_ptr() + at[::-1], sizes=[256, 256, 256])
    >>> copy_pieces(pieces, driver, driver.stream_new(0))
    >>> driver.count("memcpy_batch_async")
    1

    Args:
        pieces: addresses that are valid on this GPU; host memory is pinned. Destinations do not overlap.
        driver: the CUDA driver.
        stream: handle of a stream that is not the legacy default stream. Must not be capturing a graph.
        stable_source: nothing queued or running still writes the sources, which lie in pinned host memory; lets the
            engine read ahead of the stream. A race for copies from the GPU.

    Raises:
        KernelArgumentError: the table is malformed, or the stream is the legacy default stream; nothing was queued.
        CudaError: a call failed; pieces before it are queued.
    """
    pieces.check()
    windows = (pieces.part(slice(start, start + WINDOW)) for start in range(0, pieces.num_pieces, WINDOW))
    _copy_windows(windows, driver, stream, stable_source)


def copy_runs(runs: Runs, driver: CudaDriver, stream: int, *, stable_source: bool = False) -> None:
    """Queues all pieces of `runs` as `copy_pieces` does, writing them down as it goes.

    >>> import numpy as np
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> from dynamo.kernels.layouts import from_paged
    >>> from dynamo.kernels.runs import find_runs
    >>> driver = FakeDriver()
    >>> host, gpu = (from_paged(buffer.view(8, 512), "BD") for buffer in (
    ...     driver.pinned_buffer_new(4096), driver.device_buffer_new(4096, 0)))
    >>> copy_runs(find_runs(host, np.array([5, 1]), gpu, np.array([2, 7])), driver, driver.stream_new(0))
    >>> driver.count("memcpy_batch_async")
    1

    Args:
        runs: of views on this GPU or in pinned host memory.
        driver: the CUDA driver.
        stream: handle of a stream that is not the legacy default stream. Must not be capturing a graph.
        stable_source: see `copy_pieces`.

    Raises:
        KernelArgumentError: the stream is the legacy default stream; nothing was queued.
        CudaError: a call failed; pieces before it are queued.
    """
    _copy_windows(runs.parts(WINDOW), driver, stream, stable_source)


def _copy_windows(windows: Iterator[Pieces], driver: CudaDriver, stream: int, stable_source: bool) -> None:
    if stream in LEGACY_STREAMS:
        raise KernelArgumentError("batched copies refuse the legacy default stream; pass a stream of your own")
    order = AccessOrder.ANY if stable_source else AccessOrder.STREAM
    borders = driver.registration_borders()
    has_batches = True
    for part in windows:
        if borders.size:
            part = replace(part, storages=np.union1d(part.storages, borders))
        part = part.merged(part.num_pieces // JOINS_WORTH_A_COPY)
        if borders.size:
            part = part.split_at(borders, "src").split_at(borders, "dst")
        has_batches = has_batches and _copy_batches(part, driver, stream, order)
        if not has_batches:
            _copy_singly(part, driver, stream)


def _copy_batches(pieces: Pieces, driver: CudaDriver, stream: int, order: AccessOrder) -> bool:
    """Queues all pieces, most of them in batches; or none, and returns False, where batches are not supported."""
    stretches = _stretches(pieces, MIN_ROWS_BESIDE_BATCH)
    rest = pieces if stretches is None else _without(pieces, *stretches)
    dst, src, sizes = rest.dst, rest.src, rest.sizes
    for start in range(0, rest.num_pieces, MAX_BATCH):
        batch = slice(start, start + MAX_BATCH)
        try:
            driver.memcpy_batch_async(dst[batch], src[batch], sizes[batch], order, stream)
        except CudaError as error:
            if start or not error.is_unsupported:
                raise
            return False
    if stretches is not None:
        _copy_stretches(pieces, *stretches, driver, stream)
    return True


def _copy_singly(pieces: Pieces, driver: CudaDriver, stream: int) -> None:
    stretches = _stretches(pieces, MIN_ROWS_WITHOUT_BATCH)
    rest = pieces
    if stretches is not None:
        _copy_stretches(pieces, *stretches, driver, stream)
        rest = _without(pieces, *stretches)
    for src, dst, size in rest.table.T.tolist():
        driver.memcpy_async(dst, src, size, stream)


def _copy_stretches(pieces: Pieces, starts: Int64s, lengths: Int64s, driver: CudaDriver, stream: int) -> None:
    """Queues each stretch as one 2-D copy."""
    for first, rows in zip(starts.tolist(), lengths.tolist(), strict=True):
        (src, next_src), (dst, next_dst), (width, _) = pieces.table[:, first : first + 2].tolist()
        driver.memcpy_2d_async(dst, next_dst - dst, src, next_src - src, width, rows, stream)


def _without(pieces: Pieces, starts: Int64s, lengths: Int64s) -> Pieces:
    """The pieces that no stretch holds."""
    is_left = np.ones(pieces.num_pieces, dtype=np.bool_)
    for first, rows in zip(starts.tolist(), lengths.tolist(), strict=True):
        is_left[first : first + rows] = False
    return pieces.part(is_left)


def _stretches(pieces: Pieces, min_rows: int) -> tuple[Int64s, Int64s] | None:
    """First piece and number of pieces of each stretch that one 2-D copy can take, or None; no piece is in two."""
    if pieces.num_pieces < min_rows:
        return None
    steps = pieces.table[:2, 1:] - pieces.table[:2, :-1]
    sizes = pieces.sizes
    same = (steps[0, 1:] == steps[0, :-1]) & (steps[1, 1:] == steps[1, :-1])  # [i]: pieces i, i + 1, i + 2 are even
    same &= (sizes[2:] == sizes[1:-1]) & (sizes[1:-1] == sizes[:-2])
    window = max(1, (min_rows - 2) // 2)  # a stretch covers at least one whole window, wherever it begins
    if not same[: same.size // window * window].reshape(-1, window).all(axis=1).any():
        return None
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
    starts, lengths = edges[0::2], edges[1::2] - edges[0::2] + 2
    shared = np.zeros(starts.size, dtype=np.int64)  # a stretch may end with the piece the next one begins with
    shared[1:] = starts[1:] < starts[:-1] + lengths[:-1]
    starts, lengths = starts + shared, lengths - shared
    pitches = steps[:, starts]
    fits = (pitches >= sizes[starts]).all(axis=0) & (pitches <= MAX_PITCH).all(axis=0) & (lengths >= min_rows)
    for column in pieces.table[:2] if pieces.storages.size > 1 else ():
        first, last = column[starts], column[starts + lengths - 1]
        fits &= np.searchsorted(pieces.storages, first, "right") == np.searchsorted(pieces.storages, last, "right")
    return (starts[fits], lengths[fits]) if fits.any() else None
