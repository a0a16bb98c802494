"""Tokens are drawn from the distribution the parameters describe, the same ones whatever else is in the batch."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamo.serve.engine.request import SamplingParams
from dynamo.serve.engine.sampler import SampledToken, Sampler, SamplingState
from dynamo.serve.errors import RequestFailedError

EOS = 0


def state(prompt: Sequence[int] = (5,), output: Sequence[int] = (), **params: Any) -> SamplingState:
    return SamplingState(SamplingParams(max_tokens=100, **params), prompt, output)


def sample(logits: Tensor, *states: SamplingState) -> list[int]:
    outcomes = Sampler(frozenset({EOS})).sample(logits.clone(), states)
    tokens = []
    for outcome in outcomes:
        assert isinstance(outcome, SampledToken), outcome
        tokens.append(outcome.token_id)
    return tokens


def frequencies(row: Tensor, num_draws: int = 4000, **params: Any) -> dict[int, float]:
    """Shares of the tokens drawn from one row of logits by requests with seeds 0, 1, ..."""
    states = [state(seed=seed, **params) for seed in range(num_draws)]
    counts = Counter(sample(row.expand(num_draws, -1), *states))
    return {token: count / num_draws for token, count in counts.items()}


def assert_close(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    for token, share in expected.items():
        assert found[token] == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 4000) + 1e-3)


ROW = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()


def test_greedy_takes_the_most_likely_token() -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    assert sample(logits, *[state(temperature=0) for _ in range(8)]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2}),
        ({"temperature": 0.5}, {0: 0.01, 1: 0.16, 2: 0.0025, 3: 0.0625, 4: 0.04}),
        ({"top_k": 2}, {1: 0.4, 3: 0.25}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_p": 0.6}, {1: 0.4, 3: 0.25}),
        ({"top_p": 0.3}, {1: 0.4}),
        ({"top_p": 1e-9}, {1: 0.4}),
        ({"min_p": 0.45}, {1: 0.4, 3: 0.25, 4: 0.2}),
        ({"min_p": 1.0}, {1: 0.4}),
        ({"top_k": 3, "top_p": 0.7}, {1: 0.4, 3: 0.25}),
        ({"top_k": 4, "min_p": 0.3, "top_p": 0.99}, {1: 0.4, 3: 0.25, 4: 0.2}),
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any], expected: dict[int, float]) -> None:
    total = sum(expected.values())
    assert_close(frequencies(ROW, **params), {token: share / total for token, share in expected.items()})


@pytest.mark.parametrize("params", [{"top_p": 0.9}, {"min_p": 1e-4}, {"top_k": 400}, {"top_p": 0.9, "top_k": 500}])
def test_truncation_is_exact_when_more_tokens_survive_than_are_first_looked_at(params: dict[str, Any]) -> None:
    row = torch.linspace(0, 1, 600)[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    probabilities = row.softmax(-1).sort(descending=True).values
    if "top_k" in params:
        probabilities = probabilities[: params["top_k"]] / probabilities[: params["top_k"]].sum()
    before = probabilities.cumsum(-1) - probabilities
    num_kept = int((before < params.get("top_p", 1.1)).sum())
    kept = set(row.argsort(descending=True)[:num_kept].tolist())
    drawn = set(frequencies(row, 6000, **params))
    assert drawn <= kept
    assert len(drawn) > 0.97 * num_kept


def test_a_tiny_temperature_is_greedy() -> None:
    assert frequencies(ROW, 50, temperature=1e-8) == {1: 1.0}


def test_a_seeded_request_draws_the_same_tokens_whatever_runs_beside_it() -> None:
    generator = torch.Generator().manual_seed(2)
    steps = torch.randn(20, 400, generator=generator) * 0.5
    for params in ({}, {"top_p": 0.8}, {"top_k": 20, "temperature": 1.3}, {"repetition_penalty": 1.2}):
        alone = state(seed=17, **params)
        expected = [sample(row[None], alone)[0] for row in steps]
        beside = state(seed=17, **params)
        others = [state(), state(top_k=399), state(temperature=0), state(top_p=0.5, frequency_penalty=1.0)]
        noise = torch.randn(len(others), 400, generator=generator)
        together = [sample(torch.cat((noise, row[None])), *others, beside)[-1] for row in steps]
        assert together == expected
        assert len(set(expected)) > 5


def test_a_state_rebuilt_from_its_tokens_goes_on_where_it_was() -> None:
    steps = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    params = {"seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    whole = state((1, 2), **params)
    expected = [sample(row[None], whole)[0] for row in steps]
    rebuilt = state((1, 2), expected[:12], **params)
    assert [sample(row[None], rebuilt)[0] for row in steps[12:]] == expected[12:]


def test_different_seeds_and_unseeded_requests_draw_differently() -> None:
    flat = torch.zeros(200, 1000)
    assert len(set(sample(flat, *[state(seed=i) for i in range(200)]))) > 150
    assert len(set(sample(flat, *[state() for _ in range(200)]))) > 150


def test_presence_and_frequency_penalties_count_output_tokens_alone() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9, 2.0]])
    assert sample(logits, state((1, 1), temperature=0, presence_penalty=0.5)) == [1]
    assert sample(logits, state((), (1,), temperature=0, presence_penalty=0.05)) == [1]
    assert sample(logits, state((), (1,), temperature=0, presence_penalty=0.2)) == [2]
    assert sample(logits, state((), (1, 1, 1), temperature=0, frequency_penalty=0.05)) == [2]
    assert sample(logits, state((), (1,), temperature=0, frequency_penalty=0.05)) == [1]


def test_penalties_may_be_negative() -> None:
    assert sample(torch.tensor([[1.0, 3.0, 2.9]]), state((), (2,), temperature=0, presence_penalty=-0.5)) == [2]


def test_the_repetition_penalty_covers_prompt_and_output_and_both_signs() -> None:
    assert sample(torch.tensor([[1.0, 3.0, 2.9]]), state((1,), temperature=0, repetition_penalty=1.1)) == [2]
    assert sample(torch.tensor([[1.0, 3.0, 2.9]]), state((), (1,), temperature=0, repetition_penalty=1.1)) == [2]
    assert sample(torch.tensor([[-3.0, -1.0, -1.05]]), state((1,), temperature=0, repetition_penalty=1.1)) == [2]


def test_penalties_touch_their_own_rows_only() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9]]).repeat(3, 1)
    penalised = state((), (1,), temperature=0, presence_penalty=1.0)
    assert sample(logits, state(temperature=0), penalised, state(temperature=0)) == [1, 2, 1]


def test_many_distinct_tokens_are_counted() -> None:
    seen = list(range(1, 200))
    assert sample(torch.zeros(1, 201), state((), [*seen, EOS], temperature=0, presence_penalty=1.0)) == [200]


def test_endings_are_banned_until_min_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    request = state(temperature=0, min_tokens=2, stop_token_ids=frozenset({1}))
    assert [sample(logits, request)[0] for _ in range(3)] == [2, 2, EOS]


def test_logprobs_are_of_the_models_distribution_before_temperature_and_penalties() -> None:
    sampler = Sampler(frozenset({EOS}))
    request = state((), temperature=0.1, top_k=2, num_logprobs=2, repetition_penalty=1.5, seed=1)
    [outcome] = sampler.sample(ROW[None] + 7, [request])
    assert isinstance(outcome, SampledToken)
    assert outcome.logprob is not None
    assert outcome.logprob.token_id == outcome.token_id
    assert outcome.logprob.logprob == pytest.approx(float(ROW[outcome.token_id]), abs=1e-5)
    assert [token for token, _ in outcome.logprob.top] == [1, 3]
    assert [value for _, value in outcome.logprob.top] == pytest.approx([math.log(0.4), math.log(0.25)], abs=1e-5)


def test_only_requests_that_ask_get_logprobs() -> None:
    states = [state(temperature=0), state(temperature=0, num_logprobs=0), state(temperature=0, num_logprobs=99)]
    outcomes = Sampler(frozenset()).sample(ROW.repeat(3, 1), states)
    logprobs = [outcome.logprob for outcome in outcomes if isinstance(outcome, SampledToken)]
    assert logprobs[0] is None
    assert logprobs[1] is not None
    assert logprobs[1].top == ()
    assert logprobs[2] is not None
    assert len(logprobs[2].top) == 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = ROW.repeat(3, 1)
    logits[1] = bad
    states = [state(temperature=temperature, top_k=1, num_logprobs=1) for _ in range(3)]
    outcomes = Sampler(frozenset()).sample(logits, states)
    assert isinstance(outcomes[1], RequestFailedError)
    assert [outcome.token_id for outcome in outcomes if isinstance(outcome, SampledToken)] == [1, 1]
    assert [s.num_output_tokens for s in states] == [1, 0, 1]


def test_a_single_nan_among_finite_logits_fails_the_row() -> None:
    logits = ROW.repeat(1, 1)
    logits[0, 2] = torch.nan
    assert isinstance(Sampler(frozenset()).sample(logits, [state(temperature=0)])[0], RequestFailedError)


def test_an_empty_batch_gives_nothing() -> None:
    assert Sampler(frozenset()).sample(torch.empty(0, 5), []) == []
