"""Blocks that arrive layer by layer, while the layers before are at work.

A load by layers begins with a promise: a number of blocks whose bytes lie in host rows, checked, and which nothing but a
fault of the device can keep from arriving. So the caller may count on them before they are there, and waits for each layer
just before it needs it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dynamo.kvcache.errors import LayerLoadError
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.mover import Mover, Part
from dynamo.tiers.tier import Outcomes, Rows, SlotIds
from dynamo.tiers.transfer import Transfer

__all__ = ["LayerLoad"]

_TIMEOUT_S = 60.0  # far beyond any copy from memory to memory: after it the device is considered broken
_NO_POSITIONS: SlotIds = np.empty(0, dtype=np.int64)


class LayerLoad:
    """Blocks on their way from host rows to the device: layer 0 of all of them, then layer 1, and so on. Thread-safe.

    Attributes:
        num_blocks: leading blocks of the load that are promised; some of them may have arrived before.
    """

    def __init__(
        self,
        device: DeviceTier,
        rows: Rows,
        device_slots: SlotIds,
        row_ids: SlotIds,
        *,
        num_blocks: int,
        part_blocks: int,
        fences: Sequence[Fence],
    ) -> None:
        """Prepares to copy rows `row_ids` to `device_slots`; `start` starts it.

        Args:
            part_blocks: whole blocks' worth of bytes that are copied at a time.
            fences: as in `LoadRequest`.
        """
        self.num_blocks = num_blocks
        self._device = device
        self._rows = rows
        self._device_slots = device_slots
        self._row_ids = row_ids
        self._fences = fences
        self._part_blocks = part_blocks * device.layout.num_layers
        self._transfer = Transfer(len(row_ids), _TIMEOUT_S)
        self._changed = threading.Condition()  # guards both below
        self._num_layers = 0 if len(row_ids) else device.layout.num_layers
        self._error: Exception | None = None

    def start(self, mover: Mover, on_done: Callable[[], None]) -> None:
        """Starts to copy; `on_done` is called when the rows are not read any more."""
        layout = self._device.layout
        parts = []
        for layer in range(layout.num_layers):
            for first in range(0, len(self._row_ids), self._part_blocks):
                which = slice(first, first + self._part_blocks)
                num_bytes = 2 * layout.plane_bytes * len(self._row_ids[which])
                is_last = which.stop >= len(self._row_ids)
                parts.append(Part(partial(self._copy, layer, which, is_last), num_bytes))
        self._transfer.when_ended(self._notify)
        mover.submit(self._transfer, {"host": parts}, on_done, at_once=1)

    @property
    def num_layers(self) -> int:
        """Leading layers of which every promised block is in device memory."""
        return self._num_layers

    def wait(self, layer: int, timeout_s: float | None = None) -> None:
        """Blocks until layer `layer` of all promised blocks is in device memory.

        Args:
            timeout_s: at most so long; None: as long as the device may take.

        Raises:
            LayerLoadError: the device failed, or the load was cancelled.
            TimeoutError: it took longer than `timeout_s`.
        """
        latest = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._num_layers <= layer:
                if self._error is not None or self._transfer.is_ended:
                    raise LayerLoadError(layer, self.num_blocks) from self._error
                remaining_s = self._transfer.remaining_s
                if latest is not None:
                    remaining_s = min(remaining_s, latest - time.monotonic())
                if remaining_s <= 0:
                    break
                self._changed.wait(remaining_s)
            else:
                return
        if self._transfer.is_due:
            self._transfer.expire()
            raise LayerLoadError(layer, self.num_blocks)
        raise TimeoutError(f"layer {layer} of {self.num_blocks} KV blocks was not loaded within {timeout_s:g} s")

    def cancel(self) -> None:
        """Ends the load; nothing is written to the device slots any more when this returns."""
        self._transfer.cancel()

    def _copy(self, layer: int, which: slice, is_last: bool) -> None:
        device_slots, row_ids = self._device_slots[which], self._row_ids[which]

        def write() -> Outcomes:
            layers = range(layer, layer + 1)
            self._device.write_layers(device_slots, self._rows, row_ids, layers, after=self._fences)
            return np.empty(0, dtype=np.bool_)

        try:
            ran = self._transfer.deliver(_NO_POSITIONS, write)
        except Exception as error:
            with self._changed:
                self._error = error
            self._transfer.cancel()
            raise
        if ran and is_last:
            with self._changed:
                self._num_layers = layer + 1
                self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
