"""The tracker: turns, shared prefixes, parts, and what it learns; all within bounded memory."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.eviction import Part, Use
from dynamo.kvcache.hazards import NUM_GROUPS, group_of
from dynamo.kvcache.reuse import ReuseTracker, parts


def chain(name: str, length: int, start: int = 0) -> list[str]:
    return [f"{name}{i}" for i in range(start, length)]


def serve(tracker: ReuseTracker, keys: list[str], now_s: float, *, answer: int = 2, tokens: int | None = None) -> Use:
    """One request: a prompt of all but the last `answer` blocks of 16 tokens."""
    prompt = keys[: len(keys) - answer]
    use = tracker.observe(prompt, now_s, num_prompt_tokens=16 * len(prompt) if tokens is None else tokens)
    return tracker.finish(use, keys, 16 * answer)


def test_a_conversation_counts_its_turns():
    tracker = ReuseTracker()
    uses = [serve(tracker, chain("a", 20 + 10 * turn), 60.0 * turn) for turn in range(5)]
    assert [use.turn for use in uses] == [0, 1, 2, 3, 4]
    assert [use.number for use in uses] == [1, 2, 3, 4, 5]
    assert [use.num_new_tokens for use in uses] == [18 * 16, 160, 160, 160, 160]
    assert [use.num_known_blocks for use in uses] == [0, 20, 30, 40, 50]


def test_unrelated_chains_are_first_turns():
    tracker = ReuseTracker()
    assert all(serve(tracker, chain(f"{n}-", 30), float(n)).turn == 0 for n in range(50))


def test_a_template_that_drops_the_answer_still_continues_the_conversation():
    tracker = ReuseTracker()
    serve(tracker, [*chain("p", 20), *chain("thought", 5)], 0.0, answer=5)
    use = serve(tracker, [*chain("p", 20), *chain("next", 9)], 60.0)
    assert (use.turn, use.num_known_blocks) == (1, 20)


def test_chains_that_share_only_a_system_prompt_are_first_turns():
    tracker = ReuseTracker()
    rng = random.Random(1)
    uses = [serve(tracker, [*chain("system", 40), *chain(f"{n}-", rng.randrange(5, 60))], float(n)) for n in range(200)]
    late = uses[100:]
    assert all(use.turn == 0 for use in late)
    assert all(20 <= use.num_shared_blocks <= 40 for use in late)
    assert late[-1].num_shared_blocks >= 36  # found ever more exactly
    assert late[-1].num_sharers >= 2


def test_parts_cover_the_chain_once_last_part_first():
    use = Use(1, 0.0, num_shared_blocks=3, num_sharers=4, num_known_blocks=5, num_prompt_blocks=8)
    assert [(start, end, part.part) for start, end, part in parts(use, 10)] == [
        (8, 10, Part.ANSWER),
        (5, 8, Part.FRESH),
        (3, 5, Part.KNOWN),
        (0, 3, Part.SHARED),
    ]


@given(st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(0, 9), st.integers(0, 9))
def test_parts_of_any_use_are_disjoint_and_complete(shared, known, prompt, num_blocks):
    use = Use(1, 0.0, num_shared_blocks=shared, num_known_blocks=known, num_prompt_blocks=prompt)
    found = list(parts(use, num_blocks))[::-1]
    assert [i for start, end, _ in found for i in range(start, end)] == list(range(num_blocks))
    assert all(start < end for start, end, _ in found)


@given(
    part=st.sampled_from(Part),
    turn=st.integers(0, 10**6),
    new=st.integers(0, 10**9),
    output=st.integers(0, 10**9),
    sharers=st.integers(0, 10**9),
)
def test_every_use_has_a_group(part, turn, new, output, sharers):
    use = Use(1, 0.0, turn, 1, output, part=part, num_new_tokens=new, num_sharers=sharers)
    assert 0 <= group_of(use) < NUM_GROUPS


def test_it_learns_who_comes_back_and_when():
    """Long prompts come back after a minute or so, short ones never."""
    tracker = ReuseTracker()
    rng = random.Random(2)
    events = []
    for n in range(600):
        start = rng.uniform(0, 3000)
        is_long = n % 2 == 0
        length = 60 if is_long else 6
        events.append((start, n, length))
        if is_long:
            events.append((start + rng.uniform(50, 70), n, length + 20))
    for now_s, n, length in sorted(events):
        serve(tracker, chain(f"{n}-", length), now_s, answer=0)
    long = group_of(Use(1, 0.0, num_new_tokens=960))
    short = group_of(Use(1, 0.0, num_new_tokens=96))
    tables = tracker.tables
    ranks = tables.ranks(np.array([long, long, long, short]), np.array([1.0, 40.0, 120.0, 1.0]))
    assert ranks[1] > ranks[0] > 3 * ranks[3]  # nearer to its reuse it is worth more
    assert ranks[2] < ranks[0]  # what did not come back when it should is worth less
    gains = tables.write_gain(0.0, 0.3)
    assert gains[long] > 0 > gains[short]


def test_without_evidence_older_is_worth_less():
    tables = ReuseTracker().tables
    index = tables.index
    assert (np.diff(index, axis=1) < 0).all()
    assert np.isfinite(index).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32))
def test_memory_is_bounded_and_anything_may_be_asked(seed):
    rng = random.Random(seed)
    tracker = ReuseTracker(max_marks=64, max_waiting=32)
    now_s = 0.0
    for n in range(300):
        now_s += rng.choice((0.0, 0.1, 50.0, 1e5))
        keys = [f"{rng.randrange(4)}-{i}" for i in range(rng.randrange(40))]
        use = tracker.observe(keys, now_s, num_prompt_tokens=rng.randrange(1000))
        assert use.number == n + 1
        assert 0 <= use.num_shared_blocks <= len(keys)
        assert 0 <= use.num_known_blocks <= len(keys)
        if rng.random() < 0.8:
            tracker.finish(use, [*keys, f"end{n}"], rng.randrange(500))
            tracker.finish(use, keys, 0)  # a second time does no harm
        assert tracker.num_marks <= 64
    assert np.isfinite(tracker.tables.index).all()
    assert (tracker.tables.index > 0).all()


def test_a_long_conversation_costs_few_marks():
    tracker = ReuseTracker()
    for turn in range(100):
        serve(tracker, chain("a", 20 + 20 * turn), 60.0 * turn)
    assert tracker.num_marks < 60


@pytest.mark.parametrize("now_s", [0.0, 1e9])
def test_equal_times_and_large_times_are_fine(now_s):
    tracker = ReuseTracker()
    for n in range(120):
        serve(tracker, chain(f"{n % 7}-", 10), now_s)
    assert np.isfinite(tracker.tables.index).all()
