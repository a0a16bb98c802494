"""The index against a model that keeps plain sets and counts leading blocks one by one."""

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynamo.router.chain import PrefixChain
from dynamo.router.index import TIERS, PrefixIndex, Reach

_BRANCHES = 2
_DEPTH = 5
_STEM = 70  # blocks that all sequences share, so that look-ups take more than one stretch


def _universe() -> dict[tuple[int, ...], PrefixChain]:
    """Every sequence of a tree: a stem, then all ways through a few forks."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(_DEPTH):
        paths = [(*path, branch) for path in paths for branch in range(_BRANCHES)]
    return {
        path: PrefixChain(7, memoryview(array("I", [*range(_STEM), *(1000 + b for b in path)])).cast("B"), 1)
        for path in paths
    }


CHAINS = _universe()
PATHS = sorted(CHAINS)
PARENTS: dict[int, int | None] = {}
for _chain in CHAINS.values():
    _keys = _chain.keys(_chain.num_blocks)
    PARENTS.update(zip(_keys, [None, *_keys], strict=False))
KEYS = sorted(PARENTS)

paths = st.sampled_from(PATHS)
tiers = st.sampled_from(["device"] * 4 + list(TIERS))  # the same lane again and again finds more
positions = st.integers(0, _STEM + _DEPTH)
ends = st.one_of(st.integers(_STEM - 2, _STEM + _DEPTH), positions)  # more often where sequences part


class Model:
    """What `PrefixIndex` should answer."""

    def __init__(self) -> None:
        self.held: dict[int, dict[str, set[int]]] = {}
        self.expires: dict[int, dict[int, float]] = {}

    def reach(self, slot: int, keys: Sequence[int], now_s: float) -> Reach:
        expires = self.expires[slot]
        reachable = {key for key in keys if expires.get(key, now_s) > now_s}
        depths = []
        for tier in TIERS:
            reachable |= self.held[slot][tier]
            depths.append(next((i for i, key in enumerate(keys) if key not in reachable), len(keys)))
        return Reach(*depths)

    def match(self, keys: Sequence[int], now_s: float) -> dict[int, Reach]:
        busy = [slot for slot, held in self.held.items() if self.expires[slot] or any(held.values())]
        reaches = {slot: self.reach(slot, keys, now_s) for slot in busy}
        return {slot: reach for slot, reach in reaches.items() if reach.remote}


class IndexMachine(RuleBasedStateMachine):
    """Events of any order and sense, from workers that come and go."""

    @initialize(max_run_blocks=st.sampled_from([1, 8, 24, 512]), num_workers=st.sampled_from([1, 3, 512]))
    def start(self, max_run_blocks: int, num_workers: int) -> None:
        self.index = PrefixIndex(max_run_blocks=max_run_blocks)
        self.model = Model()
        self.now_s = 0.0
        self.num_unswept = 0
        for _ in range(num_workers):
            self.join()

    @precondition(lambda self: len(self.model.held) < 512)
    @rule()
    def join(self) -> None:
        slot = self.index.join()
        assert slot not in self.model.held
        self.model.held[slot] = {tier: set() for tier in TIERS}
        self.model.expires[slot] = {}

    def _slot(self, data: st.DataObject) -> int:
        slots = sorted(self.model.held)
        return data.draw(st.sampled_from([*slots[:1] * 3, slots[-1], *slots[:: max(1, len(slots) // 3)]]))

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        slot = self._slot(data)
        self.index.leave(slot)
        del self.model.held[slot], self.model.expires[slot]
        with pytest.raises(ValueError, match="no worker's"):
            self.index.stored(slot, "device", KEYS[:1], None)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), tier=tiers, path=paths, start=st.one_of(st.just(0), positions), end=ends)
    def store_a_stretch(self, data: st.DataObject, tier: str, path: tuple[int, ...], start: int, end: int) -> None:
        slot, chain = self._slot(data), CHAINS[path]
        keys = chain.keys(end)[start:]
        held = self.model.held[slot][tier]
        self.index.stored(slot, tier, keys, PARENTS[keys[0]] if keys else None)
        held.update(keys)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), tier=tiers)
    def store_behind_what_is_held(self, data: st.DataObject, tier: str) -> None:
        slot = self._slot(data)
        held = self.model.held[slot][tier]
        behind = [key for key in KEYS if PARENTS[key] in held and key not in held]
        if behind:
            key = data.draw(st.sampled_from(behind))
            self.index.stored(slot, tier, [key], PARENTS[key])
            held.add(key)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), tier=tiers, keys=st.lists(st.sampled_from(KEYS), max_size=6))
    def remove_anything(self, data: st.DataObject, tier: str, keys: list[int]) -> None:
        self._remove(self._slot(data), tier, keys)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), tier=tiers, path=paths, start=ends, end=ends, is_backwards=st.booleans())
    def remove_a_stretch(
        self, data: st.DataObject, tier: str, path: tuple[int, ...], start: int, end: int, is_backwards: bool
    ) -> None:
        keys = CHAINS[path].keys(end)[start:]
        self._remove(self._slot(data), tier, keys[::-1] if is_backwards else keys)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), tier=tiers, count=st.integers(1, 12))
    def evict_tails(self, data: st.DataObject, tier: str, count: int) -> None:
        slot = self._slot(data)
        left = set(self.model.held[slot][tier])
        victims = []
        for _ in range(min(count, len(left))):
            tails = left - {PARENTS[key] for key in left}
            victims.append(min(tails))
            left.discard(victims[-1])
        self._remove(slot, tier, victims)

    def _remove(self, slot: int, tier: str, keys: list[int]) -> None:
        held = self.model.held[slot][tier]
        assert self.index.removed(slot, tier, keys) == len(set(keys) - held)
        held.difference_update(keys)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), tier=st.one_of(st.none(), tiers))
    def clear(self, data: st.DataObject, tier: str | None) -> None:
        slot = self._slot(data)
        self.index.cleared(slot, tier)
        for name in TIERS if tier is None else (tier,):
            self.model.held[slot][name] = set()
        if tier in (None, "device"):
            self.model.expires[slot] = {}

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), path=paths, ends=st.lists(ends, min_size=4, max_size=4))
    def replace(self, data: st.DataObject, path: tuple[int, ...], ends: list[int]) -> None:
        slot, chain = self._slot(data), CHAINS[path]
        held = {tier: chain.keys(end) for tier, end in zip(TIERS, ends, strict=True) if end > 3}
        held = {tier: [*keys[len(keys) // 2 :], *keys[: len(keys) // 2]] for tier, keys in held.items()}
        self.index.replace(slot, held)
        self.model.held[slot] = {tier: set(held.get(tier, ())) for tier in TIERS}

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), path=paths, end=ends, for_s=st.integers(0, 6))
    def predict(self, data: st.DataObject, path: tuple[int, ...], end: int, for_s: int) -> None:
        slot = self._slot(data)
        keys = CHAINS[path].keys(end)
        self.index.predict(slot, keys, self.now_s + for_s)
        for key in keys:
            self.model.expires[slot][key] = max(self.now_s + for_s, self.model.expires[slot].get(key, 0.0))

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(max_steps=st.sampled_from([1, 10, 10_000]))
    def sweep(self, max_steps: int) -> None:
        steps = self.index.sweep(self.now_s, max_steps)
        assert steps <= max_steps
        if steps < max_steps:
            assert self.index.stats().num_unswept == 0

    @invariant()
    def parts_agree(self) -> None:
        self.index.check_invariants()

    @invariant()
    def answers_are_the_models(self) -> None:
        for path in PATHS[::5]:
            chain = CHAINS[path]
            assert self.index.match(chain, self.now_s) == self.model.match(chain.keys(chain.num_blocks), self.now_s)
        counts = {slot: sum(map(len, held.values())) for slot, held in self.model.held.items()}
        entries = self.index.stats().entries
        assert {slot: sum(tiers.values()) for slot, tiers in entries.items()} == counts

    def teardown(self) -> None:
        for slot in list(self.model.held):
            self.index.leave(slot)
        self.index.sweep(self.now_s + 100, 10**9)
        stats = self.index.stats()
        assert (stats.num_blocks, stats.num_predicted, stats.num_unswept) == (0, 0, 0)
        self.index.check_invariants()


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)
TestIndex.pytestmark = [pytest.mark.timeout(600)]
