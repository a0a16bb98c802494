import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

import dynamo.serve.demo
from dynamo.kvcache import KVCache, Sequence
from dynamo.serve.engine.engine import InferenceEngine
from dynamo.serve.engine.mocker import DEFAULT_TEXT, MockTimings, build_mock_engine, mock_kv_spec
from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams
from dynamo.serve.engine.scheduler import SchedulerLimits
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import RequestFailedError

BLOCK_SIZE = 16
NO_WAITING = MockTimings(prefill_tokens_per_s=1000.0, step_s=100.0, token_s=1.0, speedup=math.inf)
LIMITS = SchedulerLimits(max_running=4, max_batch_tokens=256)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(dynamo.serve.demo.__file__).parent / "model")


async def collect(
    engine: InferenceEngine, prompt: list[int], *, max_tokens: int, num_logprobs: int | None = None
) -> OutputDelta:
    sampling = SamplingParams(max_tokens=max_tokens, num_logprobs=num_logprobs)
    request = GenerationRequest(request_id="only", prompt_token_ids=prompt, sampling=sampling)
    whole = OutputDelta(logprobs=[])
    async for deltas in engine.generate(request):
        for delta in deltas:
            whole.text += delta.text
            whole.token_ids += delta.token_ids
            whole.logprobs = (whole.logprobs or []) + (delta.logprobs or [])
            whole.num_cached_tokens = delta.num_cached_tokens
    return whole


def make_cache(*, device_blocks: int = 64, host: str | None = None) -> KVCache:
    return KVCache(mock_kv_spec("test", BLOCK_SIZE), device="cpu", device_blocks=device_blocks, host=host)


def make_engine(
    tokenizer: Tokenizer, cache: KVCache, *, timings: MockTimings = NO_WAITING, limits: SchedulerLimits = LIMITS
) -> InferenceEngine:
    return build_mock_engine(tokenizer, cache, timings=timings, max_model_len=10_000, limits=limits, max_waiting=4)


def test_it_says_its_text_again_and_again(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        engine = make_engine(tokenizer, make_cache())
        await engine.start()
        length = len(tokenizer.encode(DEFAULT_TEXT, add_special_tokens=False))
        whole = await collect(engine, [1, 2, 3], max_tokens=2 * length)
        assert whole.text == 2 * DEFAULT_TEXT
        await engine.stop()

    asyncio.run(test())


def test_simulated_logprobs_have_one_entry_per_token_best_first(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        engine = make_engine(tokenizer, make_cache())
        await engine.start()
        whole = await collect(engine, [1], max_tokens=5, num_logprobs=3)
        assert whole.logprobs is not None
        for token_id, entry in zip(whole.token_ids, whole.logprobs, strict=True):
            assert entry.token_id == token_id == entry.top[0][0]
            logprobs = [logprob for _, logprob in entry.top]
            assert logprobs == sorted(logprobs, reverse=True)
            assert len(logprobs) == 3
            assert sum(map(math.exp, logprobs)) <= 1.0
        await engine.stop()

    asyncio.run(test())


def test_a_step_takes_what_the_model_says_divided_by_speedup(tokenizer: Tokenizer) -> None:
    timings = MockTimings(prefill_tokens_per_s=1000.0, step_s=0.01, token_s=0.005, speedup=2.0)
    assert timings.modelled_s(num_decodes=4, num_prefill_tokens=100) == pytest.approx(0.01 + 0.02 + 0.1)

    async def test() -> None:
        engine = make_engine(tokenizer, make_cache(), timings=timings)
        await engine.start()
        started = time.monotonic()
        await collect(engine, list(range(100)), max_tokens=5)
        modelled_s = timings.modelled_s(0, 100) + 4 * timings.modelled_s(1, 0)
        assert time.monotonic() - started >= modelled_s / timings.speedup
        await engine.stop()

    asyncio.run(test())


@pytest.mark.parametrize("speedup", [0.0, math.inf])
def test_no_speedup_limit_means_no_waiting(tokenizer: Tokenizer, speedup: float) -> None:
    timings = replace(NO_WAITING, speedup=speedup)
    assert "no waiting" in str(timings)

    async def test() -> None:
        engine = make_engine(tokenizer, make_cache(), timings=timings)
        await engine.start()
        await asyncio.wait_for(collect(engine, [1], max_tokens=5), 50.0)
        await engine.stop()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"prefill_tokens_per_s": 0.0}, "prefill_tokens_per_s"),
        ({"step_s": -1.0}, "step_s"),
        ({"token_s": math.nan}, "token_s"),
        ({"speedup": -1.0}, "speedup"),
    ],
)
def test_timings_that_make_no_sense_are_refused(values: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        replace(NO_WAITING, **values)


def test_a_prefix_comes_back_from_the_host_tier_with_the_right_bytes(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        cache = make_cache(device_blocks=12, host="1MiB")
        limits = SchedulerLimits(max_running=4, max_batch_tokens=64, prefill_chunk=40)
        engine = make_engine(tokenizer, cache, limits=limits)
        await engine.start()
        prompt = list(range(5 * BLOCK_SIZE + 3))
        assert (await collect(engine, prompt, max_tokens=3)).num_cached_tokens == 0
        assert await asyncio.to_thread(cache.flush)
        for other in range(3):
            await collect(engine, [100 + other] * (8 * BLOCK_SIZE), max_tokens=20)
        assert cache.lookup(prompt).device_tokens == 0
        assert (await collect(engine, prompt, max_tokens=3)).num_cached_tokens == 5 * BLOCK_SIZE
        await engine.stop()

    asyncio.run(test())


def test_wrong_content_behind_what_was_computed_is_noticed_too(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        cache = make_cache()
        engine = make_engine(
            tokenizer, cache, limits=SchedulerLimits(max_running=4, max_batch_tokens=64, prefill_chunk=16)
        )
        await engine.start()
        prompt = list(range(8 * BLOCK_SIZE))
        await collect(engine, prompt, max_tokens=1)
        table = cache.open(prompt)
        slot = int(table.block_table[4])
        table.close()
        next_span = Sequence.next_span

        def skip_to_the_end(sequence: Sequence, num_computed: int, max_tokens: int) -> tuple[int, int]:
            if num_computed == BLOCK_SIZE:  # as where the rest has been loaded meanwhile
                return next_span(sequence, 7 * BLOCK_SIZE, max_tokens)
            return num_computed, num_computed + BLOCK_SIZE

        Sequence.next_span = skip_to_the_end  # type: ignore[method-assign]
        try:
            cache.layer(0)[0][slot] += 1.0
            with pytest.raises(RequestFailedError, match=r"wrong content for blocks \[4\]"):
                await collect(engine, prompt, max_tokens=1)
        finally:
            Sequence.next_span = next_span  # type: ignore[method-assign]
        await engine.stop()

    asyncio.run(test())


def test_wrong_content_in_the_cache_is_noticed(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        cache = make_cache()
        engine = make_engine(tokenizer, cache)
        await engine.start()
        prompt = list(range(3 * BLOCK_SIZE))
        await collect(engine, prompt, max_tokens=1)
        keys, _ = cache.layer(0)
        keys += 1.0
        with pytest.raises(RequestFailedError, match=r"wrong content for blocks \[0, 1\]"):
            await collect(engine, prompt, max_tokens=1)
        await engine.stop()

    asyncio.run(test())
