import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams, TokenLogprob
from dynamo.serve.plane.messages import (
    Step,
    Submit,
    decode_down,
    decode_up,
    delta_of,
    encode,
    gain_of,
    request_of,
    submit_of,
)

TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LOGPROB = st.floats(max_value=0, allow_nan=False)
LOGPROBS = st.builds(
    TokenLogprob,
    st.integers(0, 2**31),
    LOGPROB,
    st.lists(st.tuples(st.integers(0, 2**31), LOGPROB), max_size=3).map(tuple),
)
DELTAS = st.builds(
    OutputDelta,
    text=TEXT,
    token_ids=TOKEN_IDS,
    logprobs=st.none() | st.lists(LOGPROBS, max_size=3),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    stop_reason=st.none() | TEXT | st.integers(0, 2**32),
    num_cached_tokens=st.integers(0, 2**31),
)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31),
    temperature=st.floats(0, 2),
    top_k=st.none() | st.integers(1, 1000),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(TEXT, max_size=3).map(tuple),
    stop_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=3),
    num_logprobs=st.none() | st.integers(0, 20),
)


@settings(deadline=None)
@given(deltas=st.lists(DELTAS, max_size=5))
def test_deltas_arrive_as_they_left(deltas: list[OutputDelta]) -> None:
    step = decode_down(encode(Step([gain_of(number, delta) for number, delta in enumerate(deltas)])))
    assert isinstance(step, Step)
    assert [gain.number for gain in step.gains] == list(range(len(deltas)))
    assert [delta_of(gain) for gain in step.gains] == deltas


@settings(deadline=None)
@given(prompt=TOKEN_IDS, output=TOKEN_IDS, sampling=SAMPLING, salt=TEXT)
def test_requests_arrive_as_they_left(
    prompt: list[int], output: list[int], sampling: SamplingParams, salt: str
) -> None:
    request = GenerationRequest(
        request_id="r", prompt_token_ids=prompt, sampling=sampling, cache_salt=salt, output_token_ids=output
    )
    submit = decode_up(encode(submit_of(7, request)))
    assert isinstance(submit, Submit)
    assert (submit.number, submit.request_id) == (7, "r")
    assert request_of(submit, "r") == request


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgspec.msgpack.encode([99, 1]), msgspec.msgpack.encode({"a": 1})])
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    for decode in (decode_up, decode_down):
        with pytest.raises(msgspec.DecodeError):
            decode(payload)
