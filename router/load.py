"""What each worker has to do: requests that were sent to it from here and from other fronts, and what it reports."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo.router.workers import LoadEvent, LoadReport, WorkerCard

__all__ = ["Entry", "LoadKey", "PriorSpeeds", "WorkerLoad", "mark_stride", "prior_speeds"]

LoadKey = tuple[int | str, str]
"""Whose request, and its id: this front's have a number of the router's own in front, others their front's name."""

_MARK_TOKENS = 256
_MAX_FOREIGN = 65_536
_FRESH_S = 2.5  # reports come every second
_STALE_S = 10.0
_SERVICE_WEIGHT = 0.1  # of the latest request in the mean time of service
_LOADED_TIERS = ("host", "disk", "remote")
_PRIOR_TOKENS_PER_S = 10_000.0
_PRIOR_LOAD_SHARE = (0.25, 0.5, 0.5)  # of computing a block


def mark_stride(block_size: int) -> int:
    """How many blocks one mark stands for: about 256 tokens, so that long prompts cost little to count."""
    return max(1, _MARK_TOKENS // block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorSpeeds:
    """What is assumed of a worker that has measured nothing yet: what its peers measured, or a guess.

    Attributes:
        prefill_tokens_per_s: of computing prompts.
        load_blocks_per_s: of getting blocks back, by tier, where a peer measured it. A tier that nobody measured is taken to
            need a quarter of the time of computing (host) or half of it (disk, remote).
    """

    prefill_tokens_per_s: float
    load_blocks_per_s: dict[str, float]


def prior_speeds(reports: Iterable[LoadReport | None]) -> PriorSpeeds:
    """What peers measured, the median of each speed, stands in for what a worker did not measure."""
    known = [report for report in reports if report is not None]
    speeds = [report.prefill_tokens_per_s for report in known if report.prefill_tokens_per_s]
    by_tier: dict[str, list[float]] = {}
    for report in known:
        for tier, speed in report.load_blocks_per_s.items():
            by_tier.setdefault(tier, []).append(speed)
    return PriorSpeeds(
        prefill_tokens_per_s=statistics.median(speeds) if speeds else _PRIOR_TOKENS_PER_S,
        load_blocks_per_s={tier: statistics.median(measured) for tier, measured in by_tier.items()},
    )


@dataclass(slots=True, kw_only=True)
class Entry:
    """One request at one worker. Made by Router, changed by `WorkerLoad` alone.

    Attributes:
        prefill_tokens: of the prompt, to be computed.
        own_blocks: blocks of the prompt that no mark stands for, and of the output.
        added_s: when it came.
        marks: every so many'th block key of its prompt, which requests with the same prefix share.
        output_blocks: those of `own_blocks` that are of the output.
        heard_s: when something was last heard of it.
        is_foreign: sent by another front.
    """

    prefill_tokens: int
    own_blocks: int
    added_s: float
    marks: Sequence[int] = ()
    output_blocks: int = 0
    heard_s: float = 0.0
    is_foreign: bool = False


class WorkerLoad:
    """Books of one incarnation of one worker. Not thread-safe: it belongs to its Router.

    A prompt that several of its requests share is counted once: each request leaves a mark at every 256th token or so, and
    a mark counts for as many blocks as it stands for while any request holds it.

    What the worker reports beyond what is booked, such as requests of clients that do not come through a router, counts as
    well, and fades when no new report comes.

    Attributes:
        card: what the worker says of itself.
        last_report: None before the first.
        token_s: seconds to compute a prompt token.
        block_load_s: seconds to get a block back from host, disk and remote.
        prefill_tokens: to be computed, booked and reported; this and what follows is as of the last `refresh`.
        num_requests: likewise.
        held_blocks: of the device, by running requests.
        queue_s: until a new request can begin, less what was computed of the oldest prompt since `anchor_s`, which is all
            of `oldest_s` at most.
        anchor_s: when computing the oldest prompt began.
        oldest_s: how long computing it takes.
    """

    __slots__ = (
        "_booked_tokens",
        "_entries",
        "_excess_blocks",
        "_excess_requests",
        "_excess_tokens",
        "_marks",
        "_num_foreign",
        "_own_blocks",
        "_prefilling",
        "_reported_s",
        "_service_s",
        "_stride",
        "anchor_s",
        "block_load_s",
        "block_size",
        "capacity_blocks",
        "card",
        "held_blocks",
        "last_report",
        "num_requests",
        "oldest_s",
        "prefill_tokens",
        "queue_s",
        "token_s",
    )

    def __init__(self, card: WorkerCard, priors: PriorSpeeds) -> None:
        self.card = card
        self.block_size = card.block_size
        self.capacity_blocks = card.num_blocks.get("device", 0)
        self.last_report: LoadReport | None = None
        self.num_requests = self.prefill_tokens = self.held_blocks = 0
        self.queue_s = self.anchor_s = self.oldest_s = 0.0
        self._entries: dict[LoadKey, Entry] = {}
        self._num_foreign = 0
        self._prefilling: dict[LoadKey, None] = {}  # the oldest request first
        self._booked_tokens = self._own_blocks = 0
        self._marks: dict[int, int] = {}  # requests that hold it
        self._stride = mark_stride(card.block_size)
        self._service_s = 0.0  # mean time from booking to end, 0 before the first
        self._reported_s = 0.0
        self._excess_tokens = self._excess_requests = self._excess_blocks = 0
        self.token_s = 0.0
        self.block_load_s = (0.0, 0.0, 0.0)
        self.assume(priors)

    def __contains__(self, key: LoadKey) -> bool:
        return key in self._entries

    @property
    def num_booked(self) -> int:
        """Requests booked, of this front and of others."""
        return len(self._entries)

    @property
    def num_foreign(self) -> int:
        """Requests of other fronts."""
        return self._num_foreign

    @property
    def booked_blocks(self) -> int:
        """Device blocks that booked requests hold."""
        return len(self._marks) * self._stride + self._own_blocks

    def report_age_s(self, now_s: float) -> float | None:
        """Since the last report; None before the first."""
        return None if self.last_report is None else now_s - self._reported_s

    def assume(self, priors: PriorSpeeds) -> None:
        """Sets speeds: those the worker measured, and what is assumed of the others."""
        report = self.last_report
        measured = dict(priors.load_blocks_per_s)
        speed = priors.prefill_tokens_per_s
        if report is not None:
            speed = report.prefill_tokens_per_s or speed
            measured.update(report.load_blocks_per_s)
        self.token_s = 1.0 / speed
        host, disk, remote = (
            1.0 / measured[tier] if measured.get(tier, 0.0) > 0 else share * self.block_size * self.token_s
            for tier, share in zip(_LOADED_TIERS, _PRIOR_LOAD_SHARE, strict=True)
        )
        self.block_load_s = (host, disk, remote)

    def add(self, key: LoadKey, entry: Entry) -> None:
        """Books a request. One that is booked under the same key is released first."""
        if key in self._entries:
            self.free(key, entry.added_s)
        entry.heard_s = entry.added_s
        self._entries[key] = entry
        self._num_foreign += entry.is_foreign
        self._own_blocks += entry.own_blocks
        marks = self._marks
        for mark in entry.marks:
            marks[mark] = marks.get(mark, 0) + 1
        if entry.prefill_tokens:
            if not self._prefilling:
                self.anchor_s = entry.added_s
            self._prefilling[key] = None
            self._booked_tokens += entry.prefill_tokens

    def first_token(self, key: LoadKey, now_s: float) -> bool:
        """The request's prompt is computed. Returns whether that is news."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        entry.heard_s = now_s
        return self._end_prefill(key, entry, now_s)

    def output_blocks(self, key: LoadKey, num_blocks: int, now_s: float) -> bool:
        """The request's output fills so many blocks. Returns whether they are more than were counted."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        entry.heard_s = now_s
        more = num_blocks - entry.output_blocks
        if more <= 0:
            return False
        entry.output_blocks = num_blocks
        entry.own_blocks += more
        self._own_blocks += more
        return True

    def free(self, key: LoadKey, now_s: float) -> bool:
        """The request ended. Returns whether it was booked."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        was_served = not self._end_prefill(key, entry, now_s)
        self._num_foreign -= entry.is_foreign
        self._own_blocks -= entry.own_blocks
        marks = self._marks
        for mark in entry.marks:
            holders = marks[mark] - 1
            if holders:
                marks[mark] = holders
            else:
                del marks[mark]
        if was_served:  # one that failed or was cancelled before says nothing about how long others take
            took_s = now_s - entry.added_s
            self._service_s += (took_s - self._service_s) * (_SERVICE_WEIGHT if self._service_s else 1.0)
        return True

    def foreign(self, event: LoadEvent, now_s: float) -> bool:
        """Takes what the worker says of another front's request. Returns whether it changed anything."""
        key = (event.front_id, event.request_id)
        match event.kind:
            case "added":
                if self._num_foreign >= _MAX_FOREIGN:
                    return False
                self.add(
                    key,
                    Entry(
                        prefill_tokens=max(0, event.prefill_tokens),
                        own_blocks=max(0, event.num_blocks),
                        added_s=now_s,
                        is_foreign=True,
                    ),
                )
                return True
            case "first-token":
                return self.first_token(key, now_s)
            case "freed":
                return self.free(key, now_s)
            case "front-gone":
                return self._free_foreign(now_s, front_id=event.front_id)

    def report(self, report: LoadReport, now_s: float) -> None:
        """Takes what the worker says of itself."""
        self.last_report = report
        self._reported_s = now_s
        num_reported = report.num_running + report.num_waiting
        if not num_reported and self._num_foreign:  # their end was lost on the way
            self._free_foreign(now_s, heard_before_s=now_s - _FRESH_S)
        # Requests that are not booked, and their share of the rest. What is booked is known better here than there: a worker
        # that has not looked for a waiting prompt's prefix yet counts all of it.
        unknown = max(0, num_reported - len(self._entries))
        share = unknown / num_reported if num_reported else 0.0
        self._excess_requests = unknown
        self._excess_tokens = int(share * report.prefill_tokens_waiting)
        self._excess_blocks = int(share * report.used_blocks.get("device", 0))

    def refresh(self, now_s: float) -> None:
        """Brings up to date what depends on bookings, on the report and on its age."""
        tokens, requests, blocks = self._booked_tokens, len(self._entries), self.booked_blocks
        if self._excess_requests:
            share = min(1.0, max(0.0, (_STALE_S - (now_s - self._reported_s)) / (_STALE_S - _FRESH_S)))
            tokens += int(share * self._excess_tokens)
            requests += int(share * self._excess_requests)
            blocks += int(share * self._excess_blocks)
        self.prefill_tokens, self.num_requests, self.held_blocks = tokens, requests, blocks
        self.oldest_s = 0.0
        for key in self._prefilling:
            self.oldest_s = self._entries[key].prefill_tokens * self.token_s
            break
        self.queue_s = tokens * self.token_s
        if self._service_s:
            self.queue_s = max(self.queue_s, self._service_s * self._overflow())

    def expire(self, heard_before_s: float, now_s: float) -> tuple[list[str], int]:
        """Releases requests of which nothing was heard since: ids of this front's, and how many of others."""
        late = [key for key, entry in self._entries.items() if entry.heard_s < heard_before_s]
        own: list[str] = []
        for key in late:
            if not self._entries[key].is_foreign:
                own.append(key[1])
            self.free(key, now_s)
        return own, len(late) - len(own)

    def check_invariants(self) -> None:
        """Counts everything anew.

        Raises:
            AssertionError: a sum differs from its parts.
        """
        entries = self._entries
        marks: dict[int, int] = {}
        for entry in entries.values():
            for mark in entry.marks:
                marks[mark] = marks.get(mark, 0) + 1
        assert marks == self._marks
        assert self._own_blocks == sum(entry.own_blocks for entry in entries.values())
        assert self._booked_tokens == sum(entries[key].prefill_tokens for key in self._prefilling)
        assert self._num_foreign == sum(entry.is_foreign for entry in entries.values())
        assert all(entry.own_blocks >= entry.output_blocks >= 0 for entry in entries.values())

    def _end_prefill(self, key: LoadKey, entry: Entry, now_s: float) -> bool:
        if key not in self._prefilling:
            return False
        if next(iter(self._prefilling)) == key:
            self.anchor_s = now_s
        del self._prefilling[key]
        self._booked_tokens -= entry.prefill_tokens
        return True

    def _free_foreign(self, now_s: float, *, front_id: str | None = None, heard_before_s: float | None = None) -> bool:
        gone = [
            key
            for key, entry in self._entries.items()
            if entry.is_foreign
            and (front_id is None or key[0] == front_id)
            and (heard_before_s is None or entry.heard_s < heard_before_s)
        ]
        for key in gone:
            self.free(key, now_s)
        return bool(gone)

    def _overflow(self) -> float:
        """How many times all that runs has to end before one more request fits."""
        running, capacity = self.card.max_running, self.capacity_blocks
        requests = (self.num_requests + 1 - running) / running if running else 0.0
        blocks = (self.held_blocks - capacity) / capacity if capacity else 0.0
        return max(0.0, requests, blocks)
