"""Times our index, feeds and router on the workload of `dynamo.perf router`."""

import gc
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynamo.kvcache.event_wire import SnapshotMessage, encode_batch
from dynamo.kvcache.events import Stored
from dynamo.kvcache.hashing import HASH_VERSION, BlockKey, chain_root, pack_tokens
from dynamo.perf.router_workload import BLOCK_SIZE, Prompt, RouterWorkload
from dynamo.router.chain import PrefixChain
from dynamo.router.config import RouterConfig
from dynamo.router.decision import RouteQuery
from dynamo.router.feed import Feed
from dynamo.router.index import PrefixIndex
from dynamo.router.router import Router
from dynamo.router.workers import LoadReport, WorkerCard

__all__ = ["LookUp", "RouterTimer", "memory_bytes", "route_times_ns", "time_calls_ns"]

_FINGERPRINT = bytes(16)
_ROOT_LO = chain_root(_FINGERPRINT, BLOCK_SIZE).lo
_BATCH_EVENTS = 64  # made outside of what is timed


@dataclass(frozen=True, slots=True)
class LookUp:
    """Nanoseconds of processor time of one prompt, several times each.

    Attributes:
        hash: to make all its keys.
        look_up: to find the reaches, with keys that are there.
        both: from its tokens to all reaches.
        scores: device blocks by worker.
    """

    hash: list[float]
    look_up: list[float]
    both: list[float]
    scores: dict[int, int]


class RouterTimer:
    """One index, whose slots are the workload's workers."""

    def __init__(self, workload: RouterWorkload) -> None:
        self._workload = workload
        self._index = PrefixIndex()
        self._slots: list[int] = []

    def store(self) -> int:
        """A new index, and every event applied, from lists of keys. Returns nanoseconds."""
        index = self._renew()
        total = 0
        for batch in self._workload.batches(_BATCH_EVENTS):
            begun = time.process_time_ns()
            for worker, keys in batch:
                index.stored(worker, "device", keys, None)
            total += time.process_time_ns() - begun
        return total

    def store_from_wire(self) -> int:
        """The same from the bytes that workers send, each event a batch of its own. Returns nanoseconds."""
        index = self._renew()
        feeds = [Feed(index, slot, name=f"worker-{slot}", epoch=1) for slot in self._slots]
        for feed in feeds:
            feed.snapshot_arrived(SnapshotMessage(1, -1, {}))
        numbers = [0] * len(feeds)
        total = 0
        for batch in self._workload.batches(_BATCH_EVENTS):
            messages = []
            for worker, keys in batch:
                number = numbers[worker]
                numbers[worker] += 1
                event = Stored(number, "device", tuple(map(_block_key, keys)), None)
                messages.append((feeds[worker], number, encode_batch([event], epoch=1, log_number=number, ts=0.0)))
            begun = time.process_time_ns()
            for feed, number, payload in messages:
                feed.received(number, payload, 0.0)
            total += time.process_time_ns() - begun
        if not all(feed.is_in_sync for feed in feeds):
            raise RuntimeError("a feed lost a batch that it was given")
        return total

    def remove(self) -> int:
        """Every event's blocks again, last to first. Returns nanoseconds."""
        total = 0
        for batch in self._workload.batches(_BATCH_EVENTS):
            backwards = [(worker, keys[::-1]) for worker, keys in batch]
            begun = time.process_time_ns()
            for worker, keys in backwards:
                self._index.removed(worker, "device", keys)
            total += time.process_time_ns() - begun
        return total

    def hold(self) -> None:
        """Stores what the prompts' holders hold."""
        for prompt in self._workload.prompts:
            keys = _chain(prompt).keys(prompt.num_blocks)
            for worker, depth in prompt.depths.items():
                self._index.stored(worker, "device", keys[:depth], None)

    def match(self, prompt: Prompt, calls: int, repeats: int) -> LookUp:
        """Times one prompt's look-up; each sample is the mean of `calls`."""
        hashed = _chain(prompt)
        hashed.hashed(prompt.num_blocks)
        match = self._index.match
        return LookUp(
            time_calls_ns(lambda: _chain(prompt).hashed(prompt.num_blocks), calls, repeats),
            time_calls_ns(lambda: match(hashed), calls, repeats),
            time_calls_ns(lambda: match(_chain(prompt)), calls, repeats),
            {slot: reach.device for slot, reach in match(hashed).items()},
        )

    def make_hole(self, prompt: Prompt) -> None:
        """Takes a block out of the middle of what the prompt's second holder has."""
        worker, depth = list(prompt.depths.items())[1]
        self._index.removed(worker, "device", [_chain(prompt).keys(depth)[depth // 2]])

    def clear(self, worker: int) -> int:
        """Nanoseconds to forget a worker's blocks."""
        begun = time.process_time_ns()
        self._index.cleared(worker)
        return time.process_time_ns() - begun

    def sweep(self) -> tuple[int, int]:
        """(nanoseconds, entries) to free the memory of what was cleared."""
        begun = time.process_time_ns()
        entries = self._index.sweep(0.0, 1 << 60)
        return time.process_time_ns() - begun, entries

    def replace(self, worker: int) -> tuple[int, int]:
        """(nanoseconds, blocks) to take a worker's snapshot over, in runs as our workers send it."""
        runs = [self._workload.keys_of(chain) for one, chain in self._workload.events if one == worker]
        begun = time.process_time_ns()
        self._index.replace(worker, {})
        for keys in runs:
            self._index.stored(worker, "device", keys, None)
        return time.process_time_ns() - begun, sum(map(len, runs))

    def num_bytes(self) -> int:
        """Memory as the index counts it."""
        return self._index.stats().num_bytes

    def _renew(self) -> PrefixIndex:
        self._index = index = PrefixIndex()
        gc.collect()
        self._slots = [index.join() for _ in range(self._workload.num_workers)]
        return index


def memory_bytes(num_workers: int, num_blocks: int) -> tuple[int, int]:
    """(what a fresh process grows by, what the index itself counts) with that many (worker, block) pairs stored."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown_bytes, num_workers, num_blocks).result()


def route_times_ns(num_workers: int, prompt_blocks: int, calls: int, repeats: int) -> dict[str, list[float]]:
    """Nanoseconds of processor time of one decision, by step; each sample is the mean of `calls`.

    Every prompt is new but for its first half, which a tenth of the workers hold; each is booked, and freed at once.
    """
    config = RouterConfig(mode="kv")
    router = Router(config, rng=random.Random(1))
    generator = np.random.default_rng(1)
    stem = generator.integers(0, 1 << 17, prompt_blocks // 2 * BLOCK_SIZE, dtype=np.uint32)
    keys = PrefixChain(_ROOT_LO, stem.tobytes(), BLOCK_SIZE).keys(prompt_blocks // 2)
    for number in range(num_workers):
        slot = router.join(_card(number))
        router.report(f"worker-{number}", LoadReport(num_running=number % 7, num_waiting=0, prefill_tokens_waiting=0))
        if number % 10 == 0:
            router.index.stored(slot, "device", keys, None)
    rest = [
        generator.integers(0, 1 << 17, prompt_blocks * BLOCK_SIZE - len(stem), dtype=np.uint32)
        for _ in range(calls * (repeats + 1))
    ]
    queries = iter(
        [RouteQuery(tokens=pack_tokens(np.concatenate([stem, tail])), request_id=str(i)) for i, tail in enumerate(rest)]
    )
    parts: dict[str, list[float]] = {"hash": [], "look_up": [], "choice": [], "all": []}
    for turn in range(repeats + 1):
        begun = time.process_time_ns()
        decisions = []
        for _ in range(calls):
            decision, booking = router.route(next(queries))
            booking.free()
            decisions.append(decision)
        elapsed = time.process_time_ns() - begun
        if turn:  # the first only warms up
            parts["all"].append(elapsed / calls)
            for part in ("hash", "look_up", "choice"):
                seconds = sorted(getattr(decision.overhead, _PARTS[part]) for decision in decisions)
                parts[part].append(1e9 * seconds[len(seconds) // 2])
    return parts


_PARTS = {"hash": "hash_s", "look_up": "lookup_s", "choice": "choice_s"}


def time_calls_ns(action: Callable[[], object], calls: int, repeats: int) -> list[float]:
    """Nanoseconds of one call, `repeats` times the mean of `calls`."""
    action()
    samples = []
    for _ in range(repeats):
        begun = time.process_time_ns()
        for _ in range(calls):
            action()
        samples.append((time.process_time_ns() - begun) / calls)
    return samples


def _grown_bytes(num_workers: int, num_blocks: int) -> tuple[int, int]:
    workload = RouterWorkload.make(num_workers, num_blocks, [])
    timer = RouterTimer(workload)
    gc.collect()
    before = _resident_bytes()
    timer.store()
    gc.collect()
    return _resident_bytes() - before, timer.num_bytes()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _chain(prompt: Prompt) -> PrefixChain:
    return PrefixChain(_ROOT_LO, memoryview(prompt.tokens).cast("B"), BLOCK_SIZE)


def _block_key(lo: int) -> BlockKey:
    return BlockKey(lo.to_bytes(8, "little") + bytes(8))


def _card(number: int) -> WorkerCard:
    return WorkerCard(
        worker_id=f"worker-{number}",
        epoch=1,
        model="perf",
        fingerprint=_FINGERPRINT.hex(),
        hash_version=HASH_VERSION,
        block_size=BLOCK_SIZE,
        num_blocks={"device": 100_000},
        max_running=256,
    )
