"""The workers, and which of them may take a request."""

from collections.abc import Iterable, Iterator

from dynamo.router.config import RouterConfig
from dynamo.router.decision import RouteQuery
from dynamo.router.errors import AllBusyError, NoWorkersError, PinnedWorkerBusyError, PinnedWorkerError
from dynamo.router.load import WorkerLoad
from dynamo.router.stats import WorkerStats

__all__ = ["Member", "Roster"]


class Member:
    """A worker as the choice sees it. Changed by Router and Roster alone.

    Attributes:
        slot: in the index.
        load: its books.
        base_s: what a request without a prompt would cost there, without what was computed since; this and what follows is as
            of the last refresh, and copied from `load` for the sake of the innermost loop.
        token_s: seconds to compute a prompt token.
        oldest_s: how long computing the oldest prompt takes; 0 if there is none to compute.
        anchor_s: when that began.
        is_busy: above the busy thresholds.
        is_draining: takes no new requests.
        aside_until_s: takes none before, while there are others.
        recent: computing that it was given lately; kept by RecentWork.
        turn: number of its last turn in round-robin.
        num_chosen: requests sent there.
    """

    __slots__ = (
        "anchor_s",
        "aside_until_s",
        "base_s",
        "is_busy",
        "is_draining",
        "load",
        "num_chosen",
        "oldest_s",
        "recent",
        "slot",
        "token_s",
        "turn",
        "worker_id",
    )

    def __init__(self, slot: int, load: WorkerLoad, turn: int) -> None:
        self.worker_id = load.card.worker_id
        self.slot = slot
        self.load = load
        self.base_s = self.oldest_s = self.anchor_s = self.recent = 0.0
        self.token_s = load.token_s
        self.is_busy = False
        self.is_draining = False
        self.aside_until_s = 0.0
        self.turn = turn
        self.num_chosen = 0

    def stats(self, now_s: float) -> WorkerStats:
        """It as an operator sees it."""
        load = self.load
        return WorkerStats(
            worker_id=self.worker_id,
            slot=self.slot,
            num_requests=load.num_requests,
            num_foreign=load.num_foreign,
            prefill_tokens=load.prefill_tokens,
            held_blocks=load.held_blocks,
            queue_s=max(0.0, load.queue_s - min(now_s - load.anchor_s, load.oldest_s)),
            report_age_s=load.report_age_s(now_s),
            is_draining=self.is_draining,
            is_set_aside=self.aside_until_s > now_s,
            is_busy=self.is_busy,
            num_chosen=self.num_chosen,
        )


class Roster:
    """All members by name. Not thread-safe: it belongs to its Router.

    Attributes:
        left_s: when a member left last; before, when the roster was made.
    """

    def __init__(self, config: RouterConfig, now_s: float) -> None:
        self.left_s = now_s
        self._config = config
        self._members: dict[str, Member] = {}
        self._ready: list[Member] = []  # whom a request without wishes may be sent to, unless busy
        self._ready_until_s = 0.0
        self._num_busy = 0
        self._shortest_len = 0  # of the members' max_model_len; 0 if none says

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """In the order they joined."""
        return tuple(self._members)

    def find(self, worker_id: str) -> Member | None:
        """The member of that name."""
        return self._members.get(worker_id)

    def add(self, member: Member, now_s: float) -> None:
        """Takes a worker in, under a name that is free."""
        self._members[member.worker_id] = member
        self._num_busy += member.is_busy
        self.regroup(now_s)

    def remove(self, worker_id: str, now_s: float) -> Member | None:
        """Lets a worker go; returns it if it was there."""
        member = self._members.pop(worker_id, None)
        if member is not None:
            self._num_busy -= member.is_busy
            self.left_s = now_s
            self.regroup(now_s)
        return member

    def regroup(self, now_s: float) -> None:
        """Sees anew who is ready, after somebody began to drain or was set aside."""
        taking = [member for member in self._members.values() if not member.is_draining]
        near = [member for member in taking if member.aside_until_s <= now_s]
        self._ready = near or taking
        returns = [member.aside_until_s for member in taking if member.aside_until_s > now_s]
        self._ready_until_s = min(returns, default=float("inf"))
        lengths = [member.load.card.max_model_len for member in taking if member.load.card.max_model_len]
        self._shortest_len = min(lengths, default=0)

    def refresh(self, member: Member, now_s: float, base_s: float) -> None:
        """Takes over what changed in a member's load; `base_s` as in Member."""
        config, load = self._config, member.load
        done_s = min(now_s - load.anchor_s, load.oldest_s)
        running, capacity = load.card.max_running, load.capacity_blocks
        was_busy = member.is_busy
        member.base_s = base_s
        member.token_s, member.oldest_s, member.anchor_s = load.token_s, load.oldest_s, load.anchor_s
        member.is_busy = bool(
            (config.busy_requests and running and load.num_requests >= config.busy_requests * running)
            or (config.busy_queue_s and load.queue_s - done_s > config.busy_queue_s)
            or (config.busy_blocks and capacity and load.held_blocks > config.busy_blocks * capacity)
        )
        if member.is_busy != was_busy and self._members.get(member.worker_id) is member:
            self._num_busy += 1 if member.is_busy else -1

    def eligible(self, query: RouteQuery, now_s: float) -> list[Member]:
        """Members that may take the request now, at least one. The list is not the caller's to change.

        Raises:
            RouteError: there is none; nothing was changed.
        """
        if now_s >= self._ready_until_s:
            self.regroup(now_s)
        has_no_wishes = query.pin is None and query.allowed is None and not query.exclude
        if has_no_wishes and not self._num_busy and self._ready and self._fits_all(query):
            return self._ready
        near = self.taking(query, now_s)
        free = [member for member in near if not member.is_busy]
        if free:
            return free
        if query.pin is not None:
            raise PinnedWorkerBusyError(f"worker {query.pin!r}, to which the request is pinned, is busy", query.pin)
        raise AllBusyError(f"all {len(near)} workers that may take the request are busy")

    def taking(self, query: RouteQuery, now_s: float) -> list[Member]:
        """Members that may take the request now or once they are not busy any more, at least one.

        Raises:
            NoWorkersError, PinnedWorkerError: there is none.
        """
        asked: Iterable[Member] = self._members.values()
        if query.pin is not None:
            asked = [self._members[query.pin]] if query.pin in self._members else ()
        taking = [member for member in asked if self._refusal(member, query) is None]
        if not taking:
            raise self._nobody(query)
        return [member for member in taking if member.aside_until_s <= now_s] or taking

    def refusal(self, member: Member, query: RouteQuery, now_s: float) -> str | None:
        """Why a member may not take the request; None if it may."""
        refused = self._refusal(member, query)
        if refused is None and member.is_busy:
            refused = "busy"
        if refused is None and member.aside_until_s > now_s:
            refused = "set aside after a failure"
        return refused

    def check_invariants(self) -> None:
        """Counts anew.

        Raises:
            AssertionError: something does not add up.
        """
        members = list(self._members.values())
        assert self._num_busy == sum(member.is_busy for member in members)
        assert all(member in members and not member.is_draining for member in self._ready)
        assert bool(self._ready) == any(not member.is_draining for member in members)
        for member in members:
            member.load.check_invariants()

    def _fits_all(self, query: RouteQuery) -> bool:
        return not self._shortest_len or query.num_tokens < self._shortest_len

    def _refusal(self, member: Member, query: RouteQuery) -> str | None:
        worker_id, max_len = member.worker_id, member.load.card.max_model_len
        if query.pin is not None and worker_id != query.pin:
            return f"the request is pinned to {query.pin}"
        if worker_id in query.exclude:
            return "excluded by the request"
        if query.allowed is not None and worker_id not in query.allowed:
            return "not among those that the request allows"
        if member.is_draining:
            return "draining"
        if max_len and query.num_tokens >= max_len:
            return f"its longest context is {max_len} tokens"
        return None

    def _nobody(self, query: RouteQuery) -> NoWorkersError | PinnedWorkerError:
        if query.pin is not None:
            member = self._members.get(query.pin)
            reason = "there is no such worker" if member is None else self._refusal(member, query)
            return PinnedWorkerError(f"the request is pinned to worker {query.pin!r}: {reason}", query.pin)
        if not self._members:
            return NoWorkersError("no worker is there")
        return NoWorkersError("no worker may take the request: " + _listed(self._reasons(query)))

    def _reasons(self, query: RouteQuery) -> Iterable[tuple[str, str]]:
        for member in self._members.values():
            yield member.worker_id, self._refusal(member, query) or ""


def _listed(reasons: Iterable[tuple[str, str]], most: int = 8) -> str:
    shown = [f"{worker_id} ({reason})" for worker_id, reason in reasons]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
