"""No gap before a block, checked against the plain definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.reach import reachable


def plainly_reachable(pool, keys, parents):
    found = {None}
    mask = []
    for key, parent in zip(keys, parents, strict=True):
        mask.append(parent in found or parent in pool)
        if mask[-1]:
            found.add(key)
    return mask


@st.composite
def offers(draw):
    """Keys with parents among earlier keys, blocks of the pool, strangers, or none; and which keys the pool has."""
    count = draw(st.integers(0, 12))
    keys = [BlockKey(bytes([1, i]) + bytes(14)) for i in range(count)]
    others = [BlockKey(bytes([2, i]) + bytes(14)) for i in range(3)]
    parents = [draw(st.sampled_from([None, *others, *keys[:i], *keys[max(0, i - 1) : i] * 9])) for i in range(count)]
    present = draw(st.sets(st.sampled_from([*keys, *others[:2]]), max_size=5))
    return keys, parents, sorted(present)


@given(offers())
def test_blocks_are_reachable_through_the_pool_and_through_one_another(offer):
    keys, parents, present = offer
    pool = BlockPool(16)
    if present:
        room = pool.allocate(len(present))
        assert room is not None
        pool.register(present, room.slots)
    mask = reachable(pool, keys, parents)
    assert mask.dtype == np.bool_
    assert mask.tolist() == plainly_reachable(pool, keys, parents)
