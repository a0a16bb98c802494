"""Paged attention and captured decode steps change when work is submitted, never what is said."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamo.kvcache import KVCache, KVSpec
from dynamo.serve.engine.cuda_graphs import CudaStepCapturer, DecodeGraphs, decode_sizes
from dynamo.serve.engine.engine import build_model_engine
from dynamo.serve.engine.loader import LoadedModel, load_model
from dynamo.serve.engine.paged_steps import PagedSteps
from dynamo.serve.engine.request import GenerationRequest, SamplingParams
from dynamo.serve.engine.runner import TorchRunner
from dynamo.serve.engine.sampler import SampledToken, Sampler
from dynamo.serve.engine.scheduler import Scheduler, SchedulerLimits
from dynamo.serve.engine.sequence import SequenceState

MAX_MODEL_LEN = 512
LIMITS = SchedulerLimits(max_running=8, max_batch_tokens=64, prefill_chunk=40)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Recorder:
    """Stands in for CUDA graphs: repeats the computation, and fails when told to."""

    fails_at: int | None = None
    num_captures: int = 0
    replays: list[int] = field(default_factory=list)

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        number = self.num_captures
        self.num_captures += 1
        if number == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        run()

        def replay() -> Tensor:
            self.replays.append(number)
            return run()

        return replay


def test_sizes_are_few_and_pad_by_at_most_a_half() -> None:
    assert decode_sizes(1) == (1,)
    assert decode_sizes(3) == (1, 2, 3)
    assert decode_sizes(64) == (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    for max_running in range(1, 300):
        sizes = decode_sizes(max_running)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == max_running
        assert len(sizes) <= 5 + 2 * max_running.bit_length()
        assert all(after <= 2 * before for before, after in pairwise(sizes))


def test_a_size_is_captured_when_first_needed_and_replayed_from_then_on() -> None:
    recorder, computed = Recorder(), []

    def run(size: int) -> Tensor:
        computed.append(size)
        return torch.zeros(size, 5)

    graphs = DecodeGraphs(run, recorder, max_running=6)
    assert graphs.captured_sizes == ()
    assert [graphs.size_for(n) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    for size in (4, 4, 1, 6, 4):
        assert graphs.logits(size).shape == (size, 5)
    assert graphs.captured_sizes == (4, 1, 6)
    assert recorder.replays == [0, 0, 1, 2, 0]
    assert recorder.num_captures == 3
    assert computed == [4, 4, 4, 1, 1, 6, 6, 4]  # a capture and a replay when first needed, then replays


def test_without_room_for_a_graph_decoding_goes_on_without_more(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(fails_at=1)
    graphs = DecodeGraphs(lambda size: torch.full((size, 1), float(size)), recorder, max_running=8)
    for size in (2, 4, 8, 2):
        assert graphs.logits(size).tolist() == [[size]] * size
    assert graphs.captured_sizes == (2,)
    assert recorder.num_captures == 2
    assert recorder.replays == [0, 0]
    assert "without more graphs" in caplog.text


@dataclass
class Talk:
    """What was said, and how the steps were computed."""

    outputs: list[list[int]]
    captured_sizes: tuple[int, ...]
    num_mixed_steps: int


def make_cache(loaded: LoadedModel, device: torch.device) -> KVCache:
    config = loaded.config
    spec = KVSpec(
        model=loaded.fingerprint,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=loaded.dtype,
    )
    return KVCache(spec, device=device, device_blocks=256)


def talk(
    loaded: LoadedModel,
    device: torch.device,
    prompts: list[list[int]],
    num_tokens: list[int],
    *,
    is_paged: bool,
    **paged_options: Any,
) -> Talk:
    """Greedy continuations, all prompts at once through scheduler, cache and runner."""
    with make_cache(loaded, device) as cache:
        paged = None
        if is_paged:
            paged = PagedSteps(
                loaded.model,
                cache.layer,
                block_size=cache.block_size,
                max_running=LIMITS.max_running,
                max_batch_tokens=LIMITS.max_batch_tokens,
                max_model_len=MAX_MODEL_LEN,
                **paged_options,
            )
        runner = TorchRunner(
            loaded.model,
            Sampler(frozenset()),
            cache.layer,
            device=device,
            block_size=cache.block_size,
            max_batch_tokens=LIMITS.max_batch_tokens,
            paged=paged,
        )
        scheduler = Scheduler(cache, LIMITS)
        params = SamplingParams(max_tokens=max(num_tokens), temperature=0.0, ignore_eos=True)
        sequences = [
            SequenceState.from_request(GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=params))
            for i, prompt in enumerate(prompts)
        ]
        for sequence in sequences:
            scheduler.add(sequence)
        num_mixed_steps = 0
        while scheduler.has_work:
            step = scheduler.schedule()
            num_mixed_steps += bool(step.decodes and step.prefills)
            outcomes = runner.execute(step)
            tokens = [outcome.token_id for outcome in outcomes if isinstance(outcome, SampledToken)]
            assert len(tokens) == len(step.sampling)
            scheduler.complete(step, list(tokens))
            for sequence in step.sampling:
                if sequence.num_output_tokens == num_tokens[int(sequence.request_id)]:
                    scheduler.finish(sequence)
        cache.check_invariants()
    outputs = [list(sequence.output_tokens) for sequence in sequences]
    return Talk(outputs, paged.captured_sizes if paged else (), num_mixed_steps)


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(4, 320, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_steps_say_on_the_cpu_what_gathered_ones_do(family: str, make_checkpoint: Callable[..., Path]) -> None:
    name, settings = FAMILIES[family]
    loaded = load_model(make_checkpoint(name, **settings), device=torch.device("cpu"))
    prompts, num_tokens = random_prompts([1, 17, 100, 64, 5]), [200, 20, 60, 33, 200]
    gathered = talk(loaded, torch.device("cpu"), prompts, num_tokens, is_paged=False)
    eager = talk(loaded, torch.device("cpu"), prompts, num_tokens, is_paged=True)
    assert eager.outputs == gathered.outputs
    assert eager.num_mixed_steps > 0
    assert eager.captured_sizes == ()
    recorder = Recorder()
    captured = talk(loaded, torch.device("cpu"), prompts, num_tokens, is_paged=True, capturer=recorder)
    assert captured.outputs == gathered.outputs
    assert {2, 4, 8} <= set(captured.captured_sizes)  # 5 sequences are padded to 8, 3 to 4
    assert len(recorder.replays) > 150


def test_the_engine_takes_paged_attention_by_argument(make_checkpoint: Callable[..., Path]) -> None:
    device = torch.device("cpu")
    loaded = load_model(make_checkpoint("Llama"), device=device)
    prompt = random_prompts([40])[0]

    async def say(is_paged: bool | None) -> list[int]:
        cache = make_cache(loaded, device)
        engine = build_model_engine(
            loaded,
            cache,
            device=device,
            max_model_len=loaded.max_model_len,
            limits=LIMITS,
            max_waiting=8,
            paged_attention=is_paged,
        )
        await engine.start()
        try:
            sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
            request = GenerationRequest(request_id="0", prompt_token_ids=prompt, sampling=sampling)
            return [token async for deltas in engine.generate(request) for delta in deltas for token in delta.token_ids]
        finally:
            await engine.stop()

    gathered = asyncio.run(say(None))
    assert len(gathered) == 30
    assert asyncio.run(say(True)) == gathered
    assert asyncio.run(say(False)) == gathered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_decoding_says_on_the_gpu_what_gathered_does(
    family: str, make_checkpoint: Callable[..., Path]
) -> None:
    name, settings = FAMILIES[family]
    device = torch.device("cuda")
    loaded = load_model(make_checkpoint(name, **settings), device=device)
    prompts, num_tokens = random_prompts([1, 17, 100, 64, 5, 130, 33]), [200, 200, 200, 180, 150, 200, 200]
    gathered = talk(loaded, device, prompts, num_tokens, is_paged=False)
    eager = talk(loaded, device, prompts, num_tokens, is_paged=True, captures=False)
    assert eager.outputs == gathered.outputs
    captured = talk(loaded, device, prompts, num_tokens, is_paged=True)
    assert captured.outputs == gathered.outputs
    assert captured.captured_sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_a_failed_capture_leaves_later_steps_in_order() -> None:
    device, before = torch.device("cuda", 0), torch.cuda.current_stream()
    numbers, is_capturing = torch.arange(4.0, device=device), torch.cuda.is_current_stream_capturing

    def run(size: int) -> Tensor:
        doubled = numbers[:size] * 2
        if is_capturing():
            doubled.sum().item()  # waits for the device, which a graph cannot hold
        return doubled

    graphs = DecodeGraphs(run, CudaStepCapturer(device), max_running=4)
    for start in (0, 10, 20):
        numbers.copy_(torch.arange(start, start + 4.0))
        assert graphs.logits(4).tolist() == [2.0 * (start + i) for i in range(4)]
        assert torch.cuda.current_stream() == before
    assert graphs.captured_sizes == ()
