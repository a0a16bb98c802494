"""Pins that somebody asked for, each with an owner and an end.

    pin ──► active ──► ended: released, its time is up, its owner is gone, or the cache is closed

An ended lease has given its blocks back exactly once, whatever ended it and how often. A pin keeps blocks from being
evicted; it does not bring them anywhere. Pins together may hold only a share of each tier, so that they cannot starve
the requests the tier is there for.
"""

import contextlib
import logging
import queue
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from dynamo.kvcache.errors import CacheClosedError, PinLimitError
from dynamo.tiers.tier import SlotIds

__all__ = ["MAX_PINNED_SHARE", "MAX_PINS", "HeldSlots", "Lease", "LeaseBook", "PinInfo"]

logger = logging.getLogger(__name__)

MAX_PINNED_SHARE = 0.5
"""Of a tier's slots, what pins may hold together."""

MAX_PINS = 10_000
"""Pins that may be active at the same time."""

_MAX_NAMED = 5  # in a line of the log


@dataclass(frozen=True, slots=True)
class HeldSlots:
    """Slots of one tier that are held for a lease.

    Attributes:
        num_tier_slots: slots the tier has.
        release: gives them back. Called exactly once, on any thread.
    """

    tier: str
    slots: SlotIds
    num_tier_slots: int
    release: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PinInfo:
    """An active pin.

    Attributes:
        pin_id: names it; not to be guessed.
        name: what its owner calls it.
        num_tokens: tokens it was asked for, in whole blocks.
        blocks: how many of them it holds in each tier; tiers without any are absent.
        age_s: since it was made.
        remaining_s: until it ends by itself; None: with its owner.
    """

    pin_id: str
    name: str
    num_tokens: int
    blocks: dict[str, int]
    age_s: float
    remaining_s: float | None


@dataclass(slots=True)
class _Pin:
    """An active pin, for the book."""

    name: str
    num_tokens: int
    held: list[HeldSlots]
    made_s: float
    expires_s: float | None


class Lease:
    """A pin on a prefix. Ends it with `release` or as a context manager; ending it again does nothing.

    A lease without a time to live belongs to this object: when that is garbage, the pin ends. One with a time to live
    ends when the time is up, whether or not anybody keeps the object.

    Attributes:
        pin_id: for `KVCache.unpin`, and in `KVCache.status`.
        num_tokens: tokens that were asked for, in whole blocks.
        blocks: how many blocks are held in each tier; tiers without any are absent.
    """

    def __init__(self, book: "LeaseBook", pin_id: str, info: PinInfo) -> None:
        """Made by `LeaseBook.pin`."""
        self._book = book
        self.pin_id = pin_id
        self.num_tokens = info.num_tokens
        self.blocks = info.blocks
        if info.remaining_s is None:
            weakref.finalize(self, book.end_later, pin_id).atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_active(self) -> bool:
        """Whether the blocks are still held."""
        return self.pin_id in self._book

    def extend(self, ttl_s: float) -> bool:
        """Lets the lease live for `ttl_s` from now on, whatever it had; False if it has ended."""
        return self._book.extend(self.pin_id, ttl_s)

    def release(self) -> bool:
        """Gives the blocks back. Returns whether this call ended the lease."""
        return self._book.end(self.pin_id)


class LeaseBook:
    """All leases of a cache. Thread-safe. Owns a thread, from the first pin on, that ends what nobody else ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below; never held while blocks are given back
        self._pins: dict[str, _Pin] = {}
        self._uses: dict[str, Counter[int]] = {}  # by tier: how many pins hold a slot
        self._thread: threading.Thread | None = None
        self._is_closed = False
        # Ids of pins whose owner is gone; "": look at the deadlines again; None: end. Its `put` may interrupt anything,
        # itself included, as a garbage collection does.
        self._orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __len__(self) -> int:
        """Active pins."""
        return len(self._pins)

    def __contains__(self, pin_id: object) -> bool:
        return pin_id in self._pins

    def pin(self, held: Sequence[HeldSlots], *, num_tokens: int, name: str, ttl_s: float | None) -> Lease:
        """Takes over blocks that are held already; if it refuses them, they are given back.

        Raises:
            PinLimitError: pins would hold too much of a tier, or be too many.
            CacheClosedError: the cache is closed.
        """
        now = time.monotonic()
        pin = _Pin(name, num_tokens, list(held), now, None if ttl_s is None else now + ttl_s)
        pin_id = "pin_" + secrets.token_hex(12)
        try:
            with self._lock:
                self._check_room(held)
                self._pins[pin_id] = pin
                for part in held:
                    self._uses.setdefault(part.tier, Counter()).update(part.slots.tolist())
                info = _info(pin_id, pin, now)
                self._start_thread()
        except BaseException:
            _give_back(held)
            raise
        if ttl_s is not None:
            self._orders.put("")
        return Lease(self, pin_id, info)

    def end(self, pin_id: str) -> bool:
        """Gives a pin's blocks back. Returns whether this call ended it."""
        with self._lock:
            pin = self._pins.get(pin_id)
            if pin is None:
                return False
            self._remove(pin_id, pin)
        _give_back(pin.held)
        return True

    def end_later(self, pin_id: str) -> None:
        """`end`, on the book's thread: the owner was garbage, and locks may be held where that is found out."""
        self._orders.put(pin_id)

    def extend(self, pin_id: str, ttl_s: float) -> bool:
        """Sets what is left of a pin's time; False if it has ended."""
        with self._lock:
            pin = self._pins.get(pin_id)
            if pin is None:
                return False
            pin.expires_s = time.monotonic() + ttl_s
        self._orders.put("")
        return True

    def pins(self) -> tuple[PinInfo, ...]:
        """All active pins, oldest first."""
        now = time.monotonic()
        with self._lock:
            return tuple(_info(pin_id, pin, now) for pin_id, pin in self._pins.items())

    def close(self, timeout_s: float) -> None:
        """Ends all pins, whose number and first names it logs, and the thread. Idempotent."""
        with self._lock:
            self._is_closed = True
            pin_ids, thread = list(self._pins), self._thread
            names = sorted({pin.name for pin in self._pins.values() if pin.name})
        if pin_ids:
            shown = ", ".join(repr(name) for name in names[:_MAX_NAMED]) or "without names"
            logger.info("the cache is closed with %d active pins, which end now: %s", len(pin_ids), shown)
        for pin_id in pin_ids:
            self.end(pin_id)
        self._orders.put(None)
        if thread is not None:
            thread.join(timeout_s)

    def _check_room(self, held: Sequence[HeldSlots]) -> None:
        if self._is_closed:
            raise CacheClosedError("the cache is closed")
        if len(self._pins) >= MAX_PINS:
            raise PinLimitError(
                f"there are {MAX_PINS} pins already; end some before making another",
                tier=None,
                needed_blocks=0,
                allowed_blocks=0,
            )
        for part in held:
            uses = self._uses.get(part.tier, Counter())
            needed = len(uses) + sum(slot not in uses for slot in part.slots.tolist())
            allowed = int(part.num_tier_slots * MAX_PINNED_SHARE)
            if needed > allowed and len(part.slots):
                raise PinLimitError(
                    f"pins would hold {needed} blocks of the {part.tier} tier, of which they may hold {allowed}, "
                    f"{MAX_PINNED_SHARE:.0%} of its {part.num_tier_slots} slots; end other pins, or pin fewer tokens",
                    tier=part.tier,
                    needed_blocks=needed,
                    allowed_blocks=allowed,
                )

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-leases", daemon=True)
            self._thread.start()

    def _remove(self, pin_id: str, pin: _Pin) -> None:
        """Takes a pin out of the book; whoever does gives its blocks back. The caller holds the lock."""
        del self._pins[pin_id]
        for part in pin.held:
            uses, slots = self._uses[part.tier], part.slots.tolist()
            uses.subtract(slots)
            for slot in slots:
                if not uses[slot]:
                    del uses[slot]

    def _run(self) -> None:
        while True:
            with self._lock:
                deadlines = [pin.expires_s for pin in self._pins.values() if pin.expires_s is not None]
            wait_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            with contextlib.suppress(queue.Empty):
                order = self._orders.get(timeout=wait_s)
                if order is None:
                    return
                self.end(order)
            self._end_late()

    def _end_late(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = {id_: pin for id_, pin in self._pins.items() if pin.expires_s is not None and pin.expires_s <= now}
            for pin_id, pin in late.items():
                self._remove(pin_id, pin)
        for pin in late.values():
            _give_back(pin.held)


def _give_back(held: Sequence[HeldSlots]) -> None:
    for part in held:
        try:
            part.release()
        except Exception:  # whoever ends a pin, the other tiers must get their blocks back
            logger.exception("pinned blocks of the %s tier could not be given back", part.tier)


def _info(pin_id: str, pin: _Pin, now: float) -> PinInfo:
    return PinInfo(
        pin_id=pin_id,
        name=pin.name,
        num_tokens=pin.num_tokens,
        blocks={part.tier: len(part.slots) for part in pin.held if len(part.slots)},
        age_s=now - pin.made_s,
        remaining_s=None if pin.expires_s is None else max(0.0, pin.expires_s - now),
    )
