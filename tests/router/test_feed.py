"""A simulated publisher, a wire that loses, doubles and reorders, and an index that is a set: claims end at the truth."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.event_wire import SnapshotMessage, encode_batch
from dynamo.kvcache.events import Cleared, Event, Removed, Stored
from dynamo.kvcache.hashing import BlockKey
from dynamo.router.feed import Feed, NeedReplay, NeedSnapshot

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
        return SnapshotMessage(self.epoch, self.log_number, {tier: sorted(keys) for tier, keys in self.held.items()})

    def truth(self) -> dict[str, set[int]]:
        return {tier: set(keys) for tier, keys in self.held.items() if keys}


def settle(feed: Feed, worker: Worker, lossy: random.Random | None = None) -> None:
    """Does what the feed needs; with `lossy`, each answer may be partly lost."""
    for _ in range(20):
        match feed.need:
            case None:
                return
            case NeedReplay(from_seq):
                answers = [m for m in worker.ring if m[0] >= from_seq]
                if lossy:
                    answers = [m for m in answers if lossy.random() < 0.7]
                for seq, payload in answers:
                    feed.replayed(seq, payload, 0.0)
                feed.replay_ended(is_complete=not lossy or lossy.random() < 0.7)
            case NeedSnapshot():
                feed.snapshot_arrived(worker.snapshot())
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
