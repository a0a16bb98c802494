"""Chooses a worker for each request, and keeps the books of what was sent where. Loads no torch.

RouteQuery ─► Roster.eligible ─► PromptLookup ─► CostModel, Choice ─► Decision
              (pins, drained,    (PrefixChain,                  │
               set aside, busy)   PrefixIndex.match)            └───► WorkerLoad ─► Booking
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dynamo.router.affinity import SessionTable
from dynamo.router.balance import RecentWork
from dynamo.router.booking import Booking
from dynamo.router.choice import Choice
from dynamo.router.config import RouterConfig
from dynamo.router.cost import CostModel
from dynamo.router.decision import CandidateCost, Decision, Overhead, RouteQuery
from dynamo.router.errors import (
    AllBusyError,
    PinnedWorkerError,
    RouteError,
    UnknownWorkerError,
)
from dynamo.router.index import PrefixIndex
from dynamo.router.load import Entry, WorkerLoad, mark_stride, prior_speeds
from dynamo.router.lookup import NO_LOOKUP, Lookup, PromptLookup, group_of
from dynamo.router.roster import Member, Roster
from dynamo.router.stats import RouterMeter, RouterStats
from dynamo.router.workers import LoadEvent, LoadReport, WorkerCard, check_card

__all__ = ["Booking", "CandidateCost", "Decision", "RouteQuery", "Router"]

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_EXPIRY_CHECK_S = 10.0
_SWEEP_ENTRIES = 4096
_MAX_MARKS = 4096


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
        self._roster = Roster(config, clock())
        self._lookup = PromptLookup(self.index)
        self._sessions = SessionTable(config.session_ttl_s, config.max_sessions)
        self._model = CostModel(config)
        self._choice = Choice(config, self._model, self._sessions)
        self._recent = RecentWork(config.balance_weight, clock())
        self._meter = RouterMeter()
        self._listeners: list[Callable[[], None]] = []
        self._num_booked = 0
        self._tick_at_s = self._expiry_at_s = clock()
        self._priors = prior_speeds(())

    # --- members

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """All members, in the order they joined."""
        return self._roster.worker_ids

    @property
    def settled_s(self) -> float:
        """How long ago a worker left last, or this router began: one that leaves may be about to come back."""
        return self._clock() - self._roster.left_s

    def join(self, card: WorkerCard) -> int:
        """Takes a worker in. One that is a member with another card is replaced: its blocks and load are gone at once.

        A member that joins again with the same card keeps both, and takes requests again if it was draining or set aside.

        Returns:
            Its slot in the index.

        Raises:
            IncompatibleWorkerError: the card cannot be routed to; a member of that name stays as it was.
        """
        check_card(card)
        now_s = self._clock()
        member = self._roster.find(card.worker_id)
        if member is not None and member.load.card == card:
            member.is_draining = False
            member.aside_until_s = 0.0
            self._roster.regroup(now_s)
        else:
            if self.leave(card.worker_id):
                logger.info("worker %s joined anew, epoch %d; it counts as empty", card.worker_id, card.epoch)
            member = Member(self.index.join(), WorkerLoad(card, self._priors), self._num_booked)
            self._roster.add(member, now_s)
            self._regroup()
            self._refresh(member, now_s)
        self._tell()
        return member.slot

    def leave(self, worker_id: str) -> bool:
        """The worker is gone, with its blocks and its load. Returns whether it was a member."""
        member = self._roster.remove(worker_id, self._clock())
        if member is None:
            return False
        self._recent.forget(member)
        self.index.leave(member.slot)
        self._regroup()
        return True

    def report(self, worker_id: str, report: LoadReport) -> None:
        """A worker says how it is. What one says that left is ignored."""
        member = self._roster.find(worker_id)
        if member is not None:
            now_s = self._clock()
            member.load.report(report, now_s)
            member.load.assume(self._priors)
            self._refresh(member, now_s)
            self._tell()

    def foreign_load(self, worker_id: str, event: LoadEvent) -> None:
        """A worker says what another front sent it. This front's own requests, and workers that left, are ignored."""
        member = self._roster.find(worker_id)
        if member is not None and event.front_id != self.config.front_id and member.load.foreign(event, self._clock()):
            self._changed(member)

    def set_aside(self, worker_id: str) -> None:
        """The worker failed a request: others are preferred for a time. Does nothing if it left."""
        member = self._roster.find(worker_id)
        if member is not None:
            now_s = self._clock()
            member.aside_until_s = now_s + self.config.set_aside_s
            self._meter.num_set_aside += 1
            self._roster.regroup(now_s)

    def drain(self, worker_id: str) -> None:
        """The worker gets no new requests; those it has go on.

        Raises:
            UnknownWorkerError: it is no member.
        """
        member = self._roster.find(worker_id)
        if member is None:
            raise UnknownWorkerError(worker_id)
        member.is_draining = True
        self._roster.regroup(self._clock())

    def when_room(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever a worker may have got room. It must neither raise nor take long."""
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
        try:
            draft = self._draft(query, now_s, self._rng, self._roster.eligible)
        except RouteError as error:
            self._meter.failures[type(error).__name__] += 1
            raise
        chosen = self._candidate(draft, draft.member, query, now_s)
        telling_s = time.perf_counter()
        self._predict(draft, chosen, now_s)
        draft.looked_s += time.perf_counter() - telling_s
        booking = self._book(draft, query, chosen, now_s)
        decision = self._decision(draft, query, chosen)
        self._meter.decided(decision)
        return decision, booking

    def explain(self, query: RouteQuery) -> Decision:
        """What `route` would answer now, with the cost at every worker. Books nothing and changes nothing.

        Where all that may take the request are busy, the reason is "busy", and the worker the one it would get if it were
        not.

        Raises:
            NoWorkersError, PinnedWorkerError: as `route`.
        """
        now_s = self._clock()
        try:
            draft = self._draft(query, now_s, self._explaining_rng, self._roster.eligible)
            may_take = set(map(id, draft.members))
        except AllBusyError:
            draft = self._draft(query, now_s, self._explaining_rng, self._roster.taking)
            draft.reason = "busy"
            may_take = set()
        candidates = [
            self._candidate(
                draft, one, query, now_s, None if id(one) in may_take else self._roster.refusal(one, query, now_s)
            )
            for one in self._roster
        ]
        candidates.sort(key=lambda one: (one.refused is not None, one.cost_s))
        chosen = next(one for one in candidates if one.worker_id == draft.member.worker_id)
        return self._decision(draft, query, chosen, tuple(candidates))

    def has_room(self, query: RouteQuery) -> bool:
        """Whether the busy thresholds let the request through now; cheaper than trying to route it."""
        try:
            self._roster.eligible(query, self._clock())
        except AllBusyError:
            return False
        except RouteError:
            return True  # `route` says what is wrong
        return True

    def tick(self) -> None:
        """Lets time pass: reports fade, what expired goes. `route` calls it twice a second; an idle owner may as well."""
        now_s = self._clock()
        self._tick_at_s = now_s + _TICK_S
        self._priors = prior_speeds(member.load.last_report for member in self._roster)
        if now_s >= self._expiry_at_s:
            self._expiry_at_s = now_s + _EXPIRY_CHECK_S
            self._expire(now_s)
        for member in self._roster:
            member.load.assume(self._priors)
            self._refresh(member, now_s)
        self._recent.rescale(list(self._roster), now_s)
        self._sessions.expire(now_s)
        self.index.sweep(now_s, _SWEEP_ENTRIES)
        self._tell()

    def stats(self) -> RouterStats:
        """Counts since the start, and what is there now."""
        now_s = self._clock()
        members = list(self._roster)
        return self._meter.stats(
            num_bookings=sum(member.load.num_booked - member.load.num_foreign for member in members),
            num_sessions=len(self._sessions),
            index=self.index.stats(),
            workers=tuple(member.stats(now_s) for member in members),
        )

    def check_invariants(self) -> None:
        """Counts everything anew.

        Raises:
            AssertionError: the books contradict themselves.
        """
        self._roster.check_invariants()
        self.index.check_invariants()

    # --- steps of a decision

    def _draft(
        self,
        query: RouteQuery,
        now_s: float,
        rng: random.Random,
        find: Callable[[RouteQuery, float], Sequence[Member]],
    ) -> "_Draft":
        """The choice among the members that `find` finds, without any consequence but the random numbers drawn."""
        begun_s = time.perf_counter()
        if self.config.mode == "direct" and query.pin is None:
            raise PinnedWorkerError(
                "the router is in direct mode, in which every request names its worker; name one, or choose another mode",
                None,
            )
        members = find(query, now_s)
        looking_s = time.perf_counter()
        lookup = self._lookup.ask(query, now_s) if self.config.mode == "kv" else NO_LOOKUP
        looked_s = time.perf_counter() - looking_s
        price = self._recent.price(len(self._roster), now_s)
        member, reason = self._choice.choose(query, members, lookup.reaches, price, now_s, rng)
        return _Draft(members, lookup, member, reason, price, begun_s, looked_s)

    def _candidate(
        self, draft: "_Draft", member: Member, query: RouteQuery, now_s: float, refused: str | None = None
    ) -> CandidateCost:
        reach = draft.lookup.reaches.get(member.slot)
        return self._model.candidate(member, reach, query.num_tokens, draft.price, now_s, refused)

    def _predict(self, draft: "_Draft", chosen: CandidateCost, now_s: float) -> None:
        """Counts the prompt as present where it goes, so that what follows it closely goes there too."""
        card = draft.member.load.card
        chain = draft.lookup.chains.get(group_of(card))
        ttl_s = self.config.prediction_ttl_s if card.has_events else self.config.approximate_ttl_s
        if chain is None or not ttl_s or (card.has_events and chosen.reach.device == chain.num_blocks):
            return
        self.index.predict(draft.member.slot, chain.keys(chain.num_blocks), now_s + ttl_s)
        self.index.sweep(now_s, 2 * chain.num_blocks)  # so that forgetting keeps up without ever taking long

    def _book(self, draft: "_Draft", query: RouteQuery, chosen: CandidateCost, now_s: float) -> Booking:
        member = draft.member
        load, num_tokens = member.load, query.num_tokens
        expected_blocks = (query.expected_output_tokens or 0) // load.block_size
        own_blocks = -(-num_tokens // load.block_size) + expected_blocks
        marks: Sequence[int] = ()
        chain = draft.lookup.chains.get(group_of(load.card))
        if chain is not None:
            stride = mark_stride(load.block_size)
            num_marks = min(chain.num_blocks // stride, _MAX_MARKS)
            marks = chain.keys(num_marks * stride)[stride - 1 :: stride]
            own_blocks -= num_marks * stride
        self._num_booked += 1
        key = (self._num_booked, query.request_id)
        entry = Entry(
            prefill_tokens=num_tokens - chosen.cached_tokens,
            own_blocks=own_blocks,
            added_s=now_s,
            marks=marks,
            output_blocks=expected_blocks,
        )
        load.add(key, entry)
        self._recent.add(member, chosen.compute_s, now_s)
        member.turn = self._num_booked
        member.num_chosen += 1
        if query.session is not None and self.config.affinity != "off":
            self._sessions.bind(query.session, member.worker_id, now_s)
        self._refresh(member, now_s)
        found = partial(self._meter.found, num_tokens, chosen.cached_tokens)
        return Booking(member, key, clock=self._clock, changed=self._changed, found=found)

    def _decision(
        self, draft: "_Draft", query: RouteQuery, chosen: CandidateCost, candidates: tuple[CandidateCost, ...] = ()
    ) -> Decision:
        block_size = draft.member.load.block_size
        longest = max((reach.remote for reach in draft.lookup.reaches.values()), default=0) * block_size
        whole_blocks = (query.num_tokens - 1) // block_size * block_size
        hash_s = draft.lookup.hash_s
        return Decision(
            worker_id=chosen.worker_id,
            mode=self.config.mode,
            reason=draft.reason,
            chosen=chosen,
            best_cached_tokens=max(chosen.cached_tokens, min(longest, whole_blocks)),
            num_tokens=query.num_tokens,
            num_candidates=len(draft.members),
            overhead=Overhead(
                hash_s=hash_s,
                lookup_s=max(0.0, draft.looked_s - hash_s),
                choice_s=time.perf_counter() - draft.begun_s - draft.looked_s,
            ),
            candidates=candidates,
        )

    # --- consequences of what changed

    def _refresh(self, member: Member, now_s: float) -> None:
        member.load.refresh(now_s)
        self._roster.refresh(member, now_s, self._model.base_s(member.load))

    def _changed(self, member: Member) -> None:
        """A request moved on or ended at a member, or at one that has left."""
        self._refresh(member, self._clock())
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _regroup(self) -> None:
        self._lookup.regroup(member.load.card for member in self._roster)

    def _expire(self, now_s: float) -> None:
        for member in self._roster:
            own, num_foreign = member.load.expire(now_s - self.config.booking_expiry_s, now_s)
            self._meter.num_expired += len(own) + num_foreign
            if own:
                logger.warning(
                    "released %d bookings at worker %s, of which nothing was heard for %.0f s: whoever routed request %r and "
                    "the others did not free them",
                    len(own),
                    member.worker_id,
                    self.config.booking_expiry_s,
                    own[0],
                )
            if num_foreign:
                logger.info(
                    "released %d requests of other fronts at worker %s: their end was lost",
                    num_foreign,
                    member.worker_id,
                )


@dataclass(slots=True)
class _Draft:
    """A choice before its consequences. `looked_s` was spent on the index since `begun_s`."""

    members: Sequence[Member]
    lookup: Lookup
    member: Member
    reason: str
    price: tuple[float, float, float]
    begun_s: float
    looked_s: float
