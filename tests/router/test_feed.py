"""A simulated publisher, a wire that loses, doubles and reorders, and an index that is a set: claims end at the truth."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.event_wire import BlockRemoved, BlockStored, EventBatch, SnapshotMessage, encode_batch
from dynamo.kvcache.events import Cleared, Event, Removed, Stored
from dynamo.kvcache.hashing import BlockKey, block_keys, chain_root
from dynamo.router.feed import Feed, NeedReplay, NeedSnapshot
from dynamo.router.foreign import ForeignKeys

TIERS = ("device", "host")


class SetIndex:
    """The plainest index there is: keys by tier, of one slot."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def stored(self, slot: int, tier: str, keys: Sequence[int], parent: int | None) -> None:
        self.held.setdefault(tier, set()).update(keys)

    def removed(self, slot: int, tier: str, keys: Sequence[int]) -> int:
        held = self.held.setdefault(tier, set())
        num_unknown = len(set(keys) - held)
        held.difference_update(keys)
        return num_unknown

    def cleared(self, slot: int, tier: str | None = None) -> None:
        if tier is None:
            self.held.clear()
        else:
            self.held.pop(tier, None)

    def replace(self, slot: int, held: Mapping[str, Sequence[int]]) -> None:
        self.held = {tier: set(keys) for tier, keys in held.items()}

    def claims(self) -> dict[str, set[int]]:
        return {tier: keys for tier, keys in self.held.items() if keys}


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(8, "little") + bytes(8))


@dataclass
class Worker:
    """What a worker publishes: events of a random life, in batches, with a ring for replay."""

    rng: random.Random
    ring_batches: int
    epoch: int = 1
    seq: int = 0
    log_number: int = -1
    published_number: int = -1
    held: dict[str, set[int]] = field(default_factory=dict)
    waiting: list[Event] = field(default_factory=list)
    ring: list[tuple[int, bytes]] = field(default_factory=list)

    def restart(self) -> None:
        warm = {"host": set(self.held.get("host", ()))} if self.rng.random() < 0.5 else {}
        self.epoch += 1
        self.seq, self.log_number, self.published_number = 0, -1, -1
        self.held, self.waiting, self.ring = warm, [], []

    def live(self) -> None:
        """One event of the cache's life."""
        self.log_number += 1
        tier = self.rng.choice(TIERS)
        held = self.held.setdefault(tier, set())
        kind = self.rng.random()
        if kind < 0.6:
            keys = [self.rng.randrange(64) for _ in range(self.rng.randint(1, 5))]
            held.update(keys)
            self.waiting.append(Stored(self.log_number, tier, tuple(map(key, keys)), None))
        elif kind < 0.95:
            gone = [k for k in held if self.rng.random() < 0.3]
            held.difference_update(gone)
            self.waiting.append(Removed(self.log_number, tier, tuple(map(key, gone))))
        else:
            held.clear()
            self.waiting.append(Cleared(self.log_number, tier))

    def overrun(self) -> None:
        """The log's own ring went round before it was read."""
        self.waiting.clear()

    def publish(self) -> tuple[int, bytes]:
        """A batch of what waits; a heartbeat, or a marker of an overrun, if nothing does."""
        missing = self.log_number - len(self.waiting) - self.published_number
        if missing:
            events: list[Event] = []
            self.published_number += missing
        else:
            events, self.waiting = self.waiting, []
            self.published_number += len(events)
        message = self.seq, encode_batch(events, epoch=self.epoch, log_number=self.published_number, ts=float(self.seq))
        self.seq += 1
        self.ring = [*self.ring, message][-self.ring_batches :]
        return message

    def snapshot(self) -> SnapshotMessage:
        held = {tier: sorted(keys) for tier, keys in self.held.items()}
        starts = {tier: [(i, None) for i in range(len(keys))] for tier, keys in held.items() if self.rng.random() < 0.7}
        return SnapshotMessage(self.epoch, self.log_number, held, starts)

    def truth(self) -> dict[str, set[int]]:
        return {tier: set(keys) for tier, keys in self.held.items() if keys}


def settle(feed: Feed, worker: Worker, lossy: random.Random | None = None) -> None:
    """Does what the feed needs; with `lossy`, each answer may be partly lost."""
    for _ in range(20):
        match feed.need:
            case None:
                return
            case NeedReplay() as need:
                answers = [m for m in worker.ring if m[0] >= need.from_seq]
                if lossy:
                    answers = [m for m in answers if lossy.random() < 0.7]
                for seq, payload in answers:
                    feed.replayed(need, seq, payload, 0.0)
                feed.replay_ended(need, is_complete=not lossy or lossy.random() < 0.7)
            case NeedSnapshot():
                feed.snapshot_arrived(worker.snapshot(), 10)
                while feed.is_loading:
                    feed.load_some(10)
    raise AssertionError(f"never settles: needs {feed.need}, {feed.stats()}")


def bad_wire(messages: Sequence[tuple[int, bytes]], rng: random.Random) -> Iterator[tuple[int, bytes]]:
    late: list[tuple[int, bytes]] = []
    for message in messages:
        fate = rng.random()
        if fate < 0.15:
            continue
        if fate < 0.3:
            late.append(message)
            continue
        yield message
        if fate < 0.45:
            yield message
        while late and rng.random() < 0.5:
            yield late.pop(rng.randrange(len(late)))
    yield from late


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), ring=st.sampled_from([1, 3, 20]), limit=st.sampled_from([2, 5, 100]))
def test_the_index_ends_at_the_truth_whatever_the_wire_does(seed: int, ring: int, limit: int) -> None:
    rng = random.Random(seed)
    worker = Worker(rng, ring)
    index = SetIndex()
    feed = Feed(index, 0, name="w", max_pending_batches=limit)
    held_back: list[SnapshotMessage] = []
    for _ in range(rng.randint(1, 12)):
        sent = []
        for _ in range(rng.randint(0, 6)):
            for _ in range(rng.randint(0, 4)):
                worker.live()
            if rng.random() < 0.1:
                worker.overrun()
            sent.append(worker.publish())
        if rng.random() < 0.3:
            held_back.append(worker.snapshot())  # taken now, arriving much later, among live batches
        if rng.random() < 0.15:
            worker.restart()
        if rng.random() < 0.1:  # this side starts anew
            index = SetIndex()
            feed = Feed(index, 0, name="w", max_pending_batches=limit)
        for seq, payload in bad_wire(sent, rng):
            feed.received(seq, payload, 0.0)
            if held_back and rng.random() < 0.1:
                feed.snapshot_arrived(held_back.pop())
            if rng.random() < 0.2:
                settle(feed, worker, rng if rng.random() < 0.5 else None)
        assert feed.stats().num_pending <= limit
    feed.received(*worker.publish(), 0.0)  # a gap marker may be due, and then the heartbeat that a quiet wire carries
    feed.received(*worker.publish(), 0.0)
    feed.received(*worker.publish(), 0.0)
    settle(feed, worker)
    assert index.claims() == worker.truth()
    assert feed.is_in_sync


# --- single cases


def asked(feed: Feed) -> NeedReplay:
    """What a replay now would answer."""
    assert isinstance(feed.need, NeedReplay)
    return feed.need


@pytest.fixture
def index() -> SetIndex:
    return SetIndex()


def batch(number: int, *keys: int, seq: int | None = None, epoch: int = 1) -> tuple[int, bytes]:
    """One that stores keys as event `number`, in a batch of the same number; without keys, a heartbeat after it."""
    events = [Stored(number, "device", tuple(map(key, keys)), None)] if keys else []
    return number if seq is None else seq, encode_batch(events, epoch=epoch, log_number=number)


def synced(index: SetIndex, **options: bool) -> Feed:
    """A feed that has an empty snapshot, and the first batch after it."""
    feed = Feed(index, 0, name="w", **options)
    if feed.need is not None:
        feed.snapshot_arrived(SnapshotMessage(1, -1, {}))
    feed.received(*batch(0, 100), 0.0)
    assert feed.need is None
    return feed


def test_nothing_is_claimed_before_the_snapshot(index: SetIndex) -> None:
    feed = Feed(index, 0, name="w")
    feed.received(*batch(5, 1), 0.0)
    assert (feed.need, index.claims()) == (NeedSnapshot(), {})
    feed.snapshot_arrived(SnapshotMessage(1, 4, {"device": [7]}))
    assert (feed.need, index.claims()) == (None, {"device": {1, 7}})


def test_a_gap_is_filled_by_replay_and_what_came_meanwhile_follows(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(3, 103), 0.0)
    assert asked(feed).from_seq == 1
    feed.replayed(asked(feed), *batch(1, 101), 0.0)
    feed.received(*batch(4, 104), 0.0)
    assert index.claims() == {"device": {100, 101}}
    feed.replayed(asked(feed), *batch(2, 102), 0.0)
    assert (feed.need, index.claims()) == (None, {"device": {100, 101, 102, 103, 104}})
    assert (feed.stats().gaps, feed.stats().replays, feed.stats().snapshots) == (1, 1, 1)


def test_what_replay_no_longer_has_comes_by_snapshot(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(3, 103), 0.0)
    feed.replayed(asked(feed), *batch(2, 102), 0.0)
    feed.replay_ended(asked(feed), is_complete=True)
    assert feed.need == NeedSnapshot()
    feed.snapshot_arrived(SnapshotMessage(1, 2, {"device": [100, 102]}))
    assert (feed.need, index.claims()) == (None, {"device": {100, 102, 103}})


def test_a_replay_that_breaks_off_is_asked_for_once_more(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(2, 102), 0.0)
    feed.replay_ended(asked(feed), is_complete=False)
    assert asked(feed).from_seq == 1
    feed.replay_ended(asked(feed), is_complete=False)
    assert feed.need == NeedSnapshot()


def test_a_late_batch_closes_the_gap_by_itself(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(2, 102), 0.0)
    feed.received(*batch(1, 101), 0.0)
    assert (feed.need, index.claims()) == (None, {"device": {100, 101, 102}})


def test_a_heartbeat_shows_that_the_last_batch_was_lost(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(0, seq=1), 0.0)
    assert feed.need is None
    feed.received(*batch(1, seq=3), 0.0)
    assert asked(feed).from_seq == 2


def test_events_that_the_publisher_itself_missed_are_asked_for_by_snapshot_at_once(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(50, seq=1), 0.0)
    assert feed.need == NeedSnapshot()


def test_a_batch_of_an_older_epoch_is_never_applied(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(0, 1, epoch=2), 0.0)
    assert (feed.need, index.claims()) == (NeedSnapshot(), {})  # blocks of the old process are gone at once
    feed.received(*batch(1, 101), 0.0)
    feed.snapshot_arrived(SnapshotMessage(1, 9, {"device": [100, 101]}))
    assert (feed.need, index.claims()) == (NeedSnapshot(), {})
    feed.snapshot_arrived(SnapshotMessage(2, -1, {}))
    feed.received(*batch(2, 102), 0.0)
    assert (feed.need, index.claims()) == (None, {"device": {1}})
    assert (feed.stats().restarts, feed.stats().stale) == (1, 3)


def test_a_snapshot_of_a_newer_epoch_begins_it(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(5, 105, seq=1), 0.0)
    feed.snapshot_arrived(SnapshotMessage(2, 3, {"device": [7]}))
    assert (feed.need, index.claims()) == (None, {"device": {7}})
    feed.received(*batch(1, 101), 0.0)
    assert index.claims() == {"device": {7}}


def test_an_expected_epoch_keeps_older_ones_out_from_the_start(index: SetIndex) -> None:
    feed = Feed(index, 0, name="w", epoch=5)
    feed.received(*batch(0, 1, epoch=4), 0.0)
    feed.snapshot_arrived(SnapshotMessage(4, 0, {"device": [1]}))
    assert (feed.need, index.claims()) == (NeedSnapshot(), {})
    assert feed.stats().restarts == 0


def test_a_large_snapshot_goes_in_piece_by_piece(index: SetIndex) -> None:
    feed = Feed(index, 0, name="w")
    starts = [(i, None if i == 0 else 5) for i in range(0, 100, 10)]
    feed.snapshot_arrived(SnapshotMessage(1, 4, {"host": list(range(100))}, {"host": starts}), 25)
    assert (len(index.claims()["host"]), feed.need, feed.is_loading) == (30, NeedSnapshot(), True)
    feed.received(*batch(5, 105), 0.0)
    assert "device" not in index.claims()
    while feed.is_loading:
        feed.load_some(25)
    assert (feed.need, index.claims()) == (None, {"host": set(range(100)), "device": {105}})


def test_nothing_is_applied_on_top_of_a_snapshot_that_is_not_yet_whole(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(2, 102), 0.0)
    feed.replay_ended(asked(feed), is_complete=True)
    starts = [(i, None) for i in range(100)]
    feed.snapshot_arrived(SnapshotMessage(1, 2, {"host": list(range(100))}, {"host": starts}), 25)
    feed.received(*batch(1, 101), 0.0)  # late
    feed.received(*batch(3, 103), 0.0)
    assert (feed.need, "device" in index.claims()) == (NeedSnapshot(), False)
    while feed.is_loading:
        feed.load_some(25)
    assert (feed.need, index.claims()) == (None, {"host": set(range(100)), "device": {103}})


def test_a_snapshot_that_is_older_than_what_is_known_is_passed_over(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(*batch(1, 101), 0.0)
    feed.received(*batch(5, 105, seq=2), 0.0)
    feed.snapshot_arrived(SnapshotMessage(1, 0, {"device": [100]}))
    assert (feed.need, index.claims()) == (NeedSnapshot(), {"device": {100, 101}})


def test_a_restart_while_a_snapshot_goes_in_ends_it(index: SetIndex) -> None:
    feed = Feed(index, 0, name="w")
    starts = [(i, None) for i in range(100)]
    feed.snapshot_arrived(SnapshotMessage(1, 4, {"host": list(range(100))}, {"host": starts}), 25)
    feed.received(*batch(0, 1, epoch=2), 0.0)
    assert (feed.need, feed.is_loading, index.claims()) == (NeedSnapshot(), False, {})


def test_what_cannot_be_read_counts_as_lost(index: SetIndex, caplog: pytest.LogCaptureFixture) -> None:
    feed = synced(index)
    feed.received(1, b"rubbish", 0.0)
    feed.received(2, msgspec.msgpack.encode([1.0, []]), 0.0)  # no epoch: not of a worker of ours
    feed.received(*batch(3, 103), 0.0)
    assert asked(feed).from_seq == 1
    assert feed.stats().malformed == 2
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1


def test_a_tier_of_a_later_release_is_passed_over(index: SetIndex) -> None:
    feed = synced(index)
    feed.received(1, encode_batch([Stored(1, "tape", (key(1),), None)], epoch=1, log_number=1), 0.0)
    assert (feed.need, index.claims(), feed.stats().unknown_events) == (None, {"device": {100}}, 1)


def test_without_snapshots_a_gap_that_nothing_fills_clears_the_worker(index: SetIndex) -> None:
    feed = synced(index, can_snapshot=False, can_replay=False)
    feed.received(*batch(2, 102), 0.0)
    assert (feed.need, index.claims(), feed.stats().losses) == (None, {"device": {102}}, 1)


# --- other engines

SIZE, ROOT = 2, chain_root(b"m", 2)
CONVERSATIONS = [[10 * number + i for i in range(6 * SIZE)] for number in range(5)]
LOS = [[int.from_bytes(k[:8], "little") for k in block_keys(c, SIZE, ROOT)] for c in CONVERSATIONS]


@dataclass
class Engine:
    """vLLM as a stream sees it: opaque hashes that differ from start to start, no epochs, no heartbeats, a ring of batches."""

    rng: random.Random
    ring_batches: int
    clock: float = 0.0
    name: int = 0
    seq: int = 0
    depths: list[int] = field(default_factory=lambda: [0] * len(CONVERSATIONS))
    waiting: list[BlockStored | BlockRemoved] = field(default_factory=list)
    ring: list[tuple[int, bytes]] = field(default_factory=list)

    def restart(self) -> None:
        self.name += 1
        self.seq, self.depths, self.waiting, self.ring = 0, [0] * len(CONVERSATIONS), [], []

    def hash(self, conversation: int, block: int) -> int:
        return (self.name % 2) * 3 + 100 * conversation + block  # after a restart some hashes mean other blocks

    def live(self) -> None:
        conversation = self.rng.randrange(len(CONVERSATIONS))
        depth = self.depths[conversation]
        new = self.rng.randint(0, 6)
        self.depths[conversation] = new
        if new > depth:
            hashes = [self.hash(conversation, block) for block in range(depth, new)]
            parent = self.hash(conversation, depth - 1) if depth else None
            tokens = CONVERSATIONS[conversation][depth * SIZE : new * SIZE]
            self.waiting.append(BlockStored(hashes, parent, tokens, SIZE, medium="GPU"))
        else:
            gone = [self.hash(conversation, block) for block in reversed(range(new, depth))]
            self.waiting.append(BlockRemoved(gone, medium="GPU"))

    def publish(self) -> tuple[int, bytes]:
        self.clock += 1.0
        message = self.seq, msgspec.msgpack.encode(EventBatch(self.clock, self.waiting, 0))
        self.waiting = []
        self.seq += 1
        self.ring = [*self.ring, message][-self.ring_batches :]
        return message

    def truth(self) -> set[int]:
        return {lo for los, depth in zip(LOS, self.depths, strict=True) for lo in los[:depth]}


def follow(index: SetIndex, **options: bool) -> Feed:
    return Feed(index, 0, name="v", foreign=ForeignKeys("v", b"m", SIZE), can_snapshot=False, **options)


def in_step(index: SetIndex, num_batches: int) -> tuple[Engine, Feed]:
    """An engine, and a feed that followed it from the start."""
    engine, feed = Engine(random.Random(3), 1000), follow(index)
    feed.replay_ended(asked(feed), is_complete=True)
    for _ in range(num_batches):
        engine.live()
        feed.received(*engine.publish(), 0.0)
    return engine, feed


def settle_engine(feed: Feed, engine: Engine, lossy: random.Random | None = None) -> None:
    for _ in range(30):
        if not isinstance(need := feed.need, NeedReplay):
            assert need is None
            return
        for seq, payload in engine.ring:
            if seq >= need.from_seq and (lossy is None or lossy.random() < 0.8):
                feed.replayed(need, seq, payload, 0.0)
        feed.replay_ended(need, is_complete=lossy is None or lossy.random() < 0.7)
    raise AssertionError(f"never settles: needs {feed.need}, {feed.stats()}")


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), ring=st.sampled_from([1, 4, 1000]), can_replay=st.booleans())
def test_of_another_engine_nothing_is_claimed_that_may_be_gone(seed: int, ring: int, can_replay: bool) -> None:
    rng = random.Random(seed)
    engine, index = Engine(rng, ring), SetIndex()
    feed = follow(index, can_replay=can_replay)
    share_lossy = rng.choice([0.0, 0.3])
    for _ in range(rng.randint(1, 12)):
        sent = []
        for _ in range(rng.randint(0, 6)):
            for _ in range(rng.randint(0, 3)):
                engine.live()
            sent.append(engine.publish())
        for message in bad_wire(sent, rng) if rng.random() < 0.7 else sent:
            feed.received(*message, 0.0)
            if rng.random() < 0.2:
                settle_engine(feed, engine, rng if rng.random() < share_lossy else None)
        if rng.random() < 0.2:
            engine.restart()
            feed.connection_lost()
        elif rng.random() < 0.1:
            feed.connection_lost()  # the network alone
    feed.received(*engine.publish(), 0.0)  # of a lost last batch nobody knows before the next one
    settle_engine(feed, engine)
    claims = index.claims().get("device", set())
    assert claims <= engine.truth()
    if ring == 1000 and can_replay and not share_lossy:
        assert feed.stats().losses == 0
        assert claims == engine.truth()


def test_a_late_joiner_reads_what_the_engine_still_has(index: SetIndex) -> None:
    engine = Engine(random.Random(3), 1000)
    for _ in range(20):
        engine.live()
        engine.publish()
    feed = follow(index)
    assert asked(feed).from_seq == 0
    feed.received(*engine.publish(), 0.0)
    assert index.claims() == {}
    settle_engine(feed, engine)
    assert index.claims() == {"device": engine.truth()}
    assert feed.stats().gaps == 0


def test_a_late_joiner_reads_more_batches_than_may_wait(index: SetIndex) -> None:
    engine = Engine(random.Random(3), 1000)
    for _ in range(20):
        engine.live()
        engine.publish()
    feed = Feed(index, 0, name="v", foreign=ForeignKeys("v", b"m", SIZE), can_snapshot=False, max_pending_batches=3)
    settle_engine(feed, engine)
    assert index.claims() == {"device": engine.truth()}
    assert feed.stats().overflows == 0


def test_a_batch_from_before_the_start_is_told_from_one_of_a_new_engine_by_its_time(index: SetIndex) -> None:
    engine = Engine(random.Random(3), 1000)
    engine.live()
    early = engine.publish()
    feed = follow(index)
    feed.replay_ended(asked(feed), is_complete=True)
    for _ in range(3):
        engine.live()
        feed.received(*engine.publish(), 0.0)
    feed.received(*early, 0.0)
    assert (feed.stats().restarts, feed.stats().duplicates) == (0, 1)
    engine.restart()
    feed.received(*engine.publish(), 0.0)
    assert (feed.stats().restarts, index.claims()) == (1, {})


def test_answers_to_an_earlier_question_are_passed_over(index: SetIndex) -> None:
    engine, feed = in_step(index, num_batches=4)
    feed.connection_lost()
    question, answers = asked(feed), list(engine.ring)
    feed.connection_lost()
    for answer in answers:
        feed.replayed(question, *answer, 0.0)
    feed.replay_ended(question, is_complete=True)
    assert (asked(feed).from_seq, feed.stats().losses, feed.stats().duplicates) == (3, 0, 0)
    settle_engine(feed, engine)
    assert index.claims() == {"device": engine.truth()}


def test_a_silent_engine_is_in_sync_when_its_replay_was_empty(index: SetIndex) -> None:
    feed = follow(index)
    feed.replay_ended(asked(feed), is_complete=True)
    assert feed.is_in_sync
    assert follow(index, can_replay=False).is_in_sync


def test_a_gap_that_replay_cannot_fill_clears_the_worker_and_is_told_once(
    index: SetIndex, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(random.Random(3), 1)
    feed = follow(index)
    feed.replay_ended(asked(feed), is_complete=True)
    for _ in range(2):
        engine.live()
        feed.received(*engine.publish(), 0.0)
        engine.live()
        engine.publish()
        feed.received(*engine.publish(), 0.0)
        settle_engine(feed, engine)
        assert index.claims() == {}
    assert feed.stats().losses == 2
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1


def test_an_engine_that_began_anew_is_known_by_its_numbers(index: SetIndex) -> None:
    engine, feed = in_step(index, num_batches=4)
    engine.restart()
    feed.received(*engine.publish(), 0.0)
    assert (feed.stats().restarts, index.claims()) == (1, {})


def test_an_engine_that_began_anew_and_reached_the_same_number_is_known_by_its_past(index: SetIndex) -> None:
    engine, feed = in_step(index, num_batches=4)
    engine.restart()
    for _ in range(4):
        engine.live()
        engine.publish()
    feed.connection_lost()
    engine.live()
    feed.received(*engine.publish(), 0.0)  # the number that was expected next
    settle_engine(feed, engine)
    assert (feed.stats().restarts, index.claims()) == (1, {"device": engine.truth()})


def test_after_a_broken_connection_the_same_engine_goes_on(index: SetIndex) -> None:
    engine, feed = in_step(index, num_batches=4)
    feed.connection_lost()
    engine.live()
    feed.received(*engine.publish(), 0.0)
    settle_engine(feed, engine)
    assert (feed.stats().restarts, feed.stats().losses, index.claims()) == (0, 0, {"device": engine.truth()})
