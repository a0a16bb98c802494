"""One worker's stream of KV events, brought into the index without a gap: a state machine without sockets or clocks.

Batches may be lost, doubled or late, the worker may start anew, and so may this side at any moment. Each batch covers a span
of positions, so that nothing but the batches themselves is needed to see what is missing:

    own worker       positions are `EventLog` numbers; an epoch tells one incarnation from the next. What a batch lacks is asked
                     of the worker's replay ring, and when that has it no more, a snapshot replaces everything of the worker.
    other engines    positions are the batches' sequence numbers. There is no snapshot: what replay cannot fill clears all that
                     is claimed for the worker, since any of it may be gone. There is no epoch either: a batch that differs
                     from the one remembered under its number, or is younger than what came after it, shows a new start.

    need             what the feed waits for                          what batches do meanwhile
    None             nothing: it is in sync                           are applied
    NeedReplay       the owner asks for all batches from a number     those behind the gap wait, up to a limit
    NeedSnapshot     the owner fetches a snapshot                     the same; those that the snapshot has are passed over

The owner takes `need` after every call, does it, and reports back; `need` stays until it is met, or met by itself.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, cast

import xxhash

from dynamo.kvcache.event_wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventWireError,
    SnapshotMessage,
    UnknownEvent,
    WireEvent,
    decode_batch,
    tier_of,
)
from dynamo.router.foreign import ForeignKeys

__all__ = ["BlockIndex", "Feed", "FeedStats", "Need", "NeedReplay", "NeedSnapshot"]

_log = logging.getLogger(__name__)
_REMEMBERED_BATCHES: Final = 4096
_REPLAY_ATTEMPTS: Final = 2


class BlockIndex(Protocol):
    """What a feed writes to; see `router.index.PrefixIndex`."""

    def stored(self, slot: int, tier: str, keys: Sequence[int], parent: int | None) -> object: ...
    def removed(self, slot: int, tier: str, keys: Sequence[int]) -> int: ...
    def cleared(self, slot: int, tier: str | None = None) -> None: ...
    def replace(self, slot: int, held: Mapping[str, Sequence[int]]) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class NeedReplay:
    """All batches from number `from_seq` on, as far as the publisher still has them. Each question is an object of its own."""

    from_seq: int


@dataclass(frozen=True, slots=True)
class NeedSnapshot:
    """What the worker holds now."""


Need = NeedReplay | NeedSnapshot


@dataclass(frozen=True, slots=True)
class FeedStats:
    """How the stream goes, since the feed was made.

    Attributes:
        batches: applied, heartbeats included.
        events: applied.
        gaps: times that something was missing.
        replays: asked for.
        snapshots: applied.
        losses: gaps that nothing could fill, so that the worker's blocks were all forgotten.
        restarts: of the worker, as seen in its stream.
        duplicates: batches that came again, or too late to matter.
        stale: batches and snapshots of an incarnation that is over.
        malformed: messages that could not be read.
        overflows: batches dropped since too many were waiting.
        unknown_removals: blocks removed that the index did not have.
        unknown_events: of a kind, or for a tier, unknown here.
        num_pending: batches waiting now.
        last_heard_s: when the last readable batch came, on the owner's clock; None before the first.
        is_in_sync: nothing is missing.
    """

    batches: int
    events: int
    gaps: int
    replays: int
    snapshots: int
    losses: int
    restarts: int
    duplicates: int
    stale: int
    malformed: int
    overflows: int
    unknown_removals: int
    unknown_events: int
    num_pending: int
    last_heard_s: float | None
    is_in_sync: bool


class _Batch(NamedTuple):
    seq: int
    first: int  # position of its first event; last + 1 if it has none
    last: int
    events: Sequence[WireEvent]
    ts: float
    digest: int
    num_hashes: int


class _Loading(NamedTuple):
    """A snapshot on its way into the index."""

    log_number: int
    runs: Iterator[tuple[str, Sequence[int], int | None]]


class Feed:
    """The stream of one worker, applied to its slot of the index. For one thread or event loop.

    Args:
        index: written to under `slot` alone.
        name: of the worker, for log lines.
        tiers: those that the index knows; events of others are counted and passed over.
        epoch: of the incarnation that is expected; older ones are ignored.
        foreign: translation of another engine's hashes; None for a worker of ours.
        can_replay: the owner can ask the publisher for past batches.
        can_snapshot: the owner can fetch a snapshot.
        max_pending_batches, max_pending_hashes: that wait behind a gap; beyond, the oldest are dropped and count as lost.
    """

    _position: int | None  # last one applied, or covered by a snapshot
    _next_seq: int | None  # of the batch that comes next, if the stream has no gap
    _pending: dict[int, _Batch]  # behind the gap, by number
    _num_pending_hashes: int
    _digests: dict[int, int]  # of another engine's batches, as applied
    _last_ts: float
    _need: Need | None
    _is_starting: bool  # the first replay is under way
    _is_unproven: bool  # whether the publisher is still the one whose batches were applied
    _asked_from: int
    _loading: "_Loading | None"
    _attempts_left: int

    def __init__(
        self,
        index: BlockIndex,
        slot: int,
        *,
        name: str,
        tiers: Sequence[str] = ("device", "host", "disk", "remote"),
        epoch: int = 0,
        foreign: ForeignKeys | None = None,
        can_replay: bool = True,
        can_snapshot: bool = True,
        max_pending_batches: int = 4096,
        max_pending_hashes: int = 1 << 20,
    ) -> None:
        if foreign is not None and can_snapshot:
            raise ValueError(
                "engines that need a translation of their hashes have no snapshots: set can_snapshot=False"
            )
        self._index = index
        self._slot = slot
        self._name = name
        self._tiers = frozenset(tiers)
        self._epoch = epoch
        self._foreign = foreign
        self._can_replay = can_replay
        self._can_snapshot = can_snapshot
        self._max_pending_batches = max_pending_batches
        self._max_pending_hashes = max_pending_hashes
        self._counts = dict.fromkeys(
            (
                name
                for name in FeedStats.__dataclass_fields__
                if name not in ("num_pending", "last_heard_s", "is_in_sync")
            ),
            0,
        )
        self._last_heard_s: float | None = None
        self._told: set[str] = set()
        self._begin()

    # --- what the owner calls

    @property
    def need(self) -> Need | None:
        """What the owner should do now."""
        return self._need

    @property
    def is_in_sync(self) -> bool:
        """Nothing is missing, as far as can be told."""
        return self._need is None

    def received(self, seq: int, payload: bytes | memoryview, now_s: float) -> None:
        """A batch came from the live stream."""
        batch = self._read(seq, payload, now_s)
        if batch is None:
            return
        if self._need is None and not self._pending and self._follows(batch):
            self._apply(batch)  # the fast way: nothing is amiss
            return
        self._admit(batch)

    def replayed(self, asked: NeedReplay, seq: int, payload: bytes | memoryview, now_s: float) -> None:
        """A batch came as an answer; in order, though some may be missing.

        Args:
            asked: the `need` that it answers. If something else is needed by now, it is passed over: it may come from a
                publisher that is no more.
        """
        batch = self._read(seq, payload, now_s) if asked is self._need else None
        if batch is None:
            return
        if self._position is None and asked is self._need:
            self._start_at(batch)  # as far back as the publisher goes
        self._admit(batch)

    def replay_ended(self, asked: NeedReplay, *, is_complete: bool) -> None:
        """No more answers will come. `is_complete` if the publisher said so, rather than time ran out."""
        if asked is not self._need:
            return
        if (self._next_seq or 0) > self._asked_from:
            self._attempts_left = _REPLAY_ATTEMPTS  # it brought something, so asking again may bring the rest
        else:
            self._attempts_left = 0 if is_complete else self._attempts_left - 1
        is_over = is_complete or self._attempts_left <= 0
        if not is_over and (self._is_unproven or self._is_starting):
            self._ask_replay()
        elif self._is_unproven:
            self._lose_everything()
        else:
            self._is_starting = False
            self._need = None
            self._settle()

    def snapshot_arrived(self, message: SnapshotMessage, max_blocks: int = 1 << 62) -> None:
        """The worker's blocks, all of them. Passed over if it is older than what is known already.

        Args:
            max_blocks: about as many are put into the index now; while `is_loading`, `load_some` goes on.
        """
        if not isinstance(self._need, NeedSnapshot):
            return
        is_older = self._position is not None and message.log_number < self._position
        if message.epoch < self._epoch or (message.epoch == self._epoch and is_older):
            self._counts["stale"] += 1
            return
        if message.epoch > self._epoch:
            self._restart(message.epoch)
        held = {tier: keys for tier, keys in message.held.items() if tier in self._tiers}
        # Blocks of unknown order go in at once. Until all are in, nothing is applied on top, and less is claimed than is true.
        self._index.replace(self._slot, {tier: keys for tier, keys in held.items() if tier not in message.starts})
        self._position = None
        self._loading = _Loading(message.log_number, _runs(held, message.starts))
        self.load_some(max_blocks)

    @property
    def is_loading(self) -> bool:
        """A snapshot came and is not yet in the index as a whole."""
        return self._loading is not None

    def load_some(self, max_blocks: int) -> None:
        """Goes on with a large snapshot, so that the owner can do other things between two pieces of it."""
        loading = self._loading
        if loading is None:
            return
        for tier, keys, parent in loading.runs:
            self._index.stored(self._slot, tier, keys, parent)
            max_blocks -= len(keys)
            if max_blocks <= 0:
                return
        self._counts["snapshots"] += 1
        self._position = loading.log_number
        self._loading = None
        self._attempts_left = _REPLAY_ATTEMPTS
        self._need = None
        self._settle()

    def connection_lost(self) -> None:
        """The stream broke off, and may be another publisher's when it comes back.

        A worker of ours says so by its epoch. Of another engine the batch applied last is asked for again, and compared.
        """
        if self._foreign is None:
            return
        if self._position is None:
            self._begin()  # what waits may be of an engine that is no more
        elif self._can_replay:
            self._attempts_left = _REPLAY_ATTEMPTS
            self._ask_replay()
        else:
            self._lose_everything()

    def stats(self) -> FeedStats:
        """Counters so far."""
        return FeedStats(
            **self._counts, num_pending=len(self._pending), last_heard_s=self._last_heard_s, is_in_sync=self.is_in_sync
        )

    # --- reading

    def _read(self, seq: int, payload: bytes | memoryview, now_s: float) -> _Batch | None:
        """The batch, if it can be read and is of the current incarnation. Notices a new one."""
        try:
            batch = decode_batch(payload)
            if self._foreign is None and (batch.epoch is None or batch.log_number is None):
                raise EventWireError("a batch has no epoch or log number, so it is not of a worker of ours")
        except EventWireError as error:
            self._counts["malformed"] += 1
            self._tell_once("malformed", "%s; it counts as lost", error)
            return None
        self._last_heard_s = now_s
        num_hashes = sum(len(e.block_hashes) for e in batch.events if isinstance(e, BlockStored | BlockRemoved))
        if self._foreign is not None:
            read = _Batch(seq, seq, seq, batch.events, batch.ts, xxhash.xxh3_64_intdigest(payload), num_hashes)
            if self._shows_restart(read):
                self._restart(self._epoch)
            return read
        epoch, last = cast("int", batch.epoch), cast("int", batch.log_number)
        if epoch < self._epoch:
            self._counts["stale"] += 1
            return None
        if epoch > self._epoch:
            self._restart(epoch)
        return _Batch(seq, last - len(batch.events) + 1, last, batch.events, batch.ts, 0, num_hashes)

    def _shows_restart(self, batch: _Batch) -> bool:
        """Whether another publisher than before must have sent that batch (of another engine)."""
        if self._position is None or batch.seq > self._position:
            return False
        remembered = self._digests.get(batch.seq)
        if remembered is None:
            return batch.ts > self._last_ts
        if batch.seq == self._position and remembered == batch.digest:
            self._is_unproven = False  # a publisher that had begun anew could not have sent the same
        return remembered != batch.digest

    # --- what is missing

    def _begin(self) -> None:
        """Nothing is known of the worker."""
        self._position = None
        self._next_seq = None
        self._pending = {}
        self._num_pending_hashes = 0
        self._digests = {}
        self._last_ts = float("-inf")
        self._need = None
        self._is_starting = self._can_replay and not self._can_snapshot
        self._is_unproven = False
        self._asked_from = 0
        self._attempts_left = _REPLAY_ATTEMPTS
        self._loading = None
        if self._can_snapshot:
            self._need = NeedSnapshot()
        elif self._can_replay:
            self._ask_replay()

    def _restart(self, epoch: int) -> None:
        if self._foreign is not None or self._epoch > 0:
            self._counts["restarts"] += 1
            _log.warning("%s started anew; its blocks of before are forgotten", self._name)
        self._forget()
        self._epoch = epoch

    def _forget(self) -> None:
        self._index.cleared(self._slot)
        if self._foreign is not None:
            self._foreign.forget()
        self._begin()

    def _follows(self, batch: _Batch) -> bool:
        if self._position is None or (self._next_seq is not None and batch.seq < self._next_seq):
            return False
        return batch.first <= self._position + 1

    def _admit(self, batch: _Batch) -> None:
        was_in_sync, num_losses = self._need is None, self._counts["losses"]
        if batch.seq in self._pending or (self._next_seq is not None and batch.seq < self._next_seq):
            self._counts["duplicates"] += 1
        else:
            self._pending[batch.seq] = batch
            self._num_pending_hashes += batch.num_hashes
            while len(self._pending) > self._max_pending_batches or self._num_pending_hashes > self._max_pending_hashes:
                self._take_pending(min(self._pending))
                self._counts["overflows"] += 1
        self._settle()
        if was_in_sync and (self._need is not None or self._counts["losses"] > num_losses):
            self._counts["gaps"] += 1

    def _take_pending(self, seq: int) -> _Batch:
        batch = self._pending.pop(seq)
        self._num_pending_hashes -= batch.num_hashes
        return batch

    def _settle(self) -> None:
        """Applies what can be applied, and decides what is needed for the rest."""
        if self._is_unproven:
            return
        if self._position is None:
            if self._need is not None or not self._pending:
                return
            self._start_at(self._pending[min(self._pending)])
        while (behind := self._drain()) is not None:
            if self._is_starting or self._ask(behind):
                return
            self._lose(behind)
        if not self._is_starting:
            self._need = None
            self._attempts_left = _REPLAY_ATTEMPTS

    def _drain(self) -> _Batch | None:
        """Applies waiting batches up to a gap. Returns the batch behind the gap."""
        for seq in sorted(self._pending):
            batch = self._pending[seq]
            if not self._follows(batch):
                return batch
            self._apply(self._take_pending(seq))
        return None

    def _ask(self, behind: _Batch) -> bool:
        """Says what would fill the gap before a batch; False if nothing can."""
        # Where no number is missing and events are all the same, the publisher itself no longer had them.
        can_be_replayed = self._can_replay and self._next_seq is not None and behind.seq > self._next_seq
        if self._need is not None:
            return True
        if can_be_replayed and self._attempts_left > 0:
            self._ask_replay()
            return True
        if self._can_snapshot:
            self._need = NeedSnapshot()
        return self._can_snapshot

    def _ask_replay(self) -> None:
        """Of another engine from one batch earlier, which proves by its digest that it is the same publisher."""
        from_seq = self._next_seq or 0
        self._asked_from = from_seq
        if self._foreign is not None and self._position is not None:
            from_seq -= 1
            self._is_unproven = True
        self._counts["replays"] += 1
        self._need = NeedReplay(from_seq)

    def _lose(self, behind: _Batch) -> None:
        """Nothing fills the gap, and any block may be gone: claims none of them, and goes on behind the gap."""
        self._count_loss()
        self._index.cleared(self._slot)
        if self._foreign is not None:
            self._foreign.cleared()
        self._start_at(behind)
        self._attempts_left = _REPLAY_ATTEMPTS
        self._need = None

    def _lose_everything(self) -> None:
        """It cannot be shown that the publisher is the same, so that even its names may have changed their meaning."""
        self._count_loss()
        self._forget()

    def _count_loss(self) -> None:
        self._counts["losses"] += 1
        self._tell_once(
            "lost",
            "KV events were lost for good; its blocks are forgotten until they are stored again. "
            "Give the engine a replay endpoint, or a larger replay buffer",
        )

    def _start_at(self, batch: _Batch) -> None:
        self._position = batch.first - 1
        self._next_seq = batch.seq

    # --- applying

    def _apply(self, batch: _Batch) -> None:
        assert self._position is not None
        num_known = self._position + 1 - batch.first  # events of it that are in already, as a snapshot may have some
        for event in batch.events[num_known:] if num_known > 0 else batch.events:
            self._apply_event(event)
        self._position = max(self._position, batch.last)
        self._next_seq = batch.seq + 1
        self._counts["batches"] += 1
        if self._foreign is not None:
            self._last_ts = batch.ts
            self._digests[batch.seq] = batch.digest
            if len(self._digests) > _REMEMBERED_BATCHES:
                del self._digests[next(iter(self._digests))]

    def _apply_event(self, event: WireEvent) -> None:
        self._counts["events"] += 1
        match event:
            case BlockStored() if (tier := tier_of(event)) in self._tiers:
                if self._foreign is None:
                    keys = cast("Sequence[int]", event.block_hashes)
                    self._index.stored(self._slot, tier, keys, cast("int | None", event.parent_block_hash))
                    return
                for run in self._foreign.stored(event):
                    self._index.stored(self._slot, tier, run.keys, run.parent)
            case BlockRemoved() if (tier := tier_of(event)) in self._tiers:
                if self._foreign is None:
                    keys = cast("Sequence[int]", event.block_hashes)
                else:
                    keys = self._foreign.removed(event)
                self._counts["unknown_removals"] += self._index.removed(self._slot, tier, keys)
            case AllBlocksCleared() if event.tier is None or event.tier in self._tiers:
                self._index.cleared(self._slot, event.tier)
                if self._foreign is not None:
                    self._foreign.cleared(event.tier)
            case _:
                self._counts["unknown_events"] += 1
                kind = event.type if isinstance(event, UnknownEvent) else event.tier
                self._tell_once("unknown", "an event of kind or tier %r is unknown to this release", str(kind)[:40])

    def _tell_once(self, what: str, message: str, *values: object) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.error(f"%s: {message} (told once; see the metrics for how often)", self._name, *values)


def _runs(
    held: Mapping[str, Sequence[int]], starts: Mapping[str, Sequence[tuple[int, int | None]]]
) -> Iterator[tuple[str, Sequence[int], int | None]]:
    """(tier, keys, parent) of a snapshot's runs."""
    for tier, keys in held.items():
        ends = [position for position, _ in starts.get(tier, ())][1:]
        for (start, parent), end in zip(starts.get(tier, ()), [*ends, len(keys)], strict=False):
            yield tier, keys[start:end], parent
