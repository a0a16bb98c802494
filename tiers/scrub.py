"""Walks over a disk tier to find blocks that went bad before somebody needs them: slowly, and only when it is idle."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierClosedError, TierConfigError

__all__ = ["ScrubStats", "ScrubStep", "Scrubber"]

logger = logging.getLogger(__name__)

_QUIET_S = 0.5  # the disk counts as idle when nobody has used it for so long
_ROUND_S = 3600.0  # bits rot over months: a small tier need not be read more often


@dataclass(frozen=True, slots=True)
class ScrubStep:
    """Outcome of a look at some slots.

    Attributes:
        num_checked: blocks read and compared.
        num_bytes: read for it.
        next_slot: where to go on; None after the last slot.
    """

    num_checked: int
    num_bytes: int
    next_slot: int | None


@dataclass(frozen=True, slots=True)
class ScrubStats:
    """How far a scrubber has come.

    Attributes:
        num_checked: blocks read and compared since it was started.
        num_rounds: how often it came to the end of the tier.
        round_share: how much of the tier the present round has seen, from 0 to 1.
        round_ended_s: when the last round ended, on `time.monotonic`; None before.
    """

    num_checked: int = 0
    num_rounds: int = 0
    round_share: float = 0.0
    round_ended_s: float | None = None


class Scrubber:
    """Has the slots of a disk tier checked a few at a time, on a thread of its own, round after round.

    What a look at slots is, and what becomes of those that are bad, is for `check` to say. It should read with
    `DiskTier.inspect`, which does not count as use of the disk: the scrubber would wait for itself.
    """

    def __init__(
        self,
        disk: DiskTier,
        check: Callable[[int], ScrubStep | None],
        *,
        bytes_per_s: float,
        quiet_s: float = _QUIET_S,
        round_s: float = _ROUND_S,
    ) -> None:
        """Starts the thread.

        Args:
            disk: the tier; stays open until `close`.
            check: looks at a few slots from the given one on, on the scrubber's thread; None: not now.
            bytes_per_s: how fast to read at most, on average.
            quiet_s: how long nobody must have used the disk before slots are looked at.
            round_s: how long a round takes at least.

        Raises:
            TierConfigError: `bytes_per_s` is not positive.
        """
        if not bytes_per_s > 0:
            raise TierConfigError(f"a scrubber of {bytes_per_s} bytes a second checks nothing; give more, or have none")
        self._disk = disk
        self._check = check
        self._bytes_per_s = bytes_per_s
        self._quiet_s = quiet_s
        self._round_s = round_s
        self._changed = threading.Condition()  # guards the flag
        self._is_closed = False
        self._stats = ScrubStats()
        self._thread = threading.Thread(target=self._run, name="kv-scrub", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> ScrubStats:
        """How far it has come."""
        return self._stats

    def close(self, timeout_s: float) -> None:
        """Ends the thread after its present look, within `timeout_s`; one that hangs is left behind. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the scrubber is still reading after %g s; going on without it", timeout_s)

    def _run(self) -> None:
        slot = 0
        round_started_s = time.monotonic()
        try:
            while self._wait_until_idle():
                started_s = time.monotonic()
                step = self._check(slot)
                if step is None:
                    self._sleep(started_s + self._quiet_s)
                    continue
                self._note(step)
                resume_s = started_s + step.num_bytes / self._bytes_per_s
                slot = step.next_slot or 0
                if step.next_slot is None:
                    resume_s = max(resume_s, round_started_s + self._round_s)
                self._sleep(resume_s)
                if step.next_slot is None:
                    round_started_s = time.monotonic()
        except TierClosedError as error:
            logger.debug("the check in the background ends: %s", error)
        except Exception:
            logger.exception(
                "checking the blocks on disk failed and is given up; they are still checked when they are read"
            )

    def _note(self, step: ScrubStep) -> None:
        stats, is_end = self._stats, step.next_slot is None
        self._stats = ScrubStats(
            stats.num_checked + step.num_checked,
            stats.num_rounds + is_end,
            0.0 if step.next_slot is None else min(1.0, step.next_slot / self._disk.num_slots),
            time.monotonic() if is_end else stats.round_ended_s,
        )

    def _wait_until_idle(self) -> bool:
        """Waits until nobody has used the disk for a while; False when closed."""
        with self._changed:
            while not self._is_closed:
                busy_s = self._quiet_s - self._disk.idle_s
                if busy_s <= 0:
                    return True
                self._changed.wait(busy_s)
            return False

    def _sleep(self, until_s: float) -> None:
        with self._changed:
            while not self._is_closed and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
