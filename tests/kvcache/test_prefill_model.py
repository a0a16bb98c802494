import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.prefill_model import PrefillModel


def seconds_of(costs: tuple[float, float, float], num_tokens: int, context: int) -> float:
    step_s, token_s, pair_s = costs
    return step_s + token_s * num_tokens + pair_s * num_tokens * (context + num_tokens / 2)


def test_too_few_steps_say_nothing():
    model = PrefillModel()
    for _ in range(3):
        model.observe(512, 0, 0.1)
        assert model.cost() is None
    model.observe(512, 512, 0.1)
    assert model.cost() is not None


def test_what_cannot_be_a_measurement_is_left_out():
    model = PrefillModel()
    for num_tokens, seconds in ((0, 1.0), (8, 0.0), (8, -1.0), (8, float("nan")), (8, float("inf"))) * 2:
        model.observe(num_tokens, 0, seconds)
    assert model.cost() is None


@settings(deadline=None, max_examples=40)
@given(
    step_s=st.floats(0, 0.02),
    token_s=st.floats(1e-6, 1e-3),
    pair_s=st.floats(0, 1e-7),
    seed=st.integers(0, 2**32),
)
def test_prompts_are_predicted_from_noisy_steps_some_of_which_were_held_up(step_s, token_s, pair_s, seed):
    costs = step_s, token_s, pair_s
    noise = random.Random(seed)
    model = PrefillModel()
    for i in range(60):
        num_tokens, context = noise.choice((512, 512, 512, noise.randint(16, 511))), 512 * noise.randint(0, 8)
        seconds = seconds_of(costs, num_tokens, context) * noise.uniform(0.95, 1.05)
        model.observe(num_tokens, context, 20 * seconds if i % 10 == 0 else seconds)
    cost = model.cost()
    assert cost is not None
    for chunks in (1, 4, 8):
        real = sum(seconds_of(costs, 512, 512 * chunk) for chunk in range(chunks))
        assert cost.seconds_between(0, 512 * chunks) == pytest.approx(real, rel=0.2)
    assert 0.5 <= cost.sure <= 1.0
    starts = np.arange(0, 4096, 16)
    assert (np.diff(cost.seconds(starts, 4096)) <= 1e-12).all()


def test_steps_that_are_all_alike_are_not_blown_up_to_long_contexts():
    model = PrefillModel()
    for _ in range(8):
        model.observe(512, 0, 0.1)
    cost = model.cost()
    assert cost is not None
    assert cost.seconds_between(0, 8 * 512) == pytest.approx(0.8, rel=0.15)


def test_many_short_prompts_do_not_drive_out_the_long_ones():
    model = PrefillModel()
    for chunk in range(8):
        model.observe(512, 512 * chunk, seconds_of((0.002, 1e-4, 5e-8), 512, 512 * chunk))
    for _ in range(200):
        model.observe(20, 0, seconds_of((0.002, 1e-4, 5e-8), 20, 0))
    cost = model.cost()
    assert cost is not None
    real = sum(seconds_of((0.002, 1e-4, 5e-8), 512, 512 * chunk) for chunk in range(8))
    assert cost.seconds_between(0, 4096) == pytest.approx(real, rel=0.1)


def test_a_device_that_got_slower_is_noticed():
    model = PrefillModel()
    for speed in (1.0, 3.0):
        for i in range(64):
            model.observe(512, 512 * (i % 8), speed * seconds_of((0.002, 1e-4, 5e-8), 512, 512 * (i % 8)))
    cost = model.cost()
    assert cost is not None
    assert cost.seconds_between(0, 512) == pytest.approx(3 * seconds_of((0.002, 1e-4, 5e-8), 512, 0), rel=0.1)
