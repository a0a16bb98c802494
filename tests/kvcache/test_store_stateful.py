"""Random use of the mover and the store over a disk that is late, fails, tears and reorders: nothing lost, nothing wrong.

A short run belongs to the ordinary tests. For a long one, say how many steps:

    DYNAMO_STATEFUL_STEPS=100000 pytest tests/kvcache/test_store_stateful.py --timeout 3600
"""

import hashlib
import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.offload import SaveRequest
from dynamo.kvcache.onboard import LoadRequest
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.stats import CacheCounters
from dynamo.kvcache.store import BlockStore
from dynamo.tiers.arena import map_rows
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.fake_kvikio import FakeKvikio
from dynamo.tiers.host import HostTier
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.mover import Priority

LAYOUT = BlockLayout(num_layers=3, block_size=2, num_kv_heads=2, head_dim=8, itemsize=4)
NUM_DEVICE_SLOTS, NUM_HOST_SLOTS, NUM_STAGING, NUM_DISK_SLOTS = 48, 10, 4, 24
STEPS_PER_EXAMPLE = 100
KVIKIO = FakeKvikio()
TIMEOUT_S = 30.0
GARBAGE = 0xEE
COMPUTED = 0x5A

CHAINS = st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from([1, 3, 5, 8, 9]))
PICKS = st.integers(0, 1000)
FAULTS = st.sampled_from(["fail", "fail_once", "tear", "hold"])


def chain_keys(chain: tuple[int, int, int]) -> list[BlockKey]:
    """Chains of equal family share three blocks; those of equal variant, everything."""
    family, variant, length = chain
    keys: list[BlockKey] = []
    for i in range(length):
        name = bytes([family, variant if i >= 3 else 0, i])
        keys.append(BlockKey(hashlib.blake2b((keys[-1] if keys else b"") + name, digest_size=16).digest()))
    return keys


def payload(key: BlockKey) -> np.ndarray:
    """uint8 [block_bytes]: what the block of that name consists of."""
    return np.frombuffer(hashlib.shake_128(key).digest(LAYOUT.block_bytes), dtype=np.uint8)


class FaultyDisk(DiskTier):
    """A disk tier whose next calls go wrong as `script` says. Held calls wait for `let_go`."""

    script: "deque[tuple[str, str, int]]"  # (read or write, fault, seed)
    held: "list[threading.Event]"
    is_open: bool

    def prepare(self) -> None:
        self.script = deque()
        self.held = []
        self.is_open = False

    def let_go(self, pick: int) -> None:
        """Any of the calls that are held goes on: not the first one first."""
        if self.held:
            self.held.pop(pick % len(self.held)).set()

    def read(self, slots, rows, row_ids):
        return self._read(super().read, slots, rows, row_ids, rows)

    def read_device(self, slots, rows, row_ids):
        return self._read(super().read_device, slots, rows, row_ids, rows.numpy())

    def write(self, slots, rows, row_ids):
        return self._write_some(super().write, slots, rows, row_ids, lambda torn: torn)

    def write_device(self, slots, rows, row_ids):
        return self._write_some(super().write_device, slots, rows, row_ids, torch.from_numpy)

    def _read(self, read, slots, target, row_ids, rows):
        fault, rng = self._next_fault("read", len(slots))
        outcomes = read(slots, target, row_ids)
        if fault in ("fail", "fail_once") and len(slots):
            bad = rng.integers(len(slots))
            rows[row_ids[bad]] = GARBAGE
            outcomes[bad] = False
            if fault == "fail":
                self.script.appendleft(("read", "fail_once", 0))
        elif fault == "tear" and len(slots):
            rows[row_ids[rng.integers(len(slots))], LAYOUT.block_bytes // 2 :] = GARBAGE
        return outcomes

    def _write_some(self, write, slots, rows, row_ids, as_rows):
        fault, rng = self._next_fault("write", len(slots))
        if fault == "tear" and len(slots):
            torn = map_rows(LAYOUT, len(slots))
            torn[:] = np.asarray(rows)[row_ids]
            torn[rng.integers(len(slots)), LAYOUT.block_bytes // 2 :] = GARBAGE
            return write(slots, as_rows(torn), np.arange(len(slots)))
        outcomes = write(slots, rows, row_ids)
        if fault in ("fail", "fail_once") and len(slots):
            outcomes[rng.integers(len(slots))] = False
        return outcomes

    def _next_fault(self, call: str, num_slots: int) -> tuple[str, np.random.Generator]:
        try:
            kind, fault, seed = self.script[0]
            if kind != call or not num_slots:
                return "", np.random.default_rng(0)
            self.script.popleft()
        except IndexError:
            return "", np.random.default_rng(0)
        if fault == "hold" and not self.is_open:
            gate = threading.Event()
            self.held.append(gate)
            deadline = time.monotonic() + TIMEOUT_S
            while not gate.wait(0.02) and not self.is_open:
                assert time.monotonic() < deadline, "a call was never let go"
        return fault, np.random.default_rng(seed)


class StoreMachine(RuleBasedStateMachine):
    """Chains are saved and loaded in a store of 10 host rows and 24 disk slots; this is the device pool's part.

    With `gds`, and without a host tier, blocks go between disk and device directly, as they do with GPUDirect Storage.
    """

    @initialize(host=st.sampled_from([True, True, False]), gds=st.booleans())
    def start(self, host, gds):
        self.folder = Path(tempfile.mkdtemp(prefix="kv-store-stateful-"))
        self.device = DeviceTier(LAYOUT, torch.float32, NUM_DEVICE_SLOTS, "cpu")
        num_host = NUM_HOST_SLOTS if host else 0
        arena = HostTier(LAYOUT, num_host, num_staging=NUM_STAGING)
        self.disk = FaultyDisk.open(self.folder, LAYOUT, NUM_DISK_SLOTS * LAYOUT.slot_bytes, b"stateful", io_threads=1)
        self.disk.prepare()
        if gds:
            assert all(proof.ok for proof in self.disk.prove_gds(torch.device("cpu"), KVIKIO))
        # A file that has its size: a failed write is then not taken for a full disk.
        every_slot = np.arange(NUM_DISK_SLOTS)
        assert self.disk.write(every_slot, map_rows(LAYOUT, NUM_DISK_SLOTS), every_slot).all()
        self.counters = CacheCounters()
        planner = LoadPlanner(block_size=LAYOUT.block_size, block_bytes=LAYOUT.block_bytes)
        self.store = BlockStore(self.device, arena, num_host, self.disk, EventLog(), self.counters, planner)
        (path,) = [usage.device_path for usage in self.store.usage() if usage.tier == "disk"]
        assert path.startswith("one hop") == (gds and not host)
        self.scratch = map_rows(LAYOUT, NUM_DEVICE_SLOTS)
        self.free = list(range(NUM_DEVICE_SLOTS))
        self.released: deque[tuple[int, list[int]]] = deque()  # by listeners, on any thread
        self.saves: dict[int, list[int]] = {}  # slots lent to offloads, by number
        self.num_saves = 0
        self.ends: Counter[int] = Counter()
        self.loads: list = []
        self.num_computed: Counter = Counter()  # leading blocks of a load that the caller has computed meanwhile
        self.idle: list[int] = []  # slots that nothing may write to any more
        self.savings: list = []  # by layers, not committed

    def teardown(self):
        if not hasattr(self, "store"):
            return
        self.open_all()
        try:
            for load in self.loads:
                self.settle(load, None)
            for saving, _, _ in self.savings:
                self.store.abandon(saving)
            assert self.store.flush(TIMEOUT_S), "something offered has neither arrived nor was dropped"
            deadline = time.monotonic() + TIMEOUT_S
            while self.saves:
                self.take_back()
                assert time.monotonic() < deadline, f"offloads never gave back {self.saves}"
            self.check_idle()
            while min(self.ends.values(), default=1) < 1:  # it is told right after the end, by the thread that ended it
                assert time.monotonic() < deadline, "an end was never told"
                time.sleep(0.001)
            assert max(self.ends.values(), default=1) == 1, "an end was told twice"
            while any(usage.num_pinned_blocks for usage in self.store.usage()):
                assert time.monotonic() < deadline, "pins were never given back"
            self.store.check_invariants()
        finally:
            self.store.close(TIMEOUT_S)
            self.device.close()
            shutil.rmtree(self.folder)

    # Device slots.

    def take(self, count: int) -> np.ndarray | None:
        self.take_back()
        if len(self.free) < count:
            self.check_idle()
            self.free, self.idle = self.free + self.idle, []
        if len(self.free) < count:
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return np.array(taken, dtype=np.int64)

    def fill(self, slots: np.ndarray, payloads: list[np.ndarray] | None) -> None:
        for i in range(len(slots)):
            self.scratch[i, : LAYOUT.block_bytes] = GARBAGE if payloads is None else payloads[i]
        self.device.write(slots, self.scratch, np.arange(len(slots)))

    def content(self, slots: np.ndarray) -> np.ndarray:
        rows = map_rows(LAYOUT, max(1, len(slots)))
        self.device.read(slots, rows, np.arange(len(slots)))
        return rows[: len(slots), : LAYOUT.block_bytes]

    def retire(self, slots: np.ndarray) -> None:
        self.fill(slots, None)
        self.idle += slots.tolist()

    def check_idle(self) -> None:
        assert (self.content(np.array(self.idle, dtype=np.int64)) == GARBAGE).all(), "a slot was written after its end"

    def take_back(self) -> None:
        while self.released:
            number, slots = self.released.popleft()
            assert self.saves.pop(number, None) == slots, "an offload gave back its slots twice"
            self.retire(np.array(slots, dtype=np.int64))

    def save_request(self, chain, first: int) -> SaveRequest | None:
        keys = chain_keys(chain)
        first = first % len(keys)
        slots = self.take(len(keys) - first)
        if slots is None:
            return None
        self.fill(slots, [payload(key) for key in keys[first:]])
        number = self.num_saves = self.num_saves + 1
        self.saves[number] = slots.tolist()
        return SaveRequest(keys, first, slots, [], lambda: self.released.append((number, slots.tolist())))

    # What a cache does.

    @rule(chain=CHAINS, first=st.sampled_from([0, 0, 0, 1, 4]))
    def save(self, chain, first):
        request = self.save_request(chain, first)
        if request is not None:
            self.store.save(request, 0.0)

    @rule(
        chain=CHAINS,
        before=st.sampled_from(["nothing", "settle", "cool"]),
        timeout_s=st.sampled_from([0.0, 0.002, 10.0]),
        priority=st.sampled_from(Priority),
        from_end=st.booleans(),
    )
    def load(self, chain, before, timeout_s, priority, from_end):
        if before != "nothing":
            self.settle_offloads()
        if before == "cool":
            self.store.clear("host")
        self.begin_load(chain, timeout_s, priority, from_end=from_end)

    def begin_load(self, chain, timeout_s, priority, *, from_end=False):
        keys = chain_keys(chain)
        count = self.store.count_loadable(keys)
        slots = self.take(count)
        if slots is None or not count:
            return
        self.fill(slots, None)
        number = len(self.ends)
        self.ends[number] = 0
        request = LoadRequest(keys, 0, slots, [], np.zeros(count, dtype=np.uint8), priority=priority, from_end=from_end)
        load = self.store.load(request, timeout_s)

        def tell() -> None:
            self.ends[number] += 1

        load.when_ended(tell)
        load.on_progress(lambda: load.extend(time.monotonic() + 0.001))
        self.loads.append(load)

    def settle(self, load, timeout_s) -> None:
        """Waits for a load, and looks at what it brought."""
        load.wait(timeout_s)
        request, num_computed = load.request, self.num_computed.pop(load, 0)
        found = self.content(request.device_slots)
        assert (found[:num_computed] == COMPUTED).all(), "a block was written that the caller computes"
        for i in np.flatnonzero(load.arrived[num_computed:]) + num_computed:
            assert (found[i] == payload(request.chain[i])).all(), f"block {i} that arrived is wrong"
        self.retire(request.device_slots)

    @rule(pick=PICKS, count=st.integers(1, 8))
    def compute_meanwhile(self, pick, count):
        if self.loads:
            self.compute(self.loads[pick % len(self.loads)], count)

    @rule(chain=CHAINS, count=st.integers(1, 8))
    def compute_while_a_read_is_under_way(self, chain, count):
        self.settle_offloads()
        self.store.clear("host")
        self.disk.script.clear()
        self.disk.script.append(("read", "hold", 0))
        before = len(self.loads)
        self.begin_load(chain, 10.0, Priority.LOAD, from_end=True)
        if len(self.loads) > before:
            load = self.loads.pop()
            deadline = time.monotonic() + TIMEOUT_S
            while not (self.disk.held or load.is_ended) and time.monotonic() < deadline:
                time.sleep(0.0001)
            self.compute(load, count)
            self.open_all()
            self.settle(load, None)
            self.disk.is_open = False

    def compute(self, load, count) -> None:
        """What a caller does with the next `count` blocks of a load that comes from the end."""
        first = self.num_computed[load]
        end = min(load.num_blocks, first + count)
        load.raise_floor(end)
        self.num_computed[load] = end
        self.scratch[: end - first, : LAYOUT.block_bytes] = COMPUTED
        self.device.write(load.request.device_slots[first:end], self.scratch, np.arange(end - first))

    @rule(pick=PICKS, timeout_s=st.sampled_from([None, 0.0, 0.001]))
    def wait(self, pick, timeout_s):
        if self.loads:
            if timeout_s is None:
                self.open_all()
            self.settle(self.loads.pop(pick % len(self.loads)), timeout_s)
            self.disk.is_open = False

    @rule(pick=PICKS)
    def cancel(self, pick):
        if self.loads:
            load = self.loads.pop(pick % len(self.loads))
            load.cancel()
            self.num_computed.pop(load, None)
            self.retire(load.request.device_slots)

    @rule(pick=PICKS, num_waits=st.integers(0, 3))
    def go_on_by_layers(self, pick, num_waits):
        if self.loads and not self.num_computed[self.loads[pick % len(self.loads)]]:
            self.load_layers(self.loads.pop(pick % len(self.loads)), num_waits)

    @rule(chain=CHAINS, num_waits=st.integers(0, 3))
    def load_by_layers(self, chain, num_waits):
        self.settle_offloads()
        before = len(self.loads)
        self.begin_load(chain, 10.0, Priority.LOAD)
        if len(self.loads) > before:
            self.load_layers(self.loads.pop(), num_waits)

    def load_layers(self, load, num_waits):
        request = load.request
        layers = self.store.begin_layerwise(load)
        slots = request.device_slots[: layers.num_blocks]
        for layer in range(num_waits):
            layers.wait(layer, TIMEOUT_S)
            columns = slice(2 * layer * LAYOUT.plane_bytes, 2 * (layer + 1) * LAYOUT.plane_bytes)
            found = self.content(slots)[:, columns]
            for i in range(len(slots)):
                assert (found[i] == payload(request.chain[i])[columns]).all(), f"layer {layer} of block {i} is wrong"
        layers.cancel()
        self.retire(request.device_slots)

    @rule(chain=CHAINS, first=st.sampled_from([0, 0, 1]), order=st.sampled_from([(0, 1, 2), (0, 1), (1, 0, 2)]))
    def save_by_layers(self, chain, first, order):
        request = self.save_request(chain, first)
        saving = request and self.store.begin_layers(request)
        if saving:
            for layer in order:
                self.store.save_layer(saving, layer, [])
            self.savings.append((saving, chain, request.first))

    @rule(pick=PICKS, is_committed=st.booleans())
    def end_layers(self, pick, is_committed):
        if not self.savings:
            return
        saving, chain, first = self.savings.pop(pick % len(self.savings))
        request = self.save_request(chain, first) if is_committed else None
        if request is None:
            self.store.abandon(saving)
        else:
            with_layers = SaveRequest(
                request.chain, request.first, request.device_slots, [], request.release, layers=saving
            )
            self.store.save(with_layers, 0.0)

    @rule(chain=CHAINS)
    def touch(self, chain):
        self.store.touch(chain_keys(chain))

    @rule(tier=st.sampled_from(["host", "disk"]), die=st.integers(0, 4))
    def clear(self, tier, die):
        if not die:
            self.store.clear(tier)

    # What goes wrong.

    @rule(call=st.sampled_from(["read", "write"]), fault=FAULTS, seed=PICKS)
    def go_wrong(self, call, fault, seed):
        self.disk.script.append((call, fault, seed))

    @rule(pick=PICKS)
    def let_go(self, pick):
        self.disk.let_go(pick)

    @rule(die=st.integers(0, 9))
    def lose_the_file(self, die):
        if die:
            return
        for path in self.folder.rglob("blocks.dat"):
            path.unlink()

    @rule()
    def flush(self):
        self.settle_offloads()

    def settle_offloads(self) -> None:
        self.open_all()
        assert self.store.flush(TIMEOUT_S)
        self.disk.is_open = False

    def open_all(self) -> None:
        self.disk.is_open = True
        while self.disk.held:
            self.disk.let_go(0)

    @invariant()
    def books_balance(self):
        if hasattr(self, "store"):
            self.take_back()
            self.store.check_invariants()


@pytest.mark.slow
def test_random_moves_with_faults_lose_nothing_and_give_no_wrong_byte(num_stateful_steps, monkeypatch):
    monkeypatch.setattr("dynamo.kvcache.store._PART_BYTES", 2 * LAYOUT.slot_bytes)  # so that a chain has several parts

    class Machine(StoreMachine):
        pass

    case = Machine.TestCase
    case.settings = settings(
        max_examples=max(1, num_stateful_steps // STEPS_PER_EXAMPLE),
        stateful_step_count=STEPS_PER_EXAMPLE,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    case("runTest").runTest()
