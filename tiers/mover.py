"""Runs the parts of transfers on its own threads: urgent ones first, each transfer in turn, a bounded number of bytes at once.

    lane      threads of one kind of work, such as "host" loads or "disk" loads; hung threads hold up their own lane only
    link      the hardware that lanes share; what is in flight on it, in bytes, is bounded
    priority  a part gives way to more urgent ones on its link, but not for longer than `GIVE_WAY_S`: nothing starves
    turns     the transfers of a lane and priority take turns, part by part: a short one never waits for the whole of a long one

A part takes all its hops in one thread, and a transfer has several parts under way: while one is copied to the device, the
next is read. Threads are woken when there is something for them to do; nothing polls.
"""

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from dynamo.tiers.transfer import Transfer

__all__ = ["GIVE_WAY_S", "PARTS_AT_ONCE", "Lane", "Line", "Mover", "Part", "Priority"]

logger = logging.getLogger(__name__)

PARTS_AT_ONCE = 2
"""Parts of a transfer under way in a lane: one reads while the other copies."""

GIVE_WAY_S = 0.05
"""How long less urgent parts of a lane, at most, let more urgent ones go first before one of them has its turn."""


class Priority(IntEnum):
    """How urgent a transfer is; smaller is more urgent."""

    LOAD = 0
    """A request waits for it."""
    PREFETCH = 1
    """Somebody may ask for it soon."""
    OFFLOAD = 2
    """It only has to keep up."""


@dataclass(frozen=True, slots=True)
class Part:
    """Moves some of a transfer's blocks, on a thread of the mover.

    Attributes:
        run: does it. May raise: the blocks count as not arrived.
        num_bytes: what it has in flight while it runs.
    """

    run: Callable[[], None]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Lane:
    """Threads for one kind of work.

    Attributes:
        link: name of the hardware used; lanes of equal name share it.
        num_threads: parts that run at once, at most.
    """

    link: str
    num_threads: int


class Mover:
    """Owns the threads that run parts, and one that ends transfers whose deadline has passed. Thread-safe."""

    def __init__(self, lanes: Mapping[str, Lane], max_link_bytes: int) -> None:
        """Starts the threads.

        Args:
            lanes: by name.
            max_link_bytes: bytes in flight on each link. A lane that has nothing in flight may exceed it with one part.
        """
        self._lock = threading.Lock()  # guards all below, also what lanes, links and works hold
        self._max_link_bytes = max_link_bytes
        links = {lane.link: _Link() for lane in lanes.values()}
        self._lanes = {name: _LaneState(name, links[lane.link], self._lock) for name, lane in lanes.items()}
        self._deadlines: list[tuple[float, int, Transfer]] = []  # a heap; the number keeps equal deadlines apart
        self._deadlines_changed = threading.Condition(self._lock)
        self._num_submitted = 0
        self._num_unfinished = 0
        self._is_closing = False
        self._watcher = threading.Thread(target=self._watch_deadlines, name="kv-deadlines", daemon=True)
        self._threads = [
            threading.Thread(target=self._run_parts, args=(self._lanes[name],), name=f"kv-{name}-{i}", daemon=True)
            for name, lane in lanes.items()
            for i in range(lane.num_threads)
        ]
        for thread in (*self._threads, self._watcher):
            thread.start()

    @property
    def num_unfinished(self) -> int:
        """Transfers with parts queued or running, ended ones included."""
        return self._num_unfinished

    def submit(
        self,
        transfer: Transfer,
        parts: Mapping[str, Sequence[Part]],
        on_done: Callable[[], None],
        *,
        priority: Priority = Priority.LOAD,
        at_once: int = PARTS_AT_ONCE,
    ) -> None:
        """Runs the parts, those of a lane in order of their start, then `on_done`, and then finishes the transfer.

        If the transfer ends early, parts that have not begun never do. `on_done`, which gives back what the parts use, is
        called exactly once, on any thread, when the last one that had begun has ended. After `close` that is at once.

        Args:
            parts: by lane.
            at_once: parts of this transfer that may run at the same time in a lane.
        """
        num_parts = sum(map(len, parts.values()))
        if not num_parts:
            on_done()
            transfer.finish()
            return
        work = _Work(priority, at_once, transfer, on_done, num_parts)
        with self._lock:
            is_refused = self._is_closing
            if not is_refused:
                for name, lane_parts in parts.items():
                    self._lanes[name].add(work, lane_parts)
                self._num_submitted += 1
                self._num_unfinished += 1
                heapq.heappush(self._deadlines, (transfer.deadline, self._num_submitted, transfer))
                self._deadlines_changed.notify()
        if is_refused:
            on_done()
            transfer.cancel()
            return
        transfer.when_ended(lambda: self._discard(work))

    def line(self, lane: str, priority: Priority) -> "Line":
        """A queue for parts that belong to no transfer and run one after the other."""
        work = _Work(priority, 1, None, lambda: None, 0)

        def put(part: Part) -> bool:
            with self._lock:
                if self._is_over:
                    return False
                work.num_remaining += 1
                self._lanes[lane].add(work, (part,))
                return True

        return Line(put)

    def close(self, timeout_s: float) -> None:
        """Waits for all parts, also queued ones, for at most `timeout_s`. A thread that hangs in a read is left behind.

        Transfers that hang with it still end at their deadlines. What parts put into lines until the last of them has ended
        is run too.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._is_closing = True
            for lane in self._lanes.values():
                lane.changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        has_ended = not any(thread.is_alive() for thread in self._threads)
        with self._lock:
            if has_ended:
                self._deadlines.clear()
            self._deadlines_changed.notify_all()
        if has_ended:
            self._watcher.join(max(0.0, deadline - time.monotonic()))
        else:
            logger.error(
                "moves of KV blocks still run %g s after they were told to end; going on without them", timeout_s
            )

    @property
    def _is_over(self) -> bool:
        """Whether the threads leave: after `close`, once no lane has a part left, which might hand others on."""
        return self._is_closing and not any(lane.is_busy for lane in self._lanes.values())

    def _wake_if_over(self) -> None:
        """Lets the threads leave that wait for parts of other lanes to end. The caller holds the lock."""
        if self._is_over:
            for lane in self._lanes.values():
                lane.changed.notify_all()

    def _run_parts(self, lane: "_LaneState") -> None:
        while True:
            with self._lock:
                begun = self._begin_next(lane)
            if begun is None:
                return
            work, part = begun
            try:
                part.run()
            except Exception:  # root of a task: the part's blocks count as not arrived
                logger.exception("a part of a KV transfer failed; its blocks are computed again")
            with self._lock:
                lane.end(work, part)
                self._wake_if_over()
                work.num_remaining -= 1
                is_last = work.num_remaining == 0
            if is_last:
                self._finish(work)
            del begun, work, part  # an idle thread must not keep what a part refers to

    def _begin_next(self, lane: "_LaneState") -> "tuple[_Work, Part] | None":
        """Waits for the next part of a lane and marks it begun; None at the end. Holds the lock."""
        while True:
            now_s = time.monotonic()
            begun = lane.begin(now_s, self._max_link_bytes)
            if begun is not None:
                return begun
            if self._is_over:
                return None
            lane.changed.wait(lane.next_turn_s(now_s))

    def _discard(self, work: "_Work") -> None:
        """Takes back the parts of an ended transfer that have not begun."""
        with self._lock:
            num_dropped = sum(lane.drop(work) for lane in self._lanes.values())
            self._wake_if_over()
            work.num_remaining -= num_dropped
            is_last = num_dropped > 0 and work.num_remaining == 0
        if is_last:
            self._finish(work)

    def _finish(self, work: "_Work") -> None:
        if work.transfer is None:
            return
        work.on_done()
        with self._lock:
            self._num_unfinished -= 1
        work.transfer.finish()

    def _watch_deadlines(self) -> None:
        while True:
            with self._lock:
                if self._is_closing and not self._deadlines:
                    return
                next_s = self._deadlines[0][0] - time.monotonic() if self._deadlines else None
                if next_s is None or next_s > 0:
                    self._deadlines_changed.wait(next_s)
                    continue
                _, number, transfer = heapq.heappop(self._deadlines)
                if not transfer.is_ended and transfer.remaining_s > 0:  # it was given more time
                    heapq.heappush(self._deadlines, (transfer.deadline, number, transfer))
                    continue
            transfer.expire()
            del transfer


@dataclass(frozen=True, slots=True)
class Line:
    """Parts that run one after the other, in the order in which they were put. Made by `Mover.line`.

    Attributes:
        put: queues a part; never waits. False where the part will never run: the mover is closed, and all parts have ended.
    """

    put: Callable[[Part], bool]


@dataclass(slots=True, eq=False)
class _Work:
    """A transfer's parts, or a line's. `num_remaining` counts those that wait or run, `num_running` those by lane."""

    priority: Priority
    at_once: int
    transfer: Transfer | None
    on_done: Callable[[], None]
    num_remaining: int
    waiting: dict[str, deque[Part]] = field(default_factory=dict)
    num_running: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Link:
    """What lanes that use the same hardware know of one another.

    Attributes:
        num_parts: waiting or running, by priority.
        num_bytes: in flight.
        lanes: that use it.
    """

    num_parts: list[int] = field(default_factory=lambda: [0] * len(Priority))
    num_bytes: int = 0
    lanes: "list[_LaneState]" = field(default_factory=list)


class _LaneState:
    """Works that wait for a lane's threads. The mover's lock guards it."""

    def __init__(self, name: str, link: _Link, lock: threading.Lock) -> None:
        self.changed = threading.Condition(lock)  # notified when a part may be begun that could not be before
        self._name = name
        self._link = link
        self._works: list[deque[_Work]] = [deque() for _ in Priority]  # with waiting parts; the first has the next turn
        self._since_s = [0.0] * len(Priority)  # when the works of a priority last had a turn, or began to wait for one
        self._num_running = 0
        link.lanes.append(self)

    @property
    def has_waiting(self) -> bool:
        return any(self._works)

    @property
    def is_busy(self) -> bool:
        return self._num_running > 0 or self.has_waiting

    def add(self, work: _Work, parts: Sequence[Part]) -> None:
        if not parts:
            return
        waiting = work.waiting.setdefault(self._name, deque())
        works = self._works[work.priority]
        if not works:
            self._since_s[work.priority] = time.monotonic()
        if not waiting:
            works.append(work)
        waiting.extend(parts)
        self._link.num_parts[work.priority] += len(parts)
        self.changed.notify(len(parts))

    def begin(self, now_s: float, max_link_bytes: int) -> tuple[_Work, Part] | None:
        """The next part, marked as begun; None if there is none, or none may begin now."""
        for priority in self._order(now_s)[0]:
            works = self._works[priority]
            work = next((work for work in works if work.num_running.get(self._name, 0) < work.at_once), None)
            if work is None:
                continue
            waiting = work.waiting[self._name]
            if self._num_running and self._link.num_bytes + waiting[0].num_bytes > max_link_bytes:
                return None  # and nothing less urgent takes the bytes that this one waits for
            part = waiting.popleft()
            works.remove(work)
            if waiting:
                works.append(work)
            work.num_running[self._name] = work.num_running.get(self._name, 0) + 1
            self._num_running += 1
            self._link.num_bytes += part.num_bytes
            self._since_s[priority] = now_s
            return work, part
        return None

    def end(self, work: _Work, part: Part) -> None:
        """Marks a part as ended, and wakes whoever may begin another."""
        work.num_running[self._name] -= 1
        self._num_running -= 1
        self._link.num_bytes -= part.num_bytes
        self._link.num_parts[work.priority] -= 1
        for lane in self._link.lanes:
            if lane.has_waiting:
                lane.changed.notify_all()

    def drop(self, work: _Work) -> int:
        """Takes a work's waiting parts back; returns how many there were."""
        waiting = work.waiting.pop(self._name, None)
        if not waiting:
            return 0
        self._works[work.priority].remove(work)
        self._link.num_parts[work.priority] -= len(waiting)
        for lane in self._link.lanes:
            lane.changed.notify_all()
        return len(waiting)

    def next_turn_s(self, now_s: float) -> float | None:
        """Seconds until a part that gives way has its turn, even if no other part ends before; None if none gives way."""
        return self._order(now_s)[1]

    def _order(self, now_s: float) -> tuple[list[int], float | None]:
        """Priorities that may have a turn, the first in line first; and in how many seconds another one joins them."""
        first_in_line: list[int] = []
        overdue: list[int] = []
        next_s = None
        num_urgent = 0
        for priority, works in enumerate(self._works):
            if works and not num_urgent:
                first_in_line.append(priority)
            elif works:
                patience_s = self._since_s[priority] + GIVE_WAY_S - now_s
                if patience_s <= 0:
                    overdue.append(priority)
                else:
                    next_s = patience_s if next_s is None else min(next_s, patience_s)
            num_urgent += self._link.num_parts[priority]
        return overdue + first_in_line, next_s
