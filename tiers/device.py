"""G1: the blocks attention works on, in GPU memory or, without a GPU, in ordinary memory."""

import time
from collections.abc import Sequence
from threading import Lock, local

import numpy as np
import torch

from dynamo.kernels.checks import Rows, SlotIds, check_ids, check_rows
from dynamo.kernels.copy import copy_rows, shared_runs
from dynamo.tiers.arena import map_rows
from dynamo.tiers.errors import TierClosedError, TierConfigError, TierMemoryError
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.memory import check_available
from dynamo.tiers.slot_digests import Digests, digest_slots
from dynamo.tiers.stats import TierRecorder, TierStats
from dynamo.tiers.tier import Outcomes

__all__ = ["DeviceTier", "Fence"]

_MIN_RUN = 4  # rows: where runs of consecutive ones are shorter on average, one copy by number is faster


Fence = torch.cuda.Event
"""A point in a CUDA stream that a later copy waits for; made by `DeviceTier.fences`."""


class DeviceTier:
    """Slots on one device, one contiguous run each, with a view per layer for attention.

    Owns the storage. On CUDA, copies run on a side stream of the calling thread, so they do not wait for the model's
    kernels unless a fence asks them to, and have finished when the call returns.
    """

    name = "device"

    def __init__(self, layout: BlockLayout, dtype: torch.dtype, num_slots: int, device: str | torch.device) -> None:
        """Allocates zeroed storage.

        Args:
            layout: sizes of a block; `layout.itemsize` must be the size of `dtype`.
            dtype: element type of the layer views.
            num_slots: blocks, at least 1.
            device: "cpu", "cuda" or "cuda:N".

        Raises:
            TierConfigError: num_slots, dtype or device is unusable.
            TierMemoryError: the device has too little memory.
        """
        self.layout = layout
        self.num_slots = num_slots
        self.device = torch.device(device)
        if num_slots < 1:
            raise TierConfigError(f"the device tier needs at least 1 block, got {num_slots}")
        if dtype.itemsize != layout.itemsize:
            raise TierConfigError(f"{dtype} takes {dtype.itemsize} bytes, the layout says {layout.itemsize}")
        self._dtype = dtype
        self._recorder = TierRecorder(layout.block_bytes)
        self._streams = local()
        self._fences: dict[int, Fence] = {}  # the last of each stream, by the stream's handle
        self._fences_lock = Lock()
        self._closed = False
        self._rows: Rows | None = None
        if self.device.type == "cpu":
            # Mapping alone takes no memory: too much of it would end the process when the blocks are written.
            check_available(num_slots * layout.slot_bytes, "the device tier")
            self._rows = map_rows(layout, num_slots)
            self._storage = torch.from_numpy(self._rows)
        elif self.device.type == "cuda":
            self._storage = self._allocate_cuda()
        else:
            raise TierConfigError(f"device {str(self.device)!r} is not supported; use cpu or cuda")

    def _allocate_cuda(self) -> torch.Tensor:
        num_bytes = self.num_slots * self.layout.slot_bytes
        if not torch.cuda.is_available():
            raise TierConfigError(f"device {str(self.device)!r} was asked for, but CUDA is not available; use cpu")
        try:
            storage = torch.zeros((self.num_slots, self.layout.slot_bytes), dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            free_bytes, _ = torch.cuda.mem_get_info(self.device)
            raise TierMemoryError(
                f"the device tier needs {num_bytes / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB of {self.device} are free; "
                "make it smaller or free memory there",
                needed_bytes=num_bytes,
                available_bytes=free_bytes,
            ) from error
        torch.cuda.synchronize(self.device)  # side streams must not copy before the zeros are there
        return storage

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer over all slots, sharing the tier's storage.

        Args:
            index: layer in [0, num_layers).

        Returns:
            Two strided tensors [num_slots, block_size, num_kv_heads, head_dim] (NHD) on the tier's device. The stride
            between slots is that of a whole block. They stay valid memory after `close()`.

        Raises:
            TierConfigError: no such layer.
            TierClosedError: the tier is closed.
        """
        layout = self.layout
        if not 0 <= index < layout.num_layers:
            raise TierConfigError(f"layer {index} does not exist; the layout has {layout.num_layers}")
        elements = self._open_storage().view(-1).view(self._dtype)
        shape = (self.num_slots, layout.block_size, layout.num_kv_heads, layout.head_dim)
        strides = (
            layout.slot_bytes // layout.itemsize,
            layout.num_kv_heads * layout.head_dim,
            layout.head_dim,
            1,
        )
        plane = layout.plane_bytes // layout.itemsize
        key = torch.as_strided(elements, shape, strides, 2 * index * plane)
        value = torch.as_strided(elements, shape, strides, (2 * index + 1) * plane)
        return key, value

    def fences(self) -> list[Fence]:
        """Marks the work queued so far on the calling thread's current stream, and returns the last mark of every stream.

        Sequences may be used from several threads and streams: whoever copies a slot waits for all of them, as blocks
        are shared. Empty on the CPU, which is in order.
        """
        if self.device.type != "cuda":
            return []
        with torch.cuda.device(self.device), self._fences_lock:
            stream = torch.cuda.current_stream(self.device)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            self._fences[stream.cuda_stream] = event
            return list(self._fences.values())

    def join(self) -> None:
        """Makes the calling thread's current stream wait, on the device, for the last mark of every other stream."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for fence in self.fences():
                stream.wait_event(fence)

    def read(self, slots: SlotIds, rows: Rows, row_ids: SlotIds, after: Sequence[Fence] = ()) -> Outcomes:
        """Copies slots to host rows; see `Tier.read`. On CUDA, first waits (on the device) for all of `after`."""
        return self._move(slots, rows, row_ids, after, to_device=False)

    def write(self, slots: SlotIds, rows: Rows, row_ids: SlotIds, after: Sequence[Fence] = ()) -> Outcomes:
        """Copies host rows to slots; see `Tier.write`. On CUDA, first waits (on the device) for all of `after`.

        Pass the fence of the last work that used the slots' former content.
        """
        return self._move(slots, rows, row_ids, after, to_device=True)

    def read_layers(
        self, slots: SlotIds, rows: Rows, row_ids: SlotIds, layers: range, after: Sequence[Fence] = ()
    ) -> None:
        """Copies some layers, consecutive ones, of slots to the same places in host rows; else as `read`."""
        self._move_layers(slots, rows, row_ids, layers, after, to_device=False)

    def write_layers(
        self, slots: SlotIds, rows: Rows, row_ids: SlotIds, layers: range, after: Sequence[Fence] = ()
    ) -> None:
        """Copies some layers, consecutive ones, of host rows to the same places in slots; else as `write`."""
        self._move_layers(slots, rows, row_ids, layers, after, to_device=True)

    @property
    def storage(self) -> torch.Tensor:
        """All slots, uint8 [num_slots, slot_bytes], contiguous; for I/O straight to and from device memory.

        Raises:
            TierClosedError: the tier is closed.
        """
        return self._open_storage()

    def new_like(self, num_slots: int) -> "DeviceTier":
        """Another tier with slots of the same sizes on the same device. The caller owns it.

        Raises:
            TierMemoryError: the device has too little memory.
        """
        return DeviceTier(self.layout, self._dtype, num_slots, self.device)

    def copy_from(
        self, slots: SlotIds, source: "DeviceTier", source_slots: SlotIds, after: Sequence[Fence] = ()
    ) -> Outcomes:
        """Copies slots of another tier on the same device to slots of this one; else as `write`, and counted as that."""
        storage, origin = self._open_storage(), source.storage
        check_ids(slots, "slots", self.num_slots)
        check_ids(source_slots, "source_slots", source.num_slots, slots.size)
        started = time.perf_counter()
        if slots.size == 0:
            pass
        elif self._rows is None or source._rows is None:
            self._move_cuda(storage, slots, origin, source_slots, after, to_device=True)
        else:
            copy_rows(source._rows, source_slots, self._rows, slots)
        self._recorder.add_write(slots.size, 0, time.perf_counter() - started)
        return np.ones(slots.size, dtype=np.bool_)

    def digest(self, slots: SlotIds, seeds: Digests) -> Digests:
        """Digests of kind LINES of slots, uint64 [n], made on the device. Blocks until done.

        Args:
            seeds: uint64 [n].

        Raises:
            KernelArgumentError: ids or seeds do not fit.
        """
        storage = self._open_storage()
        check_ids(slots, "slots", self.num_slots)
        if slots.size == 0:
            return np.empty(0, dtype=np.uint64)
        digests: Digests
        if self.device.type == "cpu":
            digests = digest_slots(storage, slots, seeds, self.layout.block_bytes).numpy()
        else:
            with torch.cuda.stream(self._side_stream()):
                digests = digest_slots(storage, slots, seeds, self.layout.block_bytes).cpu().numpy()
        return digests

    def stats(self) -> TierStats:
        """Counters; `path` is "memory" on the CPU and "cuda" on a GPU."""
        return self._recorder.snapshot(
            self.name, self.num_slots, "memory" if self.device.type == "cpu" else self.device.type
        )

    def close(self) -> None:
        """Forgets the storage; it is freed when the last layer view is gone. Idempotent."""
        self._closed = True
        self._storage = torch.empty(0, dtype=torch.uint8)
        self._rows = None

    def _open_storage(self) -> torch.Tensor:
        storage = self._storage
        if self._closed:
            raise TierClosedError("the device tier is closed")
        return storage

    def _move(
        self, slots: SlotIds, rows: Rows, row_ids: SlotIds, after: Sequence[Fence], *, to_device: bool
    ) -> Outcomes:
        storage, own_rows = self._open_storage(), self._rows
        self._check(slots, rows, row_ids, to_device)
        started = time.perf_counter()
        if slots.size == 0:
            pass
        elif own_rows is None:
            self._move_cuda(storage, slots, torch.from_numpy(rows), row_ids, after, to_device)
        elif to_device:
            copy_rows(rows, row_ids, own_rows, slots)
        else:
            copy_rows(own_rows, slots, rows, row_ids)
        count = self._recorder.add_write if to_device else self._recorder.add_read
        count(slots.size, 0, time.perf_counter() - started)
        return np.ones(slots.size, dtype=np.bool_)

    def _move_layers(
        self,
        slots: SlotIds,
        rows: Rows,
        row_ids: SlotIds,
        layers: range,
        after: Sequence[Fence],
        *,
        to_device: bool,
    ) -> None:
        layout = self.layout
        storage, own_rows = self._open_storage(), self._rows
        self._check(slots, rows, row_ids, to_device)
        if not 0 <= layers.start <= layers.stop <= layout.num_layers or layers.step != 1:
            raise TierConfigError(f"{layers} are no consecutive layers; the layout has {layout.num_layers}")
        if slots.size == 0 or not layers:
            return
        # K and V of a layer follow one another in a block, and so do the layers.
        first, end = (2 * layer * layout.plane_bytes for layer in (layers.start, layers.stop))
        if own_rows is None:
            columns = torch.from_numpy(rows)[:, first:end]
            self._move_cuda(storage[:, first:end], slots, columns, row_ids, after, to_device)
        elif to_device:
            _copy_columns(rows[:, first:end], row_ids, own_rows[:, first:end], slots)
        else:
            _copy_columns(own_rows[:, first:end], slots, rows[:, first:end], row_ids)

    def _check(self, slots: SlotIds, rows: Rows, row_ids: SlotIds, to_device: bool) -> None:
        check_rows(rows, "rows", self.layout.slot_bytes, writable=not to_device)
        check_ids(slots, "slots", self.num_slots)
        check_ids(row_ids, "row_ids", rows.shape[0], slots.size)

    def _move_cuda(
        self,
        storage: torch.Tensor,
        slots: SlotIds,
        rows: torch.Tensor,
        row_ids: SlotIds,
        after: Sequence[Fence],
        to_device: bool,
    ) -> None:
        """Copies between rows of two tensors, both [num_rows, width] with as wide rows."""
        borders = shared_runs(slots, row_ids)
        starts = borders[:-1]
        lengths = np.diff(borders).tolist()
        stream = self._side_stream()
        with torch.cuda.stream(stream):
            for fence in after:
                stream.wait_event(fence)
            try:
                for s, r, n in zip(slots[starts].tolist(), row_ids[starts].tolist(), lengths, strict=True):
                    if to_device:
                        storage[s : s + n].copy_(rows[r : r + n], non_blocking=True)
                    else:
                        rows[r : r + n].copy_(storage[s : s + n], non_blocking=True)
            finally:  # whatever was queued must have ended before slots and rows are given back
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(stream)
                done.synchronize()

    def _side_stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._streams, "stream", None)
        if stream is None:
            stream = torch.cuda.Stream(device=self.device)  # type: ignore[no-untyped-call]
            self._streams.stream = stream
        return stream


def _copy_columns(src: Rows, src_ids: SlotIds, dst: Rows, dst_ids: SlotIds) -> None:
    """`dst[dst_ids[i]] = src[src_ids[i]]` for rows that are parts of wider ones."""
    void = f"V{src.shape[1]}"
    src_voids, dst_voids = src.view(void)[:, 0], dst.view(void)[:, 0]
    borders = shared_runs(src_ids, dst_ids)
    starts = borders[:-1]
    if len(starts) * _MIN_RUN > len(src_ids):
        dst_voids[dst_ids] = src_voids[src_ids]
        return
    lengths = np.diff(borders).tolist()
    for s, d, n in zip(src_ids[starts].tolist(), dst_ids[starts].tolist(), lengths, strict=True):
        dst_voids[d : d + n] = src_voids[s : s + n]
