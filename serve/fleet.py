"""All workers of a front: who is there, the ways to them, and the router kept up to date about each."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import Final

import zmq

from dynamo.router.errors import UnknownWorkerError
from dynamo.router.router import Router
from dynamo.router.subscriber import SubscriberStats
from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.serve.discovery import Discovery, Joined, Left
from dynamo.serve.engine.request import EngineStats
from dynamo.serve.errors import WorkerLostError
from dynamo.serve.external_member import ExternalMember, ExternalServer
from dynamo.serve.members import Member, RegisteredMember
from dynamo.serve.plane.link import WorkerLink
from dynamo.serve.stay import FleetTimes, Surroundings

__all__ = ["Fleet", "MemberStats"]

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.5
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0
_GAUGES: Final = ("num_running", "num_waiting")
_COUNTERS: Final = tuple(field.name for field in fields(EngineStats) if field.name not in _GAUGES)
_MAX_REMEMBERED: Final = 1024  # incarnations whose counters are kept apart


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStats:
    """How one worker is.

    Attributes:
        epoch: its incarnation; 0 before it was reached.
        is_ready: it is in the router and its blocks are known, or have taken too long.
        report: what it said last; None for nothing.
        feed: how its events come; None where there are none.
    """

    worker_id: str
    epoch: int
    is_ready: bool
    report: LoadReport | None
    feed: SubscriberStats | None


class Fleet:
    """Finds workers, connects to them and keeps the router's picture of them. Owns the connections, not the router.

    A worker gets requests once its session is up and its blocks are known. One whose session breaks is out of the router
    before its requests hear of it, and comes back, with its blocks fetched anew, as soon as it can be reached again while it
    is registered. One that takes its registration back gets nothing new, and ends what it has.

    Belongs to the event loop that runs `start`.

    Args:
        discovery: where workers of ours are found; None: there are none.
        model: the name under which they are served; workers of another model are refused.
        external: servers of another make.
    """

    def __init__(
        self,
        discovery: Discovery | None,
        router: Router,
        *,
        model: str,
        external: Sequence[ExternalServer] = (),
        times: FleetTimes | None = None,
    ) -> None:
        self._discovery = discovery
        self._router = router
        self._model = model
        self._external = tuple(external)
        self._times = times or FleetTimes()
        self._members: dict[str, Member] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._departing: dict[asyncio.Task[None], tuple[Member, asyncio.Task[None]]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._around: Surroundings | None = None
        self._counters: dict[tuple[str, int], dict[str, int]] = {}
        self._forgotten: Counter[str] = Counter()

    async def start(self) -> None:
        """Begins to look for workers; does not wait for any. Once only."""
        self._around = Surroundings(self._router, self._model, self._times, _zmq_context(), self._changed.set)
        for server in self._external:
            self._add(ExternalMember(server, self._around))
        self._ticking = asyncio.create_task(self._tick())
        if self._discovery is not None:
            self._watching = asyncio.create_task(self._watch(self._discovery))

    async def wait_ready(self, timeout_s: float, num_workers: int = 1) -> bool:
        """Waits until so many workers take requests; False when the time was not enough."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.num_ready < num_workers:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    @property
    def num_ready(self) -> int:
        """Workers that are in the router and known."""
        return sum(member.is_ready for member in self._members.values())

    def ready_cards(self) -> list[WorkerCard]:
        """What the workers that take requests say of themselves."""
        return [member.card for member in self._members.values() if member.is_ready and member.card is not None]

    def ready_processes(self) -> dict[str, int]:
        """Process ids, where they run, of the registered workers that take requests."""
        members = self._members.items()
        return {
            name: member.pid for name, member in members if isinstance(member, RegisteredMember) and member.is_ready
        }

    def link(self, worker_id: str) -> WorkerLink | None:
        """The way to a worker, another object for each session with it; None if it is not there now."""
        member = self._members.get(worker_id)
        return None if member is None else member.link

    async def drain(self, worker_id: str) -> None:
        """Has a worker take no new requests and leave when it has none any more.

        Raises:
            UnknownWorkerError: it is no member.
            WorkerLostError: it cannot be told.
        """
        if (member := self._members.get(worker_id)) is None:
            raise UnknownWorkerError(worker_id)
        await member.drain()

    def stats(self) -> tuple[MemberStats, ...]:
        """How each worker is, by name."""
        return tuple(
            MemberStats(
                worker_id=worker_id,
                epoch=0 if member.card is None else member.card.epoch,
                is_ready=member.is_ready,
                report=member.report,
                feed=member.feed_stats(),
            )
            for worker_id, member in sorted(self._members.items())
        )

    async def metrics(self) -> dict[str, bytes | None]:
        """The pages for Prometheus of all registered workers, by name; None for one that did not answer in time."""
        members = [member for member in self._members.values() if isinstance(member, RegisteredMember)]
        pages = await asyncio.gather(*(_page_of(member) for member in members))
        return {member.worker_id: page for member, page in zip(members, pages, strict=True)}

    def totals(self) -> EngineStats:
        """The workers' own numbers summed; counters include workers that have left, and those of before a restart."""
        reports = [member.report for member in self._members.values() if member.is_ready]
        totals = Counter(self._forgotten)
        self._note_counters()
        for counters in self._counters.values():
            totals.update(counters)
        return EngineStats(
            num_running=sum(report.num_running for report in reports if report is not None),
            num_waiting=sum(report.num_waiting for report in reports if report is not None),
            **{name: totals[name] for name in _COUNTERS},
        )

    async def close(self) -> None:
        """Ends all sessions, tasks and sockets; requests on them end with WorkerLostError. Idempotent."""
        tasks = [task for task in (self._watching, self._ticking) if task is not None]
        departing = dict(self._departing)
        await _end([*tasks, *self._running.values(), *departing, *(running for _, running in departing.values())])
        self._watching = self._ticking = None
        for member in [*self._members.values(), *(member for member, _ in departing.values())]:
            await member.close(patience_s=0)
        self._running.clear()
        self._members.clear()
        if self._around is not None:
            self._around.zmq_context.destroy(linger=0)
            self._around = None

    async def _watch(self, discovery: Discovery) -> None:
        """Looks for workers for ever; after an error of this front as well, since without it no worker would come back."""
        pause_s, told = _FIRST_RETRY_S, set[type[Exception]]()
        now = asyncio.get_running_loop().time
        while True:
            begun_s = now()
            try:
                await self._follow(discovery)
            except Exception as error:
                if now() - begun_s > _LONGEST_RETRY_S:  # it went well for a time
                    pause_s = _FIRST_RETRY_S
                    told.clear()
                if type(error) not in told:
                    told.add(type(error))
                    logger.exception("workers are not looked for after an error of this front, for %g s", pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_RETRY_S)

    async def _follow(self, discovery: Discovery) -> None:
        members = self._members.values()
        known = [member.registration for member in members if isinstance(member, RegisteredMember)]
        async with aclosing(discovery.watch(known)) as changes:
            async for change in changes:
                match change:
                    case Joined(registration):
                        logger.info("worker %s is registered, %s", registration.worker_id, registration.address)
                        self._remove(registration.worker_id)
                        assert self._around is not None
                        self._add(RegisteredMember(registration, self._around))
                    case Left(worker_id, reason):
                        logger.info("worker %s is no longer registered: %s", worker_id, reason)
                        self._remove(worker_id)

    def _add(self, member: Member) -> None:
        if member.worker_id in self._members:
            logger.error("two workers are named %s; the second one is not taken in", member.worker_id)
            return
        self._members[member.worker_id] = member
        self._running[member.worker_id] = asyncio.create_task(self._run(member), name=f"worker-{member.worker_id}")

    async def _run(self, member: Member) -> None:
        pause_s = _FIRST_RETRY_S
        while True:
            try:
                await member.run()
            except Exception:  # root of the worker's task: the others go on, and it may go better next time
                member.leave()
                logger.exception(
                    "worker %s is out after an error of this front, which tries again in %g s",
                    member.worker_id,
                    pause_s,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_RETRY_S)

    def _remove(self, worker_id: str) -> None:
        """Takes a registered worker out at once; the requests it has go on for as long as they may."""
        member = self._members.get(worker_id)
        if not isinstance(member, RegisteredMember):
            return
        self._note_counters()
        del self._members[worker_id]
        member.leave()
        running = self._running.pop(worker_id)
        task = asyncio.create_task(self._depart(member, running))
        self._departing[task] = member, running
        task.add_done_callback(self._departed)

    async def _depart(self, member: Member, running: asyncio.Task[None]) -> None:
        await _end([running])
        await member.close(patience_s=self._times.farewell_s)

    def _departed(self, task: asyncio.Task[None]) -> None:
        member, _ = self._departing.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the end of worker %s failed", member.worker_id, exc_info=error)

    async def _tick(self) -> None:
        """The router's own clock, so that time passes for it without requests as well."""
        while True:
            await asyncio.sleep(_TICK_S)
            self._router.tick()
            self._note_counters()

    def _note_counters(self) -> None:
        """Keeps what each incarnation has counted, for when it is gone."""
        for member in self._members.values():
            if member.report is not None and member.card is not None:
                counters = {name: member.report.counters.get(name, 0) for name in _COUNTERS}
                key = member.worker_id, member.card.epoch
                self._counters.pop(key, None)  # the living stay at the end
                self._counters[key] = counters
        while len(self._counters) > max(_MAX_REMEMBERED, len(self._members)):
            self._forgotten.update(self._counters.pop(next(iter(self._counters))))


def _zmq_context() -> "zmq.Context[zmq.Socket[bytes]]":
    context = zmq.Context()
    # A stream takes three sockets, so that the usual limit of 1023 would be that of some 340 workers.
    context.set(zmq.MAX_SOCKETS, context.get(zmq.SOCKET_LIMIT))
    return context


async def _page_of(member: Member) -> bytes | None:
    try:
        return await member.fetch_metrics()
    except WorkerLostError as error:
        logger.debug("%s", error)  # the page of all workers says which one is missing
        return None


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
