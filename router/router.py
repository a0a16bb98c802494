"""Chooses a worker for each request, and keeps the books of what was sent where. Loads no torch.

    RouteQuery ─► eligible workers ─► PrefixChain ─► PrefixIndex.match ─► CostModel ─► Choice ─► Decision
                  (pins, drained,                    (who holds how           │
                   set aside, busy)                   much, in which tier)    └─► WorkerLoad ─► Booking
"""

import logging
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dynamo.kvcache.hashing import HASH_VERSION, chain_root
from dynamo.router.affinity import SessionTable
from dynamo.router.booking import Booking
from dynamo.router.chain import PrefixChain
from dynamo.router.choice import Choice
from dynamo.router.config import RouterConfig
from dynamo.router.cost import CostModel, Member
from dynamo.router.decision import CandidateCost, Decision, Overhead, RouteQuery
from dynamo.router.errors import (
    AllBusyError,
    IncompatibleWorkerError,
    NoWorkersError,
    PinnedWorkerBusyError,
    PinnedWorkerError,
    RouteError,
    UnknownWorkerError,
)
from dynamo.router.index import PrefixIndex
from dynamo.router.load import Entry, PriorSpeeds, WorkerLoad, mark_stride
from dynamo.router.reach import Reach
from dynamo.router.stats import RouterMeter, RouterStats, WorkerStats
from dynamo.router.workers import LoadEvent, LoadReport, WorkerCard

__all__ = ["Booking", "CandidateCost", "Decision", "RouteQuery", "Router"]

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_EXPIRY_CHECK_S = 10.0
_SWEEP_ENTRIES = 4096
_MAX_ROOTS = 4096
_MAX_MARKS = 4096
_PRIOR_TOKENS_PER_S = 10_000.0
_TIERS_LOADED = ("host", "disk", "remote")

_Group = tuple[str, int]
"""Fingerprint and block size: members of one group give equal blocks equal keys."""


@dataclass(frozen=True, slots=True)
class _Lookup:
    """What the index says of a prompt. `chains` by group; both are empty where prefixes do not count."""

    chains: Mapping[_Group, PrefixChain]
    reaches: Mapping[int, Reach]


_NO_LOOKUP = _Lookup({}, {})


class Router:
    """Members, their load, and the choice. Not thread-safe: it belongs to one event loop or thread.

    Attributes:
        config: its settings.
        index: which worker holds which prefix. Feeds of events write to it; the slot comes from `join`.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.index = PrefixIndex()
        self._clock = clock
        self._rng = rng or random.Random()
        self._explaining_rng = random.Random()  # explaining leaves the other one's sequence as it is
        self._members: dict[str, Member] = {}
        self._ready: list[Member] = []  # neither draining nor set aside; those set aside where there is no other
        self._ready_until_s = 0.0
        self._num_busy = 0
        self._shortest_len = 0  # of the members' max_model_len; 0 if none says
        self._groups: list[_Group] = []
        self._roots: dict[tuple[str, int, str, str], int] = {}
        self._sessions = SessionTable(config.session_ttl_s, config.max_sessions)
        self._model = CostModel(config)
        self._choice = Choice(config, self._model, self._sessions)
        self._meter = RouterMeter()
        self._listeners: list[Callable[[], None]] = []
        self._serial = self._turn = 0
        self._tick_at_s = self._expiry_at_s = 0.0
        self._priors = PriorSpeeds(prefill_tokens_per_s=_PRIOR_TOKENS_PER_S, load_blocks_per_s={})

    # --- members

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """All members, in the order they joined."""
        return tuple(self._members)

    def join(self, card: WorkerCard) -> int:
        """Takes a worker in. One that is a member with another epoch is replaced: its blocks and load are gone at once.

        A member that joins again with the same epoch keeps both, and takes requests again if it was draining or set aside.

        Returns:
            Its slot in the index.

        Raises:
            IncompatibleWorkerError: the card cannot be routed to.
        """
        _check(card)
        member = self._members.get(card.worker_id)
        if member is not None and member.load.card == card:
            member.is_draining = False
            member.aside_until_s = 0.0
            self._regroup()
            return member.slot
        if member is not None:
            logger.info("worker %s came back as epoch %d; it starts empty", card.worker_id, card.epoch)
            self.leave(card.worker_id)
        member = Member(self.index.join(), WorkerLoad(card, self._priors), self._turn)
        self._members[card.worker_id] = member
        self._regroup()
        self._refresh(member, self._clock())
        self._tell()
        return member.slot

    def leave(self, worker_id: str) -> bool:
        """The worker is gone, with its blocks and its load. Returns whether it was a member."""
        member = self._members.pop(worker_id, None)
        if member is None:
            return False
        self._num_busy -= member.is_busy
        self.index.leave(member.slot)
        self._regroup()
        return True

    def report(self, worker_id: str, report: LoadReport) -> None:
        """A worker says how it is. Reports of those that left are ignored."""
        member = self._members.get(worker_id)
        if member is None:
            return
        now_s = self._clock()
        member.load.report(report, now_s)
        member.load.assume(self._priors)
        self._refresh(member, now_s)
        self._tell()

    def foreign_load(self, worker_id: str, event: LoadEvent) -> None:
        """A worker says what another front sent it. This front's own requests, and workers that left, are ignored."""
        member = self._members.get(worker_id)
        if member is not None and event.front_id != self.config.front_id and member.load.foreign(event, self._clock()):
            self._changed(member)

    def set_aside(self, worker_id: str) -> None:
        """The worker failed a request: others are preferred for a time. Does nothing if it left."""
        member = self._members.get(worker_id)
        if member is not None:
            member.aside_until_s = self._clock() + self.config.set_aside_s
            self._meter.num_set_aside += 1
            self._regroup()

    def drain(self, worker_id: str) -> None:
        """The worker gets no new requests; those it has go on.

        Raises:
            UnknownWorkerError: it is no member.
        """
        member = self._members.get(worker_id)
        if member is None:
            raise UnknownWorkerError(worker_id)
        member.is_draining = True
        self._regroup()

    def when_room(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever a worker may have got room. It must not raise, and should be quick."""
        self._listeners.append(listener)

    # --- requests

    def route(self, query: RouteQuery) -> tuple[Decision, Booking]:
        """Chooses a worker and books the request there.

        Raises:
            RouteError: no worker can be had; which of the errors says why. Nothing was booked.
        """
        now_s = self._clock()
        if now_s >= self._tick_at_s:
            self.tick()
        begun_s = time.perf_counter()
        try:
            members = self._eligible(query, now_s)
        except RouteError as error:
            self._meter.failures[type(error).__name__] += 1
            raise
        looking_s = time.perf_counter()
        lookup = self._look_up(query, now_s)
        choosing_s = time.perf_counter()
        member, reason = self._choice.choose(query, members, lookup.reaches, now_s, self._rng)
        chosen = self._model.candidate(member, lookup.reaches.get(member.slot), query.num_tokens, now_s)
        telling_s = time.perf_counter()
        self._predict(member, lookup, chosen, now_s)
        booking_s = time.perf_counter()
        booking = self._book(query, member, lookup, chosen, now_s)
        hash_s = sum(chain.hash_s for chain in lookup.chains.values())
        looked_s = choosing_s - looking_s + booking_s - telling_s
        decision = self._decision(
            query,
            members,
            lookup,
            chosen,
            reason,
            Overhead(
                hash_s=hash_s,
                lookup_s=max(0.0, looked_s - hash_s),
                choice_s=time.perf_counter() - begun_s - looked_s,
            ),
        )
        self._meter.decided(decision)
        return decision, booking

    def explain(self, query: RouteQuery) -> Decision:
        """What `route` would answer now, with the cost at every worker. Books nothing and changes nothing.

        Raises:
            RouteError: as `route`.
        """
        now_s = self._clock()
        begun_s = time.perf_counter()
        members = self._eligible(query, now_s)
        looking_s = time.perf_counter()
        lookup = self._look_up(query, now_s)
        choosing_s = time.perf_counter()
        member, reason = self._choice.choose(query, members, lookup.reaches, now_s, self._explaining_rng)
        may_take = {id(one) for one in members}
        candidates = [
            self._model.candidate(
                one,
                lookup.reaches.get(one.slot),
                query.num_tokens,
                now_s,
                None if id(one) in may_take else self._refusal(one, query, now_s),
            )
            for one in self._members.values()
        ]
        candidates.sort(key=lambda one: (one.refused is not None, one.cost_s))
        chosen = next(one for one in candidates if one.worker_id == member.worker_id)
        hash_s = sum(chain.hash_s for chain in lookup.chains.values())
        overhead = Overhead(
            hash_s=hash_s,
            lookup_s=max(0.0, choosing_s - looking_s - hash_s),
            choice_s=time.perf_counter() - choosing_s + looking_s - begun_s,
        )
        return self._decision(query, members, lookup, chosen, reason, overhead, tuple(candidates))

    def has_room(self, query: RouteQuery) -> bool:
        """Whether `route` would find a worker now, as far as busy thresholds go; cheaper than trying."""
        try:
            self._eligible(query, self._clock())
        except AllBusyError:
            return False
        except RouteError:
            return True  # let `route` say what is wrong
        return True

    def tick(self) -> None:
        """Lets time pass: reports fade, those set aside return, what expired goes. `route` calls it twice a second."""
        now_s = self._clock()
        self._tick_at_s = now_s + _TICK_S
        self._priors = _priors(member.load.last_report for member in self._members.values())
        if now_s >= self._expiry_at_s:
            self._expiry_at_s = now_s + _EXPIRY_CHECK_S
            self._expire(now_s)
        for member in self._members.values():
            member.load.assume(self._priors)
            self._refresh(member, now_s)
        self._sessions.expire(now_s)
        self.index.sweep(now_s, _SWEEP_ENTRIES)
        if now_s >= self._ready_until_s:
            self._regroup()
        self._tell()

    def stats(self) -> RouterStats:
        """Counts since the start, and what is there now."""
        now_s = self._clock()
        meter = self._meter
        loads = [member.load for member in self._members.values()]
        return RouterStats(
            decisions=dict(meter.decisions),
            failures=dict(meter.failures),
            hash_s=meter.hash_s.distribution(),
            lookup_s=meter.lookup_s.distribution(),
            choice_s=meter.choice_s.distribution(),
            total_s=meter.total_s.distribution(),
            prompt_tokens=meter.prompt_tokens,
            predicted_cached_tokens=meter.predicted_cached_tokens,
            best_cached_tokens=meter.best_cached_tokens,
            reported_tokens=meter.reported_tokens,
            actual_cached_tokens=meter.actual_cached_tokens,
            reported_predicted_tokens=meter.reported_predicted_tokens,
            num_set_aside=meter.num_set_aside,
            num_expired=meter.num_expired,
            num_bookings=sum(load.num_booked - load.num_foreign for load in loads),
            num_sessions=len(self._sessions),
            index=self.index.stats(),
            workers=tuple(_worker_stats(member, now_s) for member in self._members.values()),
        )

    def check_invariants(self) -> None:
        """Counts everything anew.

        Raises:
            AssertionError: the books contradict themselves.
        """
        for member in self._members.values():
            member.load.check_invariants()
        assert self._num_busy == sum(member.is_busy for member in self._members.values())
        assert set(self._ready) <= set(self._members.values())
        assert not any(member.is_draining for member in self._ready)
        self.index.check_invariants()
