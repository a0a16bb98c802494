"""The attention kernels agree with the reference on odd shapes, and never touch what does not belong to a sequence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamo.kernels import paged_reference
from dynamo.kernels.paged_attention import decode_workspace_elements

pytest.importorskip("triton", reason="needs Triton")

from dynamo.kernels import paged_attention_kernel, paged_prefill_kernel, paged_write_kernel

few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _interpreted_kernels(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    for module, names in (
        (paged_attention_kernel, ("decode_kernel", "combine_kernel")),
        (paged_prefill_kernel, ("prefill_kernel",)),
        (paged_write_kernel, ("write_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, interpreted(getattr(module, name)))
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widening_dot(InterpreterBuilder.create_dot))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def widening_dot(dot: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter keeps bfloat16 as its 16 bits and multiplies these as numbers; here they are widened first."""
    import triton.language as tl

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return type(operand)((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    return create_dot


@dataclass(frozen=True)
class Case:
    """Sequences over a shuffled cache whose unused places hold NaN. Blocks of all layers lie together: strided views."""

    num_kv_heads: int
    group: int
    k_dim: int
    v_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    window: int | None = None
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    values_in_keys: bool = False

    def make(self) -> "Inputs":
        generator = torch.Generator().manual_seed(len(self.context_lens))
        counts = [-(-length // self.block_size) for length in self.context_lens]
        num_blocks = sum(counts) + 2
        ids = torch.randperm(num_blocks, generator=generator)[: sum(counts)]
        tables = torch.full((len(counts), max(counts, default=0) + 1), 10**6, dtype=torch.int32)
        planes = []
        for dim in (self.k_dim, self.v_dim):
            pool = torch.full((num_blocks, 3, self.block_size, self.num_kv_heads, dim), torch.nan)
            planes.append(pool)
        for i, (length, owned) in enumerate(zip(self.context_lens, ids.split(counts), strict=True)):
            tables[i, : len(owned)] = owned
            for pool in planes:
                rows = torch.randn(length, self.num_kv_heads, pool.shape[-1], generator=generator)
                for place in range(length):
                    pool[owned[place // self.block_size], 1, place % self.block_size] = rows[place]
            if self.window is not None:  # blocks that no query of up to 60 tokens looks at were given away
                tables[i, : max(0, length - 60 - self.window) // self.block_size] = -1
        k_cache, v_cache = (pool.to(self.cache_dtype or self.dtype)[:, 1] for pool in planes)
        if self.values_in_keys:
            v_cache = k_cache[..., : self.v_dim]
        return Inputs(k_cache, v_cache, tables, torch.tensor(self.context_lens, dtype=torch.int32), generator)

    @property
    def scale(self) -> float:
        return self.k_dim**-0.5


@dataclass(frozen=True)
class Inputs:
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    generator: torch.Generator


Scales = tuple[Tensor | None, Tensor | None]


def decode(case: Case, num_splits: int, scales: Scales = (None, None)) -> tuple[Tensor, Tensor]:
    inputs = case.make()
    num_seqs, num_heads = len(case.context_lens), case.num_kv_heads * case.group
    q = torch.randn(num_seqs, num_heads, case.k_dim, generator=inputs.generator).to(case.dtype)
    out, expected = torch.full((2, num_seqs, num_heads, case.v_dim), torch.nan, dtype=case.dtype)
    workspace = torch.full((decode_workspace_elements(num_seqs, num_heads, case.v_dim, num_splits),), torch.nan)
    arguments = (q, inputs.k_cache, inputs.v_cache, inputs.block_tables, inputs.context_lens)
    paged_attention_kernel.launch_decode(*arguments, case.scale, case.window, out, workspace, num_splits, *scales)
    paged_reference.attend(*arguments, torch.arange(num_seqs + 1), case.scale, case.window, expected, *scales)
    return out, expected


def prefill(case: Case, query_lens: tuple[int, ...], scales: Scales = (None, None)) -> tuple[Tensor, Tensor]:
    inputs = case.make()
    num_tokens, num_heads = sum(query_lens), case.num_kv_heads * case.group
    # Queries as the model has them: a slice of a merged projection.
    merged = torch.randn(num_tokens, num_heads + 3, case.k_dim, generator=inputs.generator).to(case.dtype)
    out, expected = torch.full((2, num_tokens, num_heads, case.v_dim), torch.nan, dtype=case.dtype)
    starts = torch.tensor((0, *query_lens)).cumsum(0)
    arguments = (merged[:, 2:-1], inputs.k_cache, inputs.v_cache, inputs.block_tables, inputs.context_lens, starts)
    longest = max(query_lens) + 5  # an upper bound is enough
    paged_prefill_kernel.launch_prefill(*arguments, longest, case.scale, case.window, out, *scales)
    paged_reference.attend(*arguments, case.scale, case.window, expected, *scales)
    return out, expected


HEADS = st.sampled_from([(1, 1), (2, 2), (1, 4), (2, 7), (1, 8)])
DIMS = st.sampled_from([(32, 32), (64, 64), (80, 80), (96, 96), (112, 48), (128, 128), (24, 24), (8, 8)])
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=2).map(tuple)
WINDOWS = st.sampled_from([None, None, 1, 17, 64])


@few
@given(
    heads=HEADS | st.just((1, 20)),
    dims=DIMS,
    block_size=st.sampled_from([16, 32]),
    context_lens=LENGTHS,
    window=WINDOWS,
    num_splits=st.sampled_from([1, 2, 3, 8]),
)
def test_decode_equals_the_reference(
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    context_lens: tuple[int, ...],
    window: int | None,
    num_splits: int,
) -> None:
    out, expected = decode(Case(*heads, *dims, block_size, context_lens, window), num_splits)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@few
@given(
    heads=HEADS,
    dims=DIMS,
    block_size=st.sampled_from([16, 32]),
    chunks=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), min_size=1, max_size=2),
    window=WINDOWS,
)
def test_prefill_equals_the_reference(
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    chunks: list[tuple[int, int]],
    window: int | None,
) -> None:
    context_lens = tuple(num_new + num_past for num_new, num_past in chunks)
    case = Case(*heads, *dims, block_size, context_lens, window)
    out, expected = prefill(case, tuple(num_new for num_new, _ in chunks))
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_reference(dtype: torch.dtype) -> None:
    case = Case(2, 4, 96, 96, 16, (45, 130), dtype=dtype)
    for out, expected in (decode(case, 1), decode(case, 3), prefill(case, (9, 30))):
        torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("per_head", [True, False])
def test_float8_caches_are_read_exactly(per_head: bool) -> None:
    case = Case(2, 2, 64, 64, 16, (45, 90), cache_dtype=torch.float8_e4m3fn)
    k_scale, v_scale = (torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25]))
    scales = (k_scale, v_scale) if per_head else (k_scale[:1], v_scale[:1])
    for out, expected in (decode(case, 1, scales), decode(case, 3, scales), prefill(case, (9, 30), scales)):
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_every_float8_value_is_converted() -> None:
    """One key head of one token: the output is the value itself, for all 256 bit patterns, NaN among them."""
    bits = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    k_cache = torch.zeros(1, 16, 2, 128, dtype=torch.float8_e4m3fn)
    v_cache = k_cache.clone()
    v_cache[0, 0] = bits.view(2, 128)
    q, out = torch.zeros(2, 1, 2, 128)
    paged_attention_kernel.launch_decode(
        q, k_cache, v_cache, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 1.0, None, out,
        None, 1, None, None,
    )  # fmt: skip
    torch.testing.assert_close(out.view(-1), bits.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("k_dim", "v_dim"), [(80, 64), (96, 48)])
def test_values_may_be_a_prefix_of_the_keys(k_dim: int, v_dim: int) -> None:
    """Multi-head latent attention: read once where they are the keys' first power of two, read again otherwise."""
    case = Case(1, 16, k_dim, v_dim, 32, (33, 90), values_in_keys=True)
    for out, expected in (decode(case, 1), decode(case, 2), prefill(case, (20, 1))):
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_a_sequence_of_length_0_gives_zeros_and_leaves_its_neighbours_alone() -> None:
    for num_splits in (1, 4):
        out, expected = decode(Case(1, 4, 64, 64, 16, (0, 70, 0)), num_splits)
        assert not out[[0, 2]].any()
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


# The interpreter's maximum of nothing but NaN says so; on a GPU it is NaN without a word.
silent_nan = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


@silent_nan
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("wrong", [-1, 7, 2**31 - 1])
def test_a_block_that_does_not_exist_is_not_read_and_gives_nan(wrong: int, num_splits: int) -> None:
    case = Case(1, 2, 32, 32, 16, (100, 100))
    inputs = case.make()
    num_blocks = 7  # a prefix of the cache: what is behind it must not be read
    tables = torch.arange(7, dtype=torch.int32).repeat(2, 1)
    tables[0, 4] = wrong
    q = torch.randn(2, 2, 32)
    out, expected = torch.empty(2, 2, 2, 32)
    k_cache, v_cache = (cache[:num_blocks].nan_to_num() for cache in (inputs.k_cache, inputs.v_cache))
    workspace = torch.empty(decode_workspace_elements(2, 2, 32, num_splits))
    paged_attention_kernel.launch_decode(
        q, k_cache, v_cache, tables, inputs.context_lens, 0.2, None, out, workspace, num_splits, None, None
    )
    assert out[0].isnan().all()
    good = tables[1:].repeat(2, 1)
    paged_reference.attend(
        q, k_cache, v_cache, good, inputs.context_lens, torch.arange(3), 0.2, None, expected, None, None
    )
    torch.testing.assert_close(out[1], expected[1], atol=2e-5, rtol=2e-5)


@silent_nan
def test_a_context_longer_than_its_table_is_not_read_past_it_and_gives_nan() -> None:
    case = Case(1, 2, 32, 32, 16, (40,))
    inputs = case.make()
    q, out = torch.zeros(2, 1, 2, 32)
    tables = inputs.block_tables[:, :3]
    paged_attention_kernel.launch_decode(
        q, inputs.k_cache, inputs.v_cache, tables, torch.tensor([49]), 0.2, None, out, None, 1, None, None
    )
    assert out.isnan().all()


@few
@given(
    num_heads=st.integers(1, 40),
    dims=st.sampled_from([(64, 64), (80, 48), (8, 8), (128, 128)]),
    num_tokens=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_write_fills_the_slots_and_nothing_else(
    num_heads: int, dims: tuple[int, int], num_tokens: int, dtype: torch.dtype
) -> None:
    pools = [torch.full((4, 2, 16, num_heads, dim), torch.nan, dtype=dtype) for dim in dims]
    k, v = (torch.randn(num_tokens, num_heads + 2, dim)[:, 1:-1].to(dtype) for dim in dims)
    blocks, offsets = torch.tensor([3, -1, 0, 4, 3])[:num_tokens], torch.tensor([0, 0, 15, 0, 7])[:num_tokens]
    expected = [pool.clone() for pool in pools]
    paged_write_kernel.launch_write(k, v, pools[0][:, 1], pools[1][:, 1], blocks, offsets)
    paged_reference.write(k, v, expected[0][:, 1], expected[1][:, 1], blocks, offsets)
    for pool, wanted in zip(pools, expected, strict=True):
        assert torch.equal(pool.nan_to_num(9), wanted.nan_to_num(9))
