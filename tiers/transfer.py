"""What a transfer is: the way its bytes take, as a table, and what has become of its blocks.

A way is one hop or two. Two hops go through rows of pinned host memory, which all requests share: one part of a transfer
goes into some rows while another part leaves others.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from dynamo.tiers.tier import Outcomes, SlotIds

__all__ = [
    "STRATEGIES",
    "Capabilities",
    "Direct",
    "Medium",
    "Route",
    "Strategy",
    "Transfer",
    "TwoHops",
    "Unsupported",
    "route",
]

logger = logging.getLogger(__name__)


class Medium(StrEnum):
    """Where blocks lie, as far as the way there depends on it."""

    SYSTEM = "system"
    """Pageable host memory."""
    PINNED = "pinned"
    """Host memory that CUDA and network cards may copy from and to."""
    DEVICE = "device"
    """GPU memory, or what stands for it on the CPU."""
    DISK = "disk"
    REMOTE = "remote"
    """Another machine's memory."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What was proven on this machine: bytes were moved that way and compared.

    Attributes:
        gds: disk and GPU exchange bytes without host memory (GPUDirect Storage).
        gpu_rdma: network card and GPU do (GPUDirect RDMA).
    """

    gds: bool = False
    gpu_rdma: bool = False


@dataclass(frozen=True, slots=True)
class Direct:
    """One hop."""


@dataclass(frozen=True, slots=True)
class TwoHops:
    """Into rows of `via`, and on from there."""

    via: Medium = Medium.PINNED


@dataclass(frozen=True, slots=True)
class Unsupported:
    """No way, and why."""

    reason: str


Route = Direct | TwoHops | Unsupported


@dataclass(frozen=True, slots=True)
class Strategy:
    """A cell of the table.

    Attributes:
        route: the way that needs no capability.
        needs: field of `Capabilities` that makes it one hop; None if none does.
    """

    route: Route
    needs: str | None = None


_D = Strategy(Direct())
_T = Strategy(TwoHops())
_G = Strategy(TwoHops(), needs="gds")
_R = Strategy(TwoHops(), needs="gpu_rdma")
_N = Strategy(Unsupported("two other machines exchange blocks between themselves; ask one of them"))

_COLUMNS = (Medium.SYSTEM, Medium.PINNED, Medium.DEVICE, Medium.DISK, Medium.REMOTE)
_ROWS = {
    # to:          system pinned device disk remote
    Medium.SYSTEM: (_D, _D, _D, _D, _D),
    Medium.PINNED: (_D, _D, _D, _D, _D),
    Medium.DEVICE: (_D, _D, _D, _G, _R),
    Medium.DISK: (_D, _D, _G, _T, _T),
    Medium.REMOTE: (_D, _D, _R, _T, _N),
}

STRATEGIES: Mapping[tuple[Medium, Medium], Strategy] = MappingProxyType(
    {
        (source, destination): strategy
        for source, cells in _ROWS.items()
        for destination, strategy in zip(_COLUMNS, cells, strict=True)
    }
)
"""The way from each medium to each: direct, two hops, direct where a capability was proven, or none."""


def route(source: Medium, destination: Medium, capabilities: Capabilities) -> Route:
    """The way that blocks take on this machine.

    >>> route(Medium.DISK, Medium.DEVICE, Capabilities())
    TwoHops(via=<Medium.PINNED: 'pinned'>)
    >>> route(Medium.DISK, Medium.DEVICE, Capabilities(gds=True))
    Direct()
    """
    strategy = STRATEGIES[source, destination]
    if strategy.needs is not None and getattr(capabilities, strategy.needs):
        return Direct()
    return strategy.route


class Transfer:
    """Blocks on their way into slots that somebody waits for: per-block outcome, deadline, and a safe end.

    After `expire` or `cancel`, no part can write to the destination any more, so the owner may reuse the slots although
    I/O that was already submitted is still under way towards staging memory. Thread-safe.
    """

    def __init__(self, num_blocks: int, timeout_s: float) -> None:
        self.num_blocks = num_blocks
        self._deadline = time.monotonic() + timeout_s
        self._changed = threading.Condition()  # guards all below; notified when a last hop has ended
        self._arrived: Outcomes = np.zeros(num_blocks, dtype=np.bool_)
        self._num_leading = 0
        self._floor = 0
        self._delivering: list[int] = []  # lowest position of each last hop that is under way
        self._closed = False
        self._expired = False
        self._ended = threading.Event()
        self._end_callbacks: list[Callable[[], None]] = []
        self._telling = threading.Lock()  # guards the list below; taken before _changed, and held during the callbacks
        self._progress_callbacks: list[Callable[[], None]] = []

    @property
    def deadline(self) -> float:
        """When the transfer expires, on `time.monotonic`."""
        return self._deadline

    @property
    def is_ended(self) -> bool:
        """True once all parts ran, or the transfer expired or was cancelled."""
        return self._ended.is_set()

    @property
    def is_due(self) -> bool:
        """True once `wait` would return at once: the transfer has ended, or its deadline has passed."""
        return self._ended.is_set() or time.monotonic() >= self._deadline

    @property
    def is_expired(self) -> bool:
        """True if the transfer ran out of time before all its parts had run."""
        return self._expired

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, not below 0."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def arrived(self) -> Outcomes:
        """bool [num_blocks]: which blocks are in their destination now."""
        with self._changed:
            return self._arrived.copy()

    @property
    def num_leading(self) -> int:
        """How many blocks have arrived, counted from the first one to the first that has not."""
        return self._num_leading

    def extend(self, deadline: float) -> None:
        """Moves the deadline (on `time.monotonic`) further away; an earlier one than the present is ignored."""
        with self._changed:
            self._deadline = max(self._deadline, deadline)

    @property
    def floor(self) -> int:
        """Position of the first block that is still wanted."""
        return self._floor

    def raise_floor(self, position: int) -> None:
        """Says that blocks before `position` are not wanted any more: they are not written when this returns.

        Those that have arrived stay where they are. Waits for last hops of such blocks that are under way.
        """
        with self._changed:
            self._floor = max(self._floor, position)
            self._changed.wait_for(lambda: all(lowest >= position for lowest in self._delivering))

    def deliver(self, positions: SlotIds, write: Callable[[Outcomes], Outcomes]) -> bool:
        """Runs the last hop of the blocks at `positions`, unless the transfer has ended or none of them is wanted.

        Last hops of different parts may run at the same time.

        Args:
            positions: int64 [n].
            write: is given bool [n], True for the blocks that are wanted, and writes those; tells which of them it wrote.

        Returns:
            Whether `write` ran.
        """
        with self._changed:
            wanted: Outcomes = positions >= self._floor
            if self._closed or (len(wanted) and not wanted.any()):
                return False
            positions = positions[wanted]
            lowest = int(positions.min(initial=self.num_blocks))
            self._delivering.append(lowest)
        outcomes = np.zeros(len(positions), dtype=np.bool_)
        try:
            outcomes = write(wanted)
        finally:
            with self._changed:
                self._delivering.remove(lowest)
                self._arrived[positions] = outcomes
                missing = ~self._arrived[self._num_leading :]
                self._num_leading += int(np.argmax(missing)) if missing.any() else len(missing)
                self._changed.notify_all()
        if outcomes.any():
            self._tell_progress()
        return True

    def finish(self) -> None:
        """Says that no part is left. Called by the mover."""
        self._end(expired=False)

    def expire(self) -> None:
        """Ends the transfer now, as too late: what has not arrived never will. Waits for a last hop that is under way."""
        self._end(expired=True)

    def cancel(self) -> None:
        """Ends the transfer now, since nobody wants it any more; else as `expire`."""
        self._end(expired=False)

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the end, at most until the deadline or for `timeout_s`, and then expires the transfer.

        Returns:
            `num_leading`.
        """
        latest = np.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_ended:  # more than once round when the deadline has moved meanwhile
            remaining_s = min(self._deadline, latest) - time.monotonic()
            if remaining_s <= 0:
                break
            self._ended.wait(remaining_s)
        self.expire()
        return self._num_leading

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, on some thread, right after the transfer has ended; at once if it has."""
        with self._changed:
            if not self._ended.is_set():
                self._end_callbacks.append(callback)
                return
        callback()

    def wait_ended(self, timeout_s: float) -> bool:
        """Waits for the end for so long at most, without hastening it. Returns `is_ended`."""
        return self._ended.wait(timeout_s)

    def on_progress(self, callback: Callable[[], None]) -> None:
        """Calls `callback`, on some thread, each time blocks have arrived; at once if some have.

        One call at a time. The callback may look what has arrived and `extend` the deadline; it must not wait.
        """
        with self._telling:
            self._progress_callbacks.append(callback)
            if self.arrived.any():
                callback()

    def _tell_progress(self) -> None:
        with self._telling:
            for callback in self._progress_callbacks:
                try:
                    callback()
                except Exception:
                    logger.exception("a listener to the progress of a KV transfer failed")

    def _end(self, *, expired: bool) -> None:
        with self._changed:
            if not self._closed:
                self._closed = True
                self._expired = expired
            # A copy into the slots that hangs has no way out: they cannot be given to anybody else.
            self._changed.wait_for(lambda: not self._delivering)
            callbacks, self._end_callbacks = self._end_callbacks, []
            self._ended.set()
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a listener to the end of a KV transfer failed")
