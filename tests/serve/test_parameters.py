from typing import Any

import msgspec
import pytest

from dynamo.serve.engine.request import SamplingDefaults, SamplingParams
from dynamo.serve.errors import RequestError
from dynamo.serve.openai import ChatCompletionRequest, CompletionRequest
from dynamo.serve.parameters import chat_sampling, completion_sampling, with_seed


def chat(defaults: SamplingDefaults | None = None, prompt_tokens: int = 10, **fields: Any) -> SamplingParams:
    request = msgspec.convert(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}, ChatCompletionRequest
    )
    return chat_sampling(
        request, defaults or SamplingDefaults(), prompt_tokens=prompt_tokens, max_model_len=100, vocab_size=50
    )


def completion(prompt_tokens: tuple[int, ...] = (10,), **fields: Any) -> SamplingParams:
    request = msgspec.convert({"model": "m", "prompt": "x", **fields}, CompletionRequest)
    return completion_sampling(
        request, SamplingDefaults(), prompt_tokens=prompt_tokens, max_model_len=100, vocab_size=50
    )


def test_a_chat_without_a_limit_may_fill_the_context() -> None:
    assert chat().max_tokens == 90


def test_the_model_folder_may_limit_chats_that_do_not() -> None:
    assert chat(SamplingDefaults(max_tokens=20)).max_tokens == 20
    assert chat(SamplingDefaults(max_tokens=20), max_tokens=30).max_tokens == 30
    assert chat(SamplingDefaults(max_tokens=200)).max_tokens == 90


def test_a_completion_without_a_limit_gets_sixteen_tokens_or_what_is_left() -> None:
    assert completion().max_tokens == 16
    assert completion((10, 95)).max_tokens == 5


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_work(field: str) -> None:
    assert chat(**{field: 7}).max_tokens == 7


def test_contradicting_limits_are_refused() -> None:
    with pytest.raises(RequestError, match="differ"):
        chat(max_tokens=7, max_completion_tokens=8)
    assert chat(max_tokens=7, max_completion_tokens=7).max_tokens == 7


def test_too_long_a_completion_states_the_numbers() -> None:
    with pytest.raises(
        RequestError, match="maximum context length is 100 tokens, but 101 are requested: 10 of the prompt and 91"
    ) as caught:
        chat(max_completion_tokens=91)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")
    assert chat(max_completion_tokens=90).max_tokens == 90


def test_too_long_a_prompt_states_the_numbers() -> None:
    with pytest.raises(
        RequestError, match="maximum context length is 100 tokens, but the prompt alone has 100"
    ) as caught:
        chat(prompt_tokens=100)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(RequestError) as caught:
        completion((5, 120))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_the_models_own_defaults_apply_only_where_the_request_says_nothing() -> None:
    defaults = SamplingDefaults(temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.1)
    silent = chat(defaults)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.repetition_penalty) == (0.5, 0.9, 20, 1.1)
    spoken = chat(defaults, temperature=0, top_p=1, top_k=0, repetition_penalty=1)
    assert (spoken.temperature, spoken.top_p, spoken.top_k, spoken.repetition_penalty) == (0, 1, None, 1)


def test_seeds_count_up_over_choices_and_stay_in_range() -> None:
    sampling = chat(seed=2**63 - 1)
    assert [with_seed(sampling, choice).seed for choice in range(3)] == [2**63 - 1, 0, 1]
    negative = chat(seed=-1).seed
    assert negative is not None and 0 <= negative < 2**63
    assert with_seed(chat(), 3).seed is None


def test_stops_take_one_form() -> None:
    assert chat(stop="a").stop == ("a",)
    assert chat(stop=["a", "b"]).stop == ("a", "b")
    assert chat().stop == ()
    assert chat(stop_token_ids=[3, 3]).stop_token_ids == {3}


def test_logprobs_of_the_two_endpoints() -> None:
    assert chat().num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).num_logprobs == 4
    assert completion().num_logprobs is None
    assert completion(logprobs=0).num_logprobs == 0
    with pytest.raises(RequestError, match="top_logprobs needs logprobs"):
        chat(top_logprobs=4)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 8, "max_tokens": 7}, "min_tokens"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"store": True}, "store"),
    ],
)
def test_what_makes_no_sense_together_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


def test_ranking_and_logprobs_of_an_echo_are_refused() -> None:
    with pytest.raises(RequestError, match="best_of"):
        completion(best_of=2)
    assert completion(best_of=2, n=2).max_tokens == 16
    with pytest.raises(RequestError, match="echo"):
        completion(echo=True, logprobs=1)
