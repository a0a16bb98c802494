import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.lineage import NO_PARENT, runs_of_slots


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 60))
def test_runs_hold_every_block_once_after_its_parent(seed: int, count: int) -> None:
    rng = random.Random(seed)
    slots = rng.sample(range(100), count)
    parents = np.full(100, NO_PARENT, dtype=np.int32)
    for i, slot in enumerate(slots):
        if i and rng.random() < 0.9:
            parents[slot] = slots[i - 1] if rng.random() < 0.6 else rng.choice(slots[:i])
    runs = runs_of_slots(np.array(sorted(slots), dtype=np.int64), parents)
    assert sorted(slot for run in runs for slot in run) == sorted(slots)
    seen: set[int] = set()
    for run in runs:
        assert all(parents[slot] == before for before, slot in zip(run, run[1:], strict=False))
        assert parents[run[0]] in (NO_PARENT, *seen)
        seen.update(run)
    # as few as there can be: each block has at most one follower in its run
    num_leaves = len(set(slots) - set(parents[slots].tolist()))
    assert len(runs) == num_leaves
