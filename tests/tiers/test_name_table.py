"""The vectorised name table against a dict."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.tiers.name_table import NameTable, name_words
from dynamo.tiers.records import PUT, ROOT_NAME, make_records, replay
from dynamo.tiers.recovered import RecoveredBlocks

few_names = st.lists(st.integers(0, 40), max_size=120)


def words_of(numbers: list[int]) -> np.ndarray:
    data = b"".join(number.to_bytes(16, "big") for number in numbers)
    return name_words(np.frombuffer(data, dtype=np.uint8).reshape(-1, 16))


@settings(deadline=None)
@given(names=few_names, queries=few_names)
def test_the_last_position_of_every_name_is_found(names: list[int], queries: list[int]) -> None:
    table = NameTable(words_of(names))
    last = {name: position for position, name in enumerate(names)}
    assert table.find(words_of(queries)).tolist() == [last.get(query, -1) for query in queries]
    assert table.is_last.tolist() == [last[name] == position for position, name in enumerate(names)]


def test_many_names_of_which_half_are_repeated() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**63, (40_000, 2)).astype(np.uint64)
    words[20_000:30_000] = words[rng.permutation(20_000)[:10_000]]
    table = NameTable(words)
    last = {word.tobytes(): position for position, word in enumerate(words)}
    assert table.is_last.sum() == len(last) == 30_000
    queries = np.concatenate([words[::7], rng.integers(0, 2**63, (5_000, 2)).astype(np.uint64)])
    assert table.find(queries).tolist() == [last.get(query.tobytes(), -1) for query in queries]


def test_names_that_share_every_bucket_are_told_apart() -> None:
    """Names made so that the first rounds cannot tell them apart end in the remainder."""
    words = np.zeros((50, 2), dtype=np.uint64)
    words[:, 1] = np.arange(50)  # multiplied by an odd number and cut to the top bits: neighbours collide a lot
    table = NameTable(np.concatenate([words, words[:10]]))
    assert table.find(words).tolist() == [*range(50, 60), *range(10, 50)]


@settings(deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=40, unique_by=lambda block: block[0]),
    kept=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_parents_are_found_wherever_they_stand(blocks: list[tuple[int, int]], kept: list[bool]) -> None:
    names = [name.to_bytes(16, "big") for name, _ in blocks]
    parents = [parent.to_bytes(16, "big") if parent else ROOT_NAME for _, parent in blocks]
    slots, digests = np.arange(len(blocks)), np.zeros(len(blocks), dtype=np.uint64)
    recovered = RecoveredBlocks.from_log(replay(make_records(PUT, names, parents, slots, digests, 1, np.uint64(0))))
    assert recovered.parent_index.tolist() == [names.index(p) if p in names else -1 for p in parents]
    mask = np.array(kept[: len(blocks)], dtype=np.bool_)
    some = recovered.selected(mask)
    left = [name for name, keep in zip(names, kept, strict=False) if keep]
    expected = [left.index(p) if p in left else -1 for p, keep in zip(parents, kept, strict=False) if keep]
    assert some.parent_index.tolist() == expected
    assert [name.tobytes() for name in some.names] == left
