"""Tokens per second of decoding with a random model of Llama 3 8B's shape, beside transformers on the same GPU.

Ours is the whole engine: scheduler, paged cache, attention kernels, greedy sampling, detokenisation. transformers'
`generate` works on one padded batch with its default cache. Prefill is left out of both.
"""

import asyncio
import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dynamo.serve.demo
from dynamo.kvcache import KVCache, KVSpec
from dynamo.perf.harness import median
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result
from dynamo.serve.engine.engine import InferenceEngine, build_model_engine
from dynamo.serve.engine.loader import LoadedModel
from dynamo.serve.engine.model import CausalLM
from dynamo.serve.engine.model_config import ModelConfig
from dynamo.serve.engine.request import GenerationRequest, SamplingDefaults, SamplingParams
from dynamo.serve.engine.scheduler import SchedulerLimits
from dynamo.serve.engine.tokenizer import Tokenizer

__all__ = ["LLAMA_3_8B", "DecodeShape", "decode", "measure_decode"]

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128001,
}

_SCALE = 0.02  # standard deviation of random weights, as models are initialised


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What is decoded.

    Attributes:
        config: a config.json.
        new_tokens: measured steps; one more comes first, with the prefill.
    """

    config: dict[str, Any]
    batches: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 512
    new_tokens: int = 128
    repeats: int = 3
    dtype: torch.dtype = torch.bfloat16


def decode(workload: Workload) -> Findings:
    """The section: Llama 3 8B's shape on the GPU."""
    yield from measure_decode(DecodeShape(LLAMA_3_8B), torch.device(workload.device))


def measure_decode(shape: DecodeShape, device: torch.device) -> Findings:
    """Tokens per second at every batch size: ours, on CUDA also without paged attention and graphs, and transformers'."""
    runs = [("dynamo-kv engine", _ours(shape, device))]
    if device.type == "cuda":
        runs.append(("dynamo-kv engine, SDPA, no CUDA graphs", _ours(shape, device, paged_attention=False)))
    runs.append(("transformers generate", _theirs(shape, device)))
    for name, rates in runs:
        for batch, rate in rates:
            yield Result(
                case=f"decode, batch {batch}, {shape.prompt_tokens} prompt tokens",
                subject=name,
                metric="decode",
                value=rate,
                unit="tokens/s",
                samples=shape.repeats,
            )
        gc.collect()  # the other model needs the room
        if device.type == "cuda":
            torch.cuda.empty_cache()
    yield "decode: random weights, greedy, no end of sequence; all sequences of a batch run together"


def _prompts(shape: DecodeShape, batch: int, vocab_size: int, seed: int) -> list[list[int]]:
    """No two prompts share a prefix, so that nothing is served from the cache."""
    chooser = random.Random(seed)
    return [[chooser.randrange(vocab_size) for _ in range(shape.prompt_tokens)] for _ in range(batch)]


def _ours(
    shape: DecodeShape, device: torch.device, *, paged_attention: bool | None = None
) -> Iterator[tuple[int, float]]:
    torch.manual_seed(0)
    config = ModelConfig.from_json(shape.config, "the benchmark")
    model = CausalLM(config, device=device, dtype=shape.dtype)
    with torch.inference_mode():
        for _, weight in model.checkpoint_views():
            weight.normal_(0, _SCALE)
    folder = Path(dynamo.serve.demo.__path__[0]) / "model"
    tokenizer = Tokenizer.from_folder(folder, num_embeddings=config.vocab_size)
    length = shape.prompt_tokens + shape.new_tokens + 1
    loaded = LoadedModel(
        model=model,
        config=config,
        tokenizer=tokenizer,
        sampling_defaults=SamplingDefaults(),
        fingerprint="random",
        max_model_len=length,
        dtype=shape.dtype,
    )
    spec = KVSpec(
        model="perf-decode",
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=shape.dtype,
    )
    most = max(shape.batches)
    cache = KVCache(spec, device=device, device_blocks=2 * most * -(-length // spec.block_size))
    limits = SchedulerLimits(max_running=most, max_batch_tokens=max(2048, most))
    engine = build_model_engine(
        loaded,
        cache,
        device=device,
        max_model_len=length,
        limits=limits,
        max_waiting=most,
        paged_attention=paged_attention,
    )
    yield from asyncio.run(_engine_rates(engine, shape, tokenizer.vocab_size))


async def _engine_rates(engine: InferenceEngine, shape: DecodeShape, vocab_size: int) -> list[tuple[int, float]]:
    await engine.start()
    try:
        rates = []
        for batch in shape.batches:
            runs = []
            for run in range(shape.repeats + 1):  # the first compiles kernels and captures graphs
                prompts = _prompts(shape, batch, vocab_size, seed=1000 * batch + run)
                runs.append(await _engine_rate(engine, shape, prompts))
            rates.append((batch, median(runs[1:])))
        return rates
    finally:
        await engine.stop()


async def _engine_rate(engine: InferenceEngine, shape: DecodeShape, prompts: list[list[int]]) -> float:
    """Tokens per second from the moment every sequence has its first token."""
    sampling = SamplingParams(max_tokens=shape.new_tokens + 1, temperature=0.0, ignore_eos=True)
    arrivals: list[list[tuple[float, int]]] = []

    async def one(number: int, prompt: list[int]) -> None:
        request = GenerationRequest(request_id=f"{id(prompts)}-{number}", prompt_token_ids=prompt, sampling=sampling)
        came: list[tuple[float, int]] = []
        arrivals.append(came)
        async for deltas in engine.generate(request):
            came.append((time.perf_counter(), sum(len(delta.token_ids) for delta in deltas)))  # noqa: PERF401

    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    start = max(came[0][0] for came in arrivals)
    later = [(at, count) for came in arrivals for at, count in came if at > start]
    return sum(count for _, count in later) / (max(at for at, _ in later) - start)


def _theirs(shape: DecodeShape, device: torch.device) -> Iterator[tuple[int, float]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{key: value for key, value in shape.config.items() if key not in ("architectures", "model_type")}
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
        model.train(False)
    finally:
        torch.set_default_dtype(default)
    # The demo's vocabulary is smaller than this model's; any ids below both will do.
    vocab_size = min(512, config.vocab_size)

    def seconds(prompt: torch.Tensor, new_tokens: int) -> float:
        mask = torch.ones_like(prompt)
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=mask,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            assert out.shape[1] == prompt.shape[1] + new_tokens
            out[0, -1].item()  # waits for the device
        return time.perf_counter() - started

    for batch in shape.batches:
        rates = []
        for run in range(shape.repeats + 1):
            prompt = torch.tensor(_prompts(shape, batch, vocab_size, seed=1000 * batch + run), device=device)
            prefill, whole = seconds(prompt, 1), seconds(prompt, 1 + shape.new_tokens)
            rates.append(batch * shape.new_tokens / max(whole - prefill, 1e-9))
        yield batch, median(rates[1:])
