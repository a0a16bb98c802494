"""Offload and onboard through GPU memory: a kernel packs many small pieces into a buffer, one DMA carries the buffer.

Bytes moved: each once over the bus, and once more read and written in GPU memory. The buffer holds the blocks in the order
in which the host side holds them, so that what is contiguous there is one piece of the DMA. Two buffers alternate:

    offload   stream       pack 0   pack 1            pack 2 (waits for DMA 0)
              copy stream           DMA 0    DMA 1            DMA 2
    onboard   copy stream  DMA 0    DMA 1    DMA 2 (waits for unpack 0)
              stream                unpack 0 unpack 1 unpack 2

Packing runs on the caller's stream, DMA on the staging's own. The idea of packing before the DMA is SGLang's staged
write-back (https://github.com/sgl-project/sglang/pull/21631).
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.checks import KernelArgumentError, SlotIds, check_distinct
from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.copy_engine import copy_runs
from dynamo.kernels.copy_plan import CopyPlan, plan_copy, storage_starts
from dynamo.kernels.driver import LEGACY_STREAMS, CudaDriver, wait_for_event
from dynamo.kernels.pairing import cut_views, match_views
from dynamo.kernels.runs import ascending_pairs, runs_of
from dynamo.kernels.view import View

__all__ = ["Staging", "packed_like"]

NUM_BUFFERS = 2
MIN_CHUNK_BYTES = 2 << 20  # below this, a DMA no longer reaches the bus's full speed
MIN_CHUNKS = 4  # of a transfer, so that packing and DMA overlap in most of it


class Chunk(NamedTuple):
    """Blocks that go through a buffer together."""

    layers: tuple[int, int]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """One half of the staging memory and its two events."""

    memory: torch.Tensor
    filled: int
    emptied: int


def packed_like(view: View, memory: torch.Tensor, num_blocks: int) -> View:
    """A view of the first bytes of `memory` as `num_blocks` blocks without gaps, axes in the order `view` has them.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> pool = from_paged([torch.zeros(8, 2, 16, 4, 32) for _ in range(3)], "BPTHD")
    >>> packed = packed_like(pool.slice_heads(0, 1), torch.empty(1 << 20, dtype=torch.uint8), num_blocks=5)
    >>> packed.num_blocks, packed.token_stride, packed.num_blocks * packed.block_bytes
    (5, 128, 61440)

    Raises:
        KernelArgumentError: `memory` is not bytes, or too small.
    """
    num_bytes = num_blocks * view.block_bytes
    if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous() or memory.numel() < num_bytes:
        raise KernelArgumentError(
            f"{num_blocks} packed blocks need {num_bytes} contiguous bytes, got {memory.dtype} {tuple(memory.shape)}"
        )
    shape = (view.head_groups, view.layers_per_group, view.num_planes)
    base, offsets = view.base.reshape(shape), view.block_offsets
    steps = [_mean_step(base[1:] - base[:-1]) for base in (base, base.swapaxes(0, 1), base.swapaxes(0, 2))]
    block_step = float(np.ptp(offsets)) / max(1, offsets.size - 1) if offsets.size else 0.0
    counts = [*shape, num_blocks, view.num_tokens, view.num_heads]
    widths = [*steps, block_step, float(view.token_stride), float(view.head_stride)]
    strides, end = [0] * len(counts), view.row_bytes
    for axis in sorted(range(len(counts)), key=lambda axis: (widths[axis] if counts[axis] > 1 else 0.0, -axis)):
        strides[axis] = end
        end *= counts[axis]
    parts = [np.arange(count, dtype=np.int64) * stride for count, stride in zip(counts, strides, strict=True)]
    start = memory.data_ptr()
    rows = (start + parts[0][:, None, None] + parts[1][:, None] + parts[2]).reshape(view.base.shape)
    limits = np.array([start, start + memory.numel()], dtype=np.int64)
    return replace(
        view,
        tensors=(memory,),
        base=rows,
        block_offsets=parts[3],
        token_stride=strides[4],
        head_stride=strides[5],
        limits=np.broadcast_to(limits, (*rows.shape, 2)),
    )


class Staging:
    """Two buffers in GPU memory, a stream for DMA, and the events that keep them apart. Thread-safe.

    Owns its memory until `close`; at most `num_bytes` of GPU memory are ever used, whatever is transferred.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> from dynamo.kernels.layouts import from_paged, stored
    >>> driver = FakeDriver(deferred=True)
    >>> pool, slots = driver.device_buffer_new(8 * 4096, 0), driver.pinned_buffer_new(8 * 4096)
    >>> src = from_paged(pool.view(2, 8, 4, 8, 64), "PBTHD")
    >>> dst = stored(slots.view(8, 4096), num_layers=1, num_tokens=4, num_heads=8, row_bytes=64)
    >>> with Staging(driver, num_bytes=16384) as staging:
    ...     staging.offload(src, np.array([3, 1, 6]), dst, np.array([0, 1, 2]), driver.stream_new(0))
    >>> bool((pool.view(2, 8, 2048)[0, 3] == slots[:2048]).all())
    True
    """

    def __init__(
        self, driver: CudaDriver, *, device: int = 0, num_bytes: int = 128 << 20, close_timeout_s: float = 60.0
    ) -> None:
        """Allocates GPU memory, a stream and events.

        Args:
            driver: the CUDA driver; must outlive this.
            device: index of the GPU.
            num_bytes: of GPU memory; each of the two buffers has half.
            close_timeout_s: how long `close` waits for DMA that is under way.

        Raises:
            KernelArgumentError: `num_bytes` is less than two bytes.
            CudaError: the GPU refuses.
        """
        self.buffer_bytes = num_bytes // NUM_BUFFERS
        if self.buffer_bytes < 1:
            raise KernelArgumentError(f"staging of {num_bytes} bytes holds nothing; give it tens of MiB")
        self.device = device
        self._driver = driver
        self._close_timeout_s = close_timeout_s
        self._lock = threading.Lock()
        self._stream = driver.stream_new(device)
        self._started = driver.event_new(device)
        self._buffers: tuple[Buffer, ...] = tuple(
            Buffer(
                driver.device_buffer_new(self.buffer_bytes, device), driver.event_new(device), driver.event_new(device)
            )
            for _ in range(NUM_BUFFERS)
        )
        self._turn = 0
        self._closed = False

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def can_hold(self, view: View) -> bool:
        """Whether at least one layer of a block of `view` fits into a buffer."""
        return view.block_bytes // view.layers_per_group <= self.buffer_bytes

    def offload(
        self,
        src: View,
        src_ids: SlotIds,
        dst: View,
        dst_ids: SlotIds,
        stream: int,
        *,
        sm_budget: int | None = None,
    ) -> None:
        """Queues a copy from GPU memory to pinned host memory as one step of `stream`: later work there comes after it.

        Args:
            src: view in GPU memory.
            src_ids: int64 [n].
            dst: view in pinned host memory, of the same layers, planes and heads.
            dst_ids: int64 [m], distinct.
            stream: handle of a stream that is not the legacy default stream.
            sm_budget: SMs that packing may use at a time.

        Raises:
            KernelArgumentError: views, ids or stream do not fit; nothing was queued.
            CudaError: a call failed; chunks before it are queued.
        """
        self._transfer(src, src_ids, dst, dst_ids, stream, sm_budget, to_host=True, stable_source=False)

    def onboard(
        self,
        src: View,
        src_ids: SlotIds,
        dst: View,
        dst_ids: SlotIds,
        stream: int,
        *,
        sm_budget: int | None = None,
        stable_source: bool = False,
    ) -> None:
        """Queues a copy from pinned host memory to GPU memory; the mirror of `offload`, and like it otherwise.

        Args:
            src: view in pinned host memory.
            src_ids: int64 [n].
            dst: view in GPU memory.
            dst_ids: int64 [m], distinct.
            stream: handle of a stream that is not the legacy default stream.
            sm_budget: SMs that unpacking may use at a time.
            stable_source: see `copy_pieces`.
        """
        self._transfer(src, src_ids, dst, dst_ids, stream, sm_budget, to_host=False, stable_source=stable_source)

    def close(self) -> None:
        """Waits until no DMA uses the buffers, and gives everything back. Idempotent.

        Raises:
            TimeoutError: DMA is still under way; the buffers are kept, so that nothing else is overwritten.
        """
        with self._lock:
            if self._closed:
                return
            for buffer in self._buffers:
                if not wait_for_event(self._driver, buffer.emptied, self._close_timeout_s):
                    raise TimeoutError(f"staged copies did not finish within {self._close_timeout_s} s; the GPU hangs?")
            self._closed = True
            for event in [self._started, *(e for buffer in self._buffers for e in (buffer.filled, buffer.emptied))]:
                self._driver.event_destroy(event)
            self._driver.stream_destroy(self._stream)
            self._buffers = ()

    def _transfer(
        self,
        src: View,
        src_ids: SlotIds,
        dst: View,
        dst_ids: SlotIds,
        stream: int,
        sm_budget: int | None,
        *,
        to_host: bool,
        stable_source: bool,
    ) -> None:
        if stream in LEGACY_STREAMS:
            raise KernelArgumentError("staged copies refuse the legacy default stream; pass a stream of your own")
        src, src_ids, dst, dst_ids = match_views(src, src_ids, dst, dst_ids)
        check_distinct(dst_ids, "dst_ids", dst.num_blocks)
        host, num_blocks = dst if to_host else src, dst_ids.size
        chunks = list(self._chunks(host, num_blocks))
        src_ids, dst_ids = ascending_pairs(src_ids, dst_ids, "dst" if to_host else "src", host.num_blocks)
        job = _Job(src, src_ids, dst, dst_ids, sm_budget, to_host, stable_source)
        with self._lock:
            if self._closed:
                raise KernelArgumentError("this staging is closed; make a new one")
            if not to_host:  # DMA must not read what work queued before on `stream` still writes
                self._driver.event_record(self._started, stream)
                self._driver.stream_wait(self._stream, self._started)
            layouts: dict[tuple[tuple[int, int], int], list[_Layout]] = {}  # one for each buffer that was its turn
            for chunk in chunks:
                self._turn = (self._turn + 1) % NUM_BUFFERS
                buffer = self._buffers[self._turn]
                known = layouts.setdefault((chunk.layers, chunk.stop - chunk.start), [])
                layout = next((found for found in known if found.packed.tensors[0] is buffer.memory), None)
                if layout is None:
                    layout = known[0].moved_to(buffer.memory) if known else _lay_out(job, chunk, buffer.memory)
                    known.append(layout)
                is_queued = False
                try:
                    self._submit(job, layout, chunk, buffer, stream)
                    is_queued = True
                finally:
                    if not is_queued:
                        self._seal(buffer, stream)
            if to_host and chunks:
                self._driver.stream_wait(stream, self._buffers[self._turn].emptied)

    def _seal(self, buffer: Buffer, stream: int) -> None:
        """After a failure half-way: whoever uses the buffer next waits for all that was queued on it, on either stream."""
        try:
            self._driver.event_record(buffer.filled, stream)
            self._driver.stream_wait(self._stream, buffer.filled)
        finally:
            self._driver.event_record(buffer.emptied, self._stream)

    def _chunks(self, host: View, num_blocks: int) -> Iterator[Chunk]:
        """Cuts a transfer so that every part fits a buffer; blocks larger than that are cut between layers."""
        num_layers, layer_bytes = host.layers_per_group, host.block_bytes // host.layers_per_group
        wanted = min(self.buffer_bytes, max(MIN_CHUNK_BYTES, num_blocks * host.block_bytes // MIN_CHUNKS))
        at_once = max(1, wanted // host.block_bytes)
        layers = min(num_layers, self.buffer_bytes // layer_bytes)
        if layers == 0:
            raise KernelArgumentError(
                f"{layer_bytes} bytes of a block's layer must fit one buffer of {self.buffer_bytes}; "
                f"give the staging {NUM_BUFFERS * layer_bytes} bytes"
            )
        for start in range(0, num_blocks, at_once):
            for low in range(0, num_layers, layers):
                yield Chunk((low, min(low + layers, num_layers)), start, min(start + at_once, num_blocks))

    def _submit(self, job: "_Job", layout: "_Layout", chunk: Chunk, buffer: Buffer, stream: int) -> None:
        driver, ours = self._driver, self._stream
        part = slice(chunk.start, chunk.stop)
        src_ids, dst_ids = job.src_ids[part], job.dst_ids[part]
        if job.to_host:
            copy = replace(layout.dma, dst_offsets=layout.dst.block_offsets[dst_ids])
            driver.stream_wait(stream, buffer.emptied)
            kernel = partial(
                copy_blocks, layout.src, src_ids, layout.packed, layout.packed_ids, sm_budget=job.sm_budget
            )
            driver.launch(kernel, stream, self.device)
            driver.event_record(buffer.filled, stream)
            driver.stream_wait(ours, buffer.filled)
            copy_runs(runs_of(copy, order_by="dst"), driver, ours)
            driver.event_record(buffer.emptied, ours)
        else:
            copy = replace(layout.dma, src_offsets=layout.src.block_offsets[src_ids])
            driver.stream_wait(ours, buffer.emptied)
            copy_runs(runs_of(copy, order_by="src"), driver, ours, stable_source=job.stable_source)
            driver.event_record(buffer.filled, ours)
            driver.stream_wait(stream, buffer.filled)
            kernel = partial(
                copy_blocks, layout.packed, layout.packed_ids, layout.dst, dst_ids, sm_budget=job.sm_budget
            )
            driver.launch(kernel, stream, self.device)
            driver.event_record(buffer.emptied, stream)


class _Job(NamedTuple):
    """One transfer, its lists in the order of the host side's blocks."""

    src: View
    src_ids: SlotIds
    dst: View
    dst_ids: SlotIds
    sm_budget: int | None
    to_host: bool
    stable_source: bool


class _Layout(NamedTuple):
    """What chunks of one size have in common: cut views, the packed view, and the DMA but for the host's offsets."""

    src: View
    dst: View
    packed: View
    packed_ids: SlotIds
    dma: CopyPlan
    to_host: bool

    def moved_to(self, memory: torch.Tensor) -> "_Layout":
        """The same with the other buffer's memory, which is as large."""
        shift = memory.data_ptr() - self.packed.tensors[0].data_ptr()
        base, limits = self.packed.base + shift, self.packed.limits + shift
        packed = replace(self.packed, tensors=(memory,), base=base, limits=limits)
        if self.to_host:
            dma = replace(self.dma, src_bases=self.dma.src_bases + shift, storages=storage_starts(packed, self.dst))
        else:
            dma = replace(self.dma, dst_bases=self.dma.dst_bases + shift, storages=storage_starts(self.src, packed))
        return self._replace(packed=packed, dma=dma)


def _lay_out(job: _Job, chunk: Chunk, memory: torch.Tensor) -> _Layout:
    src, dst = cut_views(job.src, job.dst, chunk.layers, None)
    part = slice(chunk.start, chunk.stop)
    ids = np.arange(chunk.stop - chunk.start, dtype=np.int64)
    if job.to_host:
        packed = packed_like(dst, memory, ids.size)
        return _Layout(src, dst, packed, ids, plan_copy(packed, ids, dst, job.dst_ids[part]), True)
    packed = packed_like(src, memory, ids.size)
    return _Layout(src, dst, packed, ids, plan_copy(src, job.src_ids[part], packed, ids), False)


def _mean_step(steps: npt.NDArray[np.int64]) -> float:
    return float(np.abs(steps).mean()) if steps.size else 0.0
