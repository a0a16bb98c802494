"""The whole engine says what transformers says, however its work is cut into steps and wherever its blocks have been."""

import asyncio
import errno
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.serve.engine.engine import InferenceEngine, build_model_engine
from dynamo.serve.engine.loader import LoadedModel, load_model
from dynamo.serve.engine.request import GenerationRequest, SamplingParams
from dynamo.serve.engine.scheduler import SchedulerLimits
from dynamo.tiers.aio import RequestQueue

CPU = torch.device("cpu")
NUM_TOKENS = 200
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
WHOLE = SchedulerLimits(max_running=8, max_batch_tokens=4096, prefill_chunk=4096)
CHUNKED = SchedulerLimits(max_running=8, max_batch_tokens=40, prefill_chunk=24)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_cache(
    loaded: LoadedModel, *, device_blocks: int = 256, host: str | None = None, disk: str | None = None
) -> KVCache:
    config = loaded.config
    spec = KVSpec(
        model=loaded.fingerprint,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=loaded.dtype,
    )
    return KVCache(spec, device="cpu", device_blocks=device_blocks, host=host, disk=disk)


def make_engine(loaded: LoadedModel, cache: KVCache, limits: SchedulerLimits) -> InferenceEngine:
    return build_model_engine(
        loaded, cache, device=CPU, max_model_len=loaded.max_model_len, limits=limits, max_waiting=64
    )


async def say(engine: InferenceEngine, name: str, prompt: list[int], **sampling: Any) -> tuple[list[int], int]:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **({"temperature": 0.0} | sampling))
    tokens: list[int] = []
    num_cached = 0
    async for deltas in engine.generate(GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=params)):
        for delta in deltas:
            tokens += delta.token_ids
            num_cached = delta.num_cached_tokens
    return tokens, num_cached


async def say_together(engine: InferenceEngine, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    saying = (say(engine, str(i), prompt, **sampling) for i, prompt in enumerate(prompts))
    return [tokens for tokens, _ in await asyncio.gather(*saying)]


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(4, 320, (length,), generator=generator).tolist() for length in lengths]


def assert_greedy(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    """Checks that transformers, too, finds every output token the most likely after those before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        for prompt, output in zip(prompts, outputs, strict=True):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits
            assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == output


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_transformers(family: str, make_checkpoint: Callable[..., Path]) -> None:
    name, settings = FAMILIES[family]
    folder = make_checkpoint(name, **settings)
    loaded = load_model(folder, device=CPU)
    prompts = random_prompts([1, 5, 16, 17, 40, 64, 100, 230])

    async def outputs(cache: KVCache, limits: SchedulerLimits) -> tuple[list[list[int]], int]:
        engine = make_engine(loaded, cache, limits)
        await engine.start()
        try:
            said = await say_together(engine, prompts)
            assert cache.stats().num_open_sequences == 0
            cache.check_invariants()
            return said, engine.stats().num_preemptions
        finally:
            await engine.stop()

    whole, preemptions = asyncio.run(outputs(make_cache(loaded), WHOLE))
    assert preemptions == 0
    assert_greedy(folder, prompts, whole)
    assert asyncio.run(outputs(make_cache(loaded), CHUNKED)) == (whole, 0)
    preempted, preemptions = asyncio.run(outputs(make_cache(loaded, device_blocks=40, host="16MiB"), CHUNKED))
    assert preemptions > 0
    assert preempted == whole


def test_neither_company_nor_the_cache_changes_what_is_said(make_checkpoint: Callable[..., Path]) -> None:
    loaded = load_model(make_checkpoint("Llama"), device=CPU)
    prompts = random_prompts([3, 33, 70])

    async def test() -> None:
        engine = make_engine(loaded, make_cache(loaded), CHUNKED)
        await engine.start()
        for sampling in (
            {"temperature": 0.0},
            {"temperature": 0.7, "seed": 7, "top_p": 0.9, "repetition_penalty": 1.1},
        ):
            together = await say_together(engine, prompts, **sampling)
            for prompt, expected in zip(prompts, together, strict=True):
                tokens, num_cached = await say(engine, "alone", prompt, **sampling)
                assert tokens == expected
                assert num_cached == (len(prompt) - 1) // 16 * 16
        await engine.stop()

    asyncio.run(test())


@pytest.mark.parametrize("read_s", [0.0, 0.002, 0.01])
def test_a_prompt_that_is_loaded_from_its_end_while_its_start_is_computed_says_the_same(
    read_s: float, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(make_checkpoint("Llama"), device=CPU)
    prompts = random_prompts([230, 201, 100])
    read = os.preadv

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "reads shall be calls of os.preadv")

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        time.sleep(read_s)
        return read(fd, buffers, offset, flags)

    monkeypatch.setattr(RequestQueue, "submit", refuse)

    async def test() -> None:
        cache = make_cache(loaded, host="16MiB", disk=f"{tmp_path}:64MiB")
        engine = make_engine(loaded, cache, CHUNKED)
        await engine.start()
        computed = await say_together(engine, prompts)
        monkeypatch.setattr(os, "preadv", preadv)
        num_cached = 0
        for _ in range(4):
            assert cache.flush()
            for tier in ("device", "host"):
                cache.clear(tier)
            answers = await asyncio.gather(*(say(engine, str(i), prompt) for i, prompt in enumerate(prompts)))
            assert [tokens for tokens, _ in answers] == computed
            assert all(count <= len(prompt) - 1 for (_, count), prompt in zip(answers, prompts, strict=True))
            num_cached += sum(count for _, count in answers)
        assert num_cached > 0
        await engine.stop()
        cache.check_invariants()
        cache.close()

    asyncio.run(test())
