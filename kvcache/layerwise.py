"""Blocks that move layer by layer, while the forward pass works on other layers.

A load by layers begins with a promise: a number of blocks whose bytes lie in host rows, checked, and which nothing but a
fault of the device can keep from arriving. So the caller may count on them before they are there, and waits for each layer
just before it needs it.

A save by layers copies each layer to host rows as soon as it is computed. The blocks become visible when they are committed,
and only if all their layers were copied; otherwise nothing has happened, and the commit copies them whole.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dynamo.kvcache.errors import LayerLoadError
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.reach import reachable
from dynamo.kvcache.shelf import Hold, Shelf
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.mover import Mover, Part
from dynamo.tiers.tier import Outcomes, Rows, SlotIds
from dynamo.tiers.transfer import Transfer

__all__ = ["LayerLoad", "LayerSave"]

logger = logging.getLogger(__name__)

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

        def write(_: Outcomes) -> Outcomes:
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


class LayerSave:
    """Blocks of an open sequence on their way from the device to host rows, one layer at a time.

    `copy`, `adopt` and `end` belong to one thread at a time, and are called in this order; `end` comes exactly once.
    """

    def __init__(
        self,
        shelf: Shelf,
        device: DeviceTier,
        chain: list[BlockKey],
        first: int,
        device_slots: SlotIds,
        release: Callable[[], None],
    ) -> None:
        """Takes no rows yet.

        Args:
            chain: keys of the whole sequence, which may have been computed but not committed.
            first: position in `chain` of the first block to be saved; all from there on are.
            device_slots: where they are being written. Pinned until `release` is called.
        """
        self.chain = chain
        self._shelf = shelf
        self._device = device
        self._first = first
        self._device_slots = device_slots
        self._release = release
        self._num_layers = 0  # copied
        self._is_ended = False
        self._hold: Hold | None = None
        self._places = _NO_POSITIONS  # of the blocks with rows, in `chain`
        self._rows = _NO_POSITIONS

    def copy(self, layer: int, fences: Sequence[Fence]) -> None:
        """Copies a layer that is computed; out of order, it makes the others useless."""
        if self._is_ended:
            return
        if self._hold is None:
            self._hold = self._shelf.hold([self.chain])
            self._take_rows(self._hold)
        if layer == self._num_layers:
            slots = self._device_slots[self._places - self._first]
            self._device.read_layers(slots, self._shelf.rows, self._rows, range(layer, layer + 1), after=fences)
            self._num_layers += 1
        else:
            self._num_layers = self._device.layout.num_layers + 1

    def adopt(self) -> None:
        """Registers the blocks, which are committed now, if all their layers were copied."""
        if self._num_layers != self._device.layout.num_layers or not len(self._rows):
            return
        places = self._places.tolist()
        keys = [self.chain[place] for place in places]
        parents = [self.chain[place - 1] if place else None for place in places]
        started_s = time.perf_counter()
        self._rows = self._shelf.keep_in_host(keys, self._rows, parents)
        self._shelf.count_host_write(self._rows, time.perf_counter() - started_s)

    def end(self) -> None:
        """Gives everything back; rows that were not adopted are forgotten."""
        if self._is_ended:
            return
        self._is_ended = True
        try:
            self._shelf.release_rows(self._rows)
            if self._hold is not None:
                self._shelf.let_go(self._hold)
        finally:
            self._release()

    def _take_rows(self, hold: Hold) -> None:
        """Takes host rows for as many leading blocks as there are without waiting."""
        shelf = self._shelf
        keys = self.chain[self._first :]
        with shelf.changed:
            parents = [self.chain[self._first - 1] if self._first else None, *keys[:-1]]
            is_wanted = (shelf.host.locate(keys) < 0) & reachable(shelf.host, keys, parents)
            places = np.flatnonzero(is_wanted) + self._first
            if len(places):
                self._rows = shelf.take_rows(len(places), 0.0, (shelf.host,), hold, lambda: True)
            self._places = places[: len(self._rows)]
