"""A request that was begun elsewhere goes on as if nothing had happened, wherever it was cut."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dynamo.serve.demo
from dynamo.kvcache import KVCache, KVSpec
from dynamo.serve.engine.engine import InferenceEngine, build_model_engine
from dynamo.serve.engine.loader import LoadedModel, load_model
from dynamo.serve.engine.mocker import MockTimings, build_mock_engine, mock_kv_spec
from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams
from dynamo.serve.engine.scheduler import SchedulerLimits
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import RequestFailedError

FOLDER = Path(dynamo.serve.demo.__file__).parent / "model"
CPU = torch.device("cpu")
BLOCK_SIZE = 16
PROMPT = list(range(5, 45))
TEXT = " naïve ✅ 日本語 keys, and values of the key; 🧊 the end of the end"
NO_WAITING = MockTimings(prefill_tokens_per_s=1000.0, step_s=1.0, token_s=1.0, speedup=math.inf)
LIMITS = SchedulerLimits(max_running=4, max_batch_tokens=256)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def demo_model() -> LoadedModel:
    return load_model(FOLDER, device=CPU)


@asynccontextmanager
async def mocked(tokenizer: Tokenizer) -> AsyncIterator[InferenceEngine]:
    cache = KVCache(mock_kv_spec("resume", BLOCK_SIZE), device="cpu", device_blocks=64)
    engine = build_mock_engine(
        tokenizer, cache, timings=NO_WAITING, max_model_len=400, limits=LIMITS, max_waiting=4, text=TEXT
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def loaded(model: LoadedModel) -> AsyncIterator[InferenceEngine]:
    spec = KVSpec(
        model=model.fingerprint,
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        dtype=model.dtype,
        block_size=BLOCK_SIZE,
    )
    cache = KVCache(spec, device="cpu", device_blocks=64)
    engine = build_model_engine(model, cache, device=CPU, max_model_len=400, limits=LIMITS, max_waiting=4)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def deltas_of(engine: InferenceEngine, request: GenerationRequest) -> list[OutputDelta]:
    return [delta async for deltas in engine.generate(request) for delta in deltas]


def joined(deltas: list[OutputDelta]) -> tuple[object, ...]:
    """All that a client can tell of the deltas."""
    return (
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [entry.token_id for delta in deltas for entry in delta.logprobs or []],
        deltas[-1].finish_reason,
        deltas[-1].stop_reason,
    )


async def check_every_cut(engine: InferenceEngine, sampling: SamplingParams) -> list[OutputDelta]:
    """Cuts an undisturbed run after each of its tokens but the last, and has the engine go on from there."""
    request = GenerationRequest(request_id="whole", prompt_token_ids=PROMPT, sampling=sampling)
    whole = await deltas_of(engine, request)
    assert all(len(delta.token_ids) == 1 for delta in whole)
    for cut in range(len(whole)):
        token_ids = [token_id for delta in whole[:cut] for token_id in delta.token_ids]
        rest = await deltas_of(engine, replace(request, request_id=f"cut-{cut}", output_token_ids=token_ids))
        assert joined([*whole[:cut], *rest]) == joined(whole), f"cut after {cut} tokens"
    return whole


@settings(deadline=None, max_examples=20)
@given(
    max_tokens=st.integers(1, 60),
    min_tokens=st.integers(0, 60),
    stop=st.lists(st.sampled_from(["✅ 日", "key", "keys, and v", "the end of", "日本語", "e", "\ufffd"]), max_size=3),
    stop_place=st.none() | st.integers(0, 40),
    num_logprobs=st.none() | st.integers(0, 2),
)
@example(max_tokens=60, min_tokens=0, stop=["the end of the end"], stop_place=None, num_logprobs=None)
@example(max_tokens=60, min_tokens=30, stop=["日本語"], stop_place=2, num_logprobs=1)
@example(max_tokens=12, min_tokens=0, stop=[], stop_place=None, num_logprobs=None)  # ends inside a character
def test_text_limits_and_stops_go_on_across_the_cut(
    tokenizer: Tokenizer,
    max_tokens: int,
    min_tokens: int,
    stop: list[str],
    stop_place: int | None,
    num_logprobs: int | None,
) -> None:
    said = tokenizer.encode(TEXT, add_special_tokens=False)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stop),
        stop_token_ids=frozenset() if stop_place is None else frozenset({said[stop_place % len(said)]}),
        num_logprobs=num_logprobs,
    )

    async def test() -> None:
        async with mocked(tokenizer) as engine:
            await check_every_cut(engine, sampling)

    asyncio.run(test())


def test_the_examples_do_cut_characters_and_stop_strings(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with mocked(tokenizer) as engine:
            whole = await check_every_cut(engine, SamplingParams(max_tokens=60, stop=("of the end",)))
            assert any(delta.text == "" for delta in whole)
            assert any(len(delta.text) > 1 for delta in whole)
            assert whole[-1].stop_reason == "of the end"

    asyncio.run(test())


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=24, temperature=0.0),
        SamplingParams(max_tokens=24, temperature=0.0, frequency_penalty=0.8, presence_penalty=0.4, num_logprobs=2),
        SamplingParams(max_tokens=24, temperature=1.3, seed=11),
        SamplingParams(max_tokens=24, temperature=1.0, seed=5, top_p=0.9, repetition_penalty=1.3, min_tokens=12),
    ],
    ids=["greedy", "greedy with penalties", "seeded", "seeded with penalties"],
)
def test_a_model_says_the_same_after_every_cut(demo_model: LoadedModel, sampling: SamplingParams) -> None:
    async def test() -> None:
        async with loaded(demo_model) as engine:
            whole = await check_every_cut(engine, sampling)
            assert len(whole) >= 12

    asyncio.run(test())


def test_cached_tokens_are_those_of_the_prompt_alone(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with mocked(tokenizer) as engine:
            request = GenerationRequest(
                request_id="whole", prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=60)
            )
            whole = await deltas_of(engine, request)
            token_ids = [token_id for delta in whole[:50] for token_id in delta.token_ids]
            rest = await deltas_of(engine, replace(request, request_id="rest", output_token_ids=token_ids))
            assert rest[0].num_cached_tokens == len(PROMPT)
            stats = engine.stats()
            assert (stats.prompt_tokens, stats.generated_tokens) == (len(PROMPT), 70)

    asyncio.run(test())


@pytest.mark.parametrize(
    ("output", "sampling", "message"),
    [
        ([7, 8, 9], SamplingParams(max_tokens=3), "ended with output token 3 of the 3"),
        ([7, 8, 9], SamplingParams(max_tokens=9, stop_token_ids=frozenset({8})), "ended with output token 2 of the 3"),
        ([7] * 400, SamplingParams(max_tokens=900), "400 tokens were generated before"),
        ([7, -1], SamplingParams(max_tokens=9), "output so far holds token id -1"),
        ([7, 10**6], SamplingParams(max_tokens=9), "output so far holds token id 1000000"),
    ],
)
def test_what_cannot_go_on_is_refused(
    tokenizer: Tokenizer, output: list[int], sampling: SamplingParams, message: str
) -> None:
    async def test() -> None:
        async with mocked(tokenizer) as engine:
            request = GenerationRequest(
                request_id="r", prompt_token_ids=PROMPT, sampling=sampling, output_token_ids=output
            )
            with pytest.raises(RequestFailedError, match=message):
                await deltas_of(engine, request)
            assert await deltas_of(engine, replace(request, output_token_ids=[], sampling=SamplingParams(max_tokens=1)))

    asyncio.run(test())
