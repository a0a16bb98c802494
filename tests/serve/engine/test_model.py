"""The forward pass agrees with transformers, whatever the batch, the chunks and the cache's strides."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamo.serve.engine.batch import ForwardBatch, SequenceSlice
from dynamo.serve.engine.loader import load_model
from dynamo.serve.engine.model import CausalLM

BLOCK_SIZE = 16
CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama-untied": ("Llama", {}),
    "llama3-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 32}),
    "llama-biases-linear": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Pool:
    """Cache layers as views of one buffer [blocks, layers, 2, block_size, heads, dim], full of NaN until written.

    Blocks are handed out in a shuffled order.
    """

    def __init__(self, model: CausalLM, num_blocks: int) -> None:
        config = model.config
        shape = (num_blocks, config.num_layers, 2, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.buffer = torch.full(shape, torch.nan, dtype=model.dtype)
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        return self.buffer[:, i, 0], self.buffer[:, i, 1]

    def allocate(self, num_tokens: int) -> Tensor:
        return torch.tensor([self._free.pop() for _ in range(-(-num_tokens // BLOCK_SIZE))])


Work = list[tuple[list[int], int, Tensor]]  # tokens to compute, tokens already in the cache, block table


def make_batch(work: Work, wants_logits: list[bool]) -> ForwardBatch:
    tokens, positions, blocks, slices, rows = [], [], [], [], []
    for (new, num_past, table), wanted in zip(work, wants_logits, strict=True):
        places = torch.arange(num_past, num_past + len(new))
        slices.append(SequenceSlice(len(tokens), len(new), num_past + len(new), table))
        tokens += new
        positions.append(places)
        blocks.append(table[places // BLOCK_SIZE])
        if wanted:
            rows.append(len(tokens) - 1)
    flat = torch.cat(positions)
    return ForwardBatch(
        token_ids=torch.tensor(tokens),
        positions=flat,
        slot_blocks=torch.cat(blocks),
        slot_offsets=flat % BLOCK_SIZE,
        sequences=tuple(slices),
        logit_rows=torch.tensor(rows, dtype=torch.int64),
    )


def generate(model: CausalLM, prompts: list[list[int]], num_tokens: int, chunk: int | None) -> list[list[int]]:
    """Greedy continuation of all prompts together; with `chunk`, prefills go `chunk` tokens a step beside decodes."""
    pool = Pool(model, sum(-(-(len(p) + num_tokens) // BLOCK_SIZE) for p in prompts))
    tables = [pool.allocate(len(p) + num_tokens) for p in prompts]
    sequences = [list(p) for p in prompts]
    computed = [0] * len(prompts)
    while pending := [i for i, s in enumerate(sequences) if len(s) < len(prompts[i]) + num_tokens]:
        work: Work = []
        for i in pending:
            new = sequences[i][computed[i] :][:chunk]
            work.append((new, computed[i], tables[i]))
            computed[i] += len(new)
        complete = [computed[i] == len(sequences[i]) for i in pending]
        logits = model.forward(make_batch(work, complete), pool.layer)
        assert logits.dtype == torch.float32
        chosen = iter(logits.argmax(-1).tolist())
        for i in [i for i, is_complete in zip(pending, complete, strict=True) if is_complete]:
            sequences[i].append(next(chosen))
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)


def assert_greedy(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    """Checks that transformers, too, finds every output token the most likely after those before it."""
    model = transformers_model(folder)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-5, "the checkpoint's logits are too flat for a token comparison"
        assert logits.argmax(-1).tolist() == output


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(4, 320, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_token_identical_to_transformers(family: str, make_checkpoint: Callable[..., Path]) -> None:
    name, settings = FAMILIES[family]
    folder = make_checkpoint(name, **settings)
    prompts = random_prompts([1, 5, 16, 17, 40, 64, 100, 230])
    model = load_model(folder, device=CPU).model
    outputs = generate(model, prompts, 200, chunk=None)
    assert_greedy(folder, prompts, outputs)
    assert generate(model, prompts, 200, chunk=24) == outputs


def test_output_equals_that_of_transformers_generate(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("Qwen3", head_dim=32)
    prompt = random_prompts([37])[0]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = transformers_model(folder).generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=200, min_new_tokens=200, eos_token_id=None
        )
    model = load_model(folder, device=CPU).model
    assert generate(model, [prompt], 200, chunk=16) == [expected[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_follow_transformers(dtype: torch.dtype, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("Llama", initializer_range=0.05)
    prompt = random_prompts([80])[0]
    model = load_model(folder, device=CPU, dtype=dtype).model
    pool = Pool(model, 8)
    table = pool.allocate(len(prompt))
    model.forward(make_batch([(prompt[:48], 0, table)], [False]), pool.layer)
    logits = model.forward(make_batch([(prompt[48:], 48, table)], [True]), pool.layer)
    with torch.inference_mode():
        expected = transformers_model(folder, dtype)(input_ids=torch.tensor([prompt])).logits[0, -1:].float()
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


def test_a_chunk_without_wanted_rows_gives_no_logits_but_writes_every_layer(
    make_checkpoint: Callable[..., Path],
) -> None:
    model = load_model(make_checkpoint("Llama"), device=CPU).model
    pool = Pool(model, 4)
    table = pool.allocate(20)
    logits = model.forward(make_batch([(random_prompts([20])[0], 0, table)], [False]), pool.layer)
    assert logits.shape == (0, 320)
    assert not pool.buffer[table[0]].isnan().any()
    assert not pool.buffer[table[1], :, :, :4].isnan().any()
    assert pool.buffer[table[1], :, :, 4:].isnan().all()


def test_decodes_of_very_different_lengths_do_not_disturb_each_other(make_checkpoint: Callable[..., Path]) -> None:
    model = load_model(make_checkpoint("Qwen3", head_dim=32), device=CPU).model
    lengths = [3, 700, 150, 20, 410, 128, 260]
    prompts = random_prompts(lengths)
    together = generate(model, prompts, 20, chunk=None)
    assert together == [generate(model, [prompt], 20, chunk=None)[0] for prompt in prompts]


def test_a_request_full_of_nan_leaves_its_neighbours_alone(make_checkpoint: Callable[..., Path]) -> None:
    model = load_model(make_checkpoint("Llama"), device=CPU).model
    pool = Pool(model, 8)
    healthy, poisoned = pool.allocate(20), pool.allocate(35)
    prompts = random_prompts([20, 35])
    model.forward(make_batch([(prompts[0][:19], 0, healthy), (prompts[1][:34], 0, poisoned)], [False] * 2), pool.layer)
    work: Work = [(prompts[0][19:], 19, healthy), (prompts[1][34:], 34, poisoned)]
    expected = model.forward(make_batch(work, [True, True]), pool.layer)
    pool.buffer[poisoned] = torch.nan
    logits = model.forward(make_batch(work, [True, True]), pool.layer)
    torch.testing.assert_close(logits[0], expected[0])
    assert logits[1].isnan().all()
