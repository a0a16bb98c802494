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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import xxhash

from dynamo.kvcache.event_wire import (
    EventWireError,
    SnapshotMessage,
    UnknownEvent,
    WireEvent,
    count_hashes,
    decode_batch,
)
from dynamo.router.feed_stats import FeedStats
from dynamo.router.foreign import ForeignKeys
from dynamo.router.pending import PendingBatches, PositionedBatch
from dynamo.router.slot_writer import BlockIndex, SlotWriter

__all__ = ["BlockIndex", "Feed", "FeedStats", "Need", "NeedReplay", "NeedSnapshot"]

_log = logging.getLogger(__name__)
_REMEMBERED_BATCHES: Final = 4096
_REPLAY_ATTEMPTS: Final = 2
_COUNTED: Final = (
    *("batches", "events", "gaps", "replays", "snapshots", "losses"),
    *("restarts", "duplicates", "stale", "malformed", "overflows"),
)


@dataclass(frozen=True, slots=True, eq=False)
class NeedReplay:
    """All batches from number `from_seq` on, as far as the publisher still has them. Each question is an object of its own."""

    from_seq: int


@dataclass(frozen=True, slots=True)
class NeedSnapshot:
    """What the worker holds now."""


Need = NeedReplay | NeedSnapshot


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
    _digests: dict[int, int]  # of another engine's batches, as applied
    _last_ts: float
    _need: Need | None
    _is_starting: bool  # the first replay is under way
    _is_unproven: bool  # whether the publisher is still the one whose batches were applied
    _asked_from: int
    _loading: int | None  # log number of a snapshot that is not yet in as a whole
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
        self._writer = SlotWriter(index, slot, tiers, foreign)
        self._name = name
        self._epoch = epoch
        self._is_foreign = foreign is not None
        self._can_replay = can_replay
        self._can_snapshot = can_snapshot
        self._pending = PendingBatches(max_pending_batches, max_pending_hashes)  # behind the gap
        self._counts = dict.fromkeys(_COUNTED, 0)
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
        self._writer.replace(message)
        self._position = None  # until all of it is in, nothing is applied on top
        self._loading = message.log_number
        self.load_some(max_blocks)

    @property
    def is_loading(self) -> bool:
        """A snapshot came and is not yet in the index as a whole."""
        return self._loading is not None

    def load_some(self, max_blocks: int) -> None:
        """Goes on with a large snapshot, so that the owner can do other things between two pieces of it."""
        if self._loading is None or self._writer.load(max_blocks):
            return
        self._counts["snapshots"] += 1
        self._position, self._loading = self._loading, None
        self._attempts_left = _REPLAY_ATTEMPTS
        self._need = None
        self._settle()

    def connection_lost(self) -> None:
        """The stream broke off, and may be another publisher's when it comes back.

        A worker of ours says so by its epoch. Of another engine the batch applied last is asked for again, and compared.
        """
        if not self._is_foreign:
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
            **self._counts,
            unknown_removals=self._writer.unknown_removals,
            unknown_events=self._writer.unknown_events,
            num_pending=len(self._pending),
            last_heard_s=self._last_heard_s,
            is_in_sync=self.is_in_sync,
        )

    # --- reading

    def _read(self, seq: int, payload: bytes | memoryview, now_s: float) -> PositionedBatch | None:
        """The batch, if it can be read and is of the current incarnation. Notices a new one."""
        try:
            batch = decode_batch(payload)
            if not self._is_foreign and (batch.epoch is None or batch.log_number is None):
                raise EventWireError("a batch has no epoch or log number, so it is not of a worker of ours")
        except EventWireError as error:
            self._counts["malformed"] += 1
            self._tell_once("malformed", "%s; it counts as lost", error)
            return None
        self._last_heard_s = now_s
        num_hashes = count_hashes(batch.events)
        if self._is_foreign:
            read = PositionedBatch(seq, seq, seq, batch.events, batch.ts, xxhash.xxh3_64_intdigest(payload), num_hashes)
            if self._shows_restart(read):
                self._restart(self._epoch)
            return read
        epoch, last = cast("int", batch.epoch), cast("int", batch.log_number)
        if epoch < self._epoch:
            self._counts["stale"] += 1
            return None
        if epoch > self._epoch:
            self._restart(epoch)
        return PositionedBatch(seq, last - len(batch.events) + 1, last, batch.events, batch.ts, 0, num_hashes)

    def _shows_restart(self, batch: PositionedBatch) -> bool:
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
        self._pending.clear()
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
        if self._is_foreign or self._epoch > 0:
            self._counts["restarts"] += 1
            _log.warning("%s started anew; its blocks of before are forgotten", self._name)
        self._forget()
        self._epoch = epoch

    def _forget(self) -> None:
        self._writer.forget()
        self._begin()

    def _follows(self, batch: PositionedBatch) -> bool:
        if self._position is None or (self._next_seq is not None and batch.seq < self._next_seq):
            return False
        return batch.first <= self._position + 1

    def _admit(self, batch: PositionedBatch) -> None:
        was_in_sync, num_losses = self._need is None, self._counts["losses"]
        if batch.seq in self._pending or (self._next_seq is not None and batch.seq < self._next_seq):
            self._counts["duplicates"] += 1
        else:
            self._counts["overflows"] += self._pending.add(batch)
        self._settle()
        if was_in_sync and (self._need is not None or self._counts["losses"] > num_losses):
            self._counts["gaps"] += 1

    def _settle(self) -> None:
        """Applies what can be applied, and decides what is needed for the rest."""
        if self._is_unproven:
            return
        if self._position is None:
            if self._need is not None or not self._pending:
                return
            self._start_at(self._pending.first)
        while (behind := self._drain()) is not None:
            if self._is_starting or self._ask(behind):
                return
            self._lose(behind)
        if not self._is_starting:
            self._need = None
            self._attempts_left = _REPLAY_ATTEMPTS

    def _drain(self) -> PositionedBatch | None:
        """Applies waiting batches up to a gap. Returns the batch behind the gap."""
        if self._pending and not self._follows(behind := self._pending.first):
            return behind
        for batch in self._pending.in_order():
            if not self._follows(batch):
                return batch
            self._apply(self._pending.take(batch.seq))
        return None

    def _ask(self, behind: PositionedBatch) -> bool:
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
        if self._is_foreign and self._position is not None:
            from_seq -= 1
            self._is_unproven = True
        self._counts["replays"] += 1
        self._need = NeedReplay(from_seq)

    def _lose(self, behind: PositionedBatch) -> None:
        """Nothing fills the gap, and any block may be gone: claims none of them, and goes on behind the gap."""
        self._count_loss()
        self._writer.clear()
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

    def _start_at(self, batch: PositionedBatch) -> None:
        self._position = batch.first - 1
        self._next_seq = batch.seq

    # --- applying

    def _apply(self, batch: PositionedBatch) -> None:
        assert self._position is not None
        num_known = self._position + 1 - batch.first  # events of it that are in already, as a snapshot may have some
        for event in batch.events[num_known:] if num_known > 0 else batch.events:
            self._apply_event(event)
        self._position = max(self._position, batch.last)
        self._next_seq = batch.seq + 1
        self._counts["batches"] += 1
        if self._is_foreign:
            self._last_ts = batch.ts
            self._digests[batch.seq] = batch.digest
            if len(self._digests) > _REMEMBERED_BATCHES:
                del self._digests[next(iter(self._digests))]

    def _apply_event(self, event: WireEvent) -> None:
        self._counts["events"] += 1
        if not self._writer.apply(event):
            kind = event.type if isinstance(event, UnknownEvent) else event.tier
            self._tell_once("unknown", "an event of kind or tier %r is unknown to this release", str(kind)[:40])

    def _tell_once(self, what: str, message: str, *values: object) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.error(f"%s: {message} (told once; see the metrics for how often)", self._name, *values)
