"""The public attention functions: right on CPU tensors, strict about their arguments, and the same on a GPU."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.paged_attention import (
    choose_num_splits,
    decode_workspace_elements,
    paged_decode,
    paged_prefill,
    paged_write,
)

BLOCK_SIZE = 16


class Sequences:
    """Sequences of random keys and values in a shuffled, strided cache, NaN wherever no token lies."""

    def __init__(
        self,
        lengths: list[int],
        *,
        num_kv_heads: int = 2,
        k_dim: int = 64,
        v_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(len(lengths))
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        ids = torch.randperm(sum(counts) + 3).split([*counts, 3])[:-1]
        self.keys = [torch.randn(length, num_kv_heads, k_dim).to(dtype) for length in lengths]
        self.values = [torch.randn(length, num_kv_heads, v_dim).to(dtype) for length in lengths]
        pools = [torch.full((sum(counts) + 3, 2, BLOCK_SIZE, num_kv_heads, dim), torch.nan) for dim in (k_dim, v_dim)]
        tables = torch.full((len(lengths), max(counts) + 1), -7, dtype=torch.int32)
        for i, owned in enumerate(ids):
            tables[i, : len(owned)] = owned
            places = torch.arange(lengths[i])
            pools[0][owned[places // BLOCK_SIZE], 1, places % BLOCK_SIZE] = self.keys[i].float()
            pools[1][owned[places // BLOCK_SIZE], 1, places % BLOCK_SIZE] = self.values[i].float()
        self.k_cache, self.v_cache = (pool.to(device=device, dtype=dtype)[:, 1] for pool in pools)
        self.block_tables = tables.to(device)
        self.context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)

    @property
    def cache(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_cache, self.v_cache, self.block_tables, self.context_lens

    def expected(self, i: int, q: Tensor, scale: float, window: int | None = None) -> Tensor:
        """Attention of the last `len(q)` tokens of sequence i, [len(q), num_q_heads, v_dim], a head at a time in float64."""
        keys, values, length = self.keys[i].double(), self.values[i].double(), len(self.keys[i])
        group = q.shape[1] // keys.shape[1]
        out = torch.empty(*q.shape[:2], values.shape[2], dtype=torch.float64)
        for j in range(len(q)):
            stop = length - len(q) + j + 1
            start = 0 if window is None else max(0, stop - window)
            for head in range(q.shape[1]):
                scores = keys[start:stop, head // group] @ q[j, head].double() * scale
                out[j, head] = scores.softmax(0) @ values[start:stop, head // group]
        return out


@pytest.mark.parametrize("window", [None, 9])
def test_decode_on_the_cpu_is_attention(window: int | None) -> None:
    sequences = Sequences([1, 16, 45, 70], v_dim=48)
    q = torch.randn(4, 6, 64)
    out = torch.full((4, 6, 48), torch.nan)
    assert paged_decode(q, *sequences.cache, scale=0.3, out=out, window=window) is out
    for i in range(4):
        expected = sequences.expected(i, q[i : i + 1], 0.3, window)[0].float()
        torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_prefill_on_the_cpu_is_causal_attention(window: int | None) -> None:
    sequences = Sequences([5, 40, 33])
    lens = [5, 17, 1]
    q = torch.randn(sum(lens), 4, 64)
    starts = torch.tensor([0, 5, 22, 23])
    out = torch.full_like(q, torch.nan)
    paged_prefill(q, *sequences.cache, starts, max_query_len=17, scale=0.2, out=out, window=window)
    for i, part in enumerate(q.split(lens)):
        expected = sequences.expected(i, part, 0.2, window).float()
        torch.testing.assert_close(out.split(lens)[i], expected, atol=1e-5, rtol=1e-5)


def test_float8_caches_are_scaled_by_head() -> None:
    sequences = Sequences([20], dtype=torch.float8_e4m3fn)
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([4.0])
    q, out = torch.randn(1, 2, 64), torch.empty(1, 2, 64)
    paged_decode(q, *sequences.cache, scale=0.1, out=out, k_scale=k_scale, v_scale=v_scale)
    sequences.keys = [keys.float() * k_scale[:, None] for keys in sequences.keys]
    sequences.values = [values.float() * 4 for values in sequences.values]
    torch.testing.assert_close(out[0], sequences.expected(0, q, 0.1)[0].float(), atol=1e-5, rtol=1e-5)


def test_nothing_to_do_is_done() -> None:
    sequences = Sequences([20])
    k_cache, v_cache, tables, lens = sequences.cache
    none = torch.empty(0, 4, 64)
    paged_decode(none, k_cache, v_cache, tables[:0], lens[:0], scale=1.0, out=none)
    starts = torch.zeros(1, dtype=torch.int64)
    paged_prefill(none, k_cache, v_cache, tables[:0], lens[:0], starts, max_query_len=1, scale=1.0, out=none)
    no_slots = torch.empty(0, dtype=torch.int64)
    paged_write(none[:, :2], none[:, :2], k_cache, v_cache, no_slots, no_slots)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 64, dtype=torch.float64)}, "q must be"),
        ({"q": torch.zeros(2, 3, 64)}, "share"),
        ({"q": torch.zeros(2, 4, 32)}, "do not fit"),
        ({"q": torch.zeros(1, 4, 64), "out": torch.zeros(1, 4, 64)}, "decode takes one each"),
        ({"k_cache": torch.zeros(4, 16, 2, 64, dtype=torch.float16)}, "float8_e4m3fn"),
        ({"v_cache": torch.zeros(4, 16, 4, 64)}, "do not fit"),
        ({"k_cache": torch.zeros(4, 16, 64, 2).transpose(2, 3)}, "last stride 1"),
        ({"block_tables": torch.zeros(2, 3)}, "block_tables"),
        ({"block_tables": torch.zeros(3, 3, dtype=torch.int32)}, "block_tables"),
        ({"context_lens": torch.ones(2, 1, dtype=torch.int32)}, "context_lens"),
        ({"out": torch.zeros(2, 4, 32)}, "out must be"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"out": torch.zeros(1, 4, 64).expand(2, 4, 64)}, "stride of out"),
        ({"window": 0}, "window"),
        ({"num_splits": 2}, "workspace"),
        ({"num_splits": 2, "workspace": torch.zeros(7)}, "workspace"),
        ({"num_splits": 65}, "num_splits"),
        ({"k_scale": torch.ones(1)}, "float8"),
        ({"block_tables": torch.full((2, 3), 4, dtype=torch.int32)}, "names block 4"),
        ({"block_tables": torch.full((2, 3), -1, dtype=torch.int32)}, "names block -1"),
        ({"context_lens": torch.tensor([3, 49])}, "too few blocks"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 4, 64),
        "k_cache": torch.zeros(4, 16, 2, 64),
        "v_cache": torch.zeros(4, 16, 2, 64),
        "block_tables": torch.zeros(2, 3, dtype=torch.int32),
        "context_lens": torch.tensor([20, 30]),
        "scale": 0.1,
        "out": torch.zeros(2, 4, 64),
    }
    paged_decode(**arguments)
    with pytest.raises(KernelArgumentError, match=message):
        paged_decode(**(arguments | change))


def test_a_chunk_longer_than_its_context_is_refused() -> None:
    k_cache, v_cache, tables, lens = Sequences([20]).cache
    q = torch.zeros(21, 2, 64)
    with pytest.raises(KernelArgumentError, match="21 queries but a context of 20"):
        paged_prefill(
            q, k_cache, v_cache, tables, lens, torch.tensor([0, 21]), max_query_len=21, scale=1.0, out=q.clone()
        )


@pytest.mark.parametrize(
    ("starts", "message"),
    [([1, 4, 5], "rise from 0"), ([0, 4, 3], "rise from 0"), ([0, 2, 4], "rise from 0 to 5"), ([0, 1, 5], "4 queries")],
)
def test_chunks_that_do_not_fit_are_refused(starts: list[int], message: str) -> None:
    q = torch.zeros(5, 2, 64)
    out, cache = torch.full_like(q, torch.nan), Sequences([20, 20]).cache
    with pytest.raises(KernelArgumentError, match=message):
        paged_prefill(q, *cache, torch.tensor(starts), max_query_len=3, scale=1.0, out=out)
    assert out.isnan().all()


def test_tokens_outside_the_cache_are_not_stored() -> None:
    k_cache, v_cache = torch.zeros(2, 4, 16, 2, 8)
    k, v = torch.ones(2, 5, 2, 8)
    paged_write(k, v, k_cache, v_cache, torch.tensor([0, 1, -1, 4, 3]), torch.tensor([-1, 16, 0, 0, 15]))
    for cache in (k_cache, v_cache):
        assert cache[3, 15].eq(1).all() and cache.sum() == 16


def test_write_refuses_what_does_not_fit() -> None:
    k_cache, v_cache = torch.zeros(2, 4, 16, 2, 8)
    k, v = torch.ones(2, 3, 2, 8)
    blocks = torch.tensor([0, 1, 2])
    for new, slots in ((k[:, :1], blocks), (k.half(), blocks), (k, blocks[:2]), (k, blocks.float())):
        with pytest.raises(KernelArgumentError):
            paged_write(new, v, k_cache, v_cache, slots, blocks)
    with pytest.raises(KernelArgumentError, match="no other of the cache 0"):
        paged_write(k, v, k_cache[:1].expand(4, -1, -1, -1), v_cache, blocks, blocks)
    with pytest.raises(KernelArgumentError, match="k is float32"):
        paged_write(torch.tensor(1.0), v, k_cache, v_cache, blocks, blocks)
    assert not k_cache.any()


def test_splits_fill_the_device_and_stop_at_short_contexts() -> None:
    assert choose_num_splits(1, 8, 1 << 20, num_processors=132) == 33
    assert choose_num_splits(4, 8, 1 << 20, num_processors=132) == 8
    assert choose_num_splits(1, 1, 1 << 20, num_processors=132) == 64
    assert choose_num_splits(1, 8, 1024, num_processors=132) == 4
    assert choose_num_splits(1, 8, 10, num_processors=132) == 1
    assert decode_workspace_elements(2, 4, 64, 1) == 0


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("window", [None, 100])
def test_kernels_agree_with_attention(dtype: torch.dtype, head_dim: int, group: int, window: int | None) -> None:
    lengths = [1, 300, 45, 1000]
    sequences = Sequences(lengths, k_dim=head_dim, v_dim=head_dim, dtype=dtype, device="cuda")
    scale, close = head_dim**-0.5, {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    q = torch.randn(4, 2 * group, head_dim).to(dtype)
    expected = torch.cat([sequences.expected(i, q[i : i + 1], scale, window) for i in range(4)]).to(dtype)
    for num_splits in (1, 3, 64):
        elements = decode_workspace_elements(4, 2 * group, head_dim, num_splits)
        workspace = torch.full((elements,), torch.nan, device="cuda")
        out = torch.full_like(q, torch.nan, device="cuda")
        paged_decode(
            q.cuda(), *sequences.cache, scale=scale, out=out, window=window, workspace=workspace, num_splits=num_splits
        )
        torch.testing.assert_close(out.cpu(), expected, **close)
    lens = [1, 130, 45, 3]
    q = torch.randn(sum(lens), 2 * group, head_dim).to(dtype)
    starts = torch.tensor([0, *lens]).cumsum(0).to("cuda", torch.int32)
    out = torch.full_like(q, torch.nan, device="cuda")
    paged_prefill(q.cuda(), *sequences.cache, starts, max_query_len=130, scale=scale, out=out, window=window)
    parts = [sequences.expected(i, part, scale, window) for i, part in enumerate(q.split(lens))]
    torch.testing.assert_close(out.cpu(), torch.cat(parts).to(dtype), **close)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_read_latents_and_float8_like_the_cpu(dtype: torch.dtype) -> None:
    close = {"atol": 5e-2, "rtol": 5e-2}
    latents = torch.randn(40, 64, 1, 576).to(dtype)
    tables, lens = torch.randperm(40).view(2, 20).int(), torch.tensor([1280, 777])
    q, out = torch.randn(2, 16, 576).to(dtype), torch.empty(2, 16, 512, dtype=dtype)
    arguments = (q, latents, latents[..., :512], tables, lens)
    expected = paged_decode(*arguments, scale=0.05, out=out).clone()
    on_gpu = [tensor.cuda() for tensor in (q, latents, tables, lens)]
    values = on_gpu[1][..., :512]
    workspace = torch.empty(decode_workspace_elements(2, 16, 512, 8), device="cuda")
    got = paged_decode(
        on_gpu[0], on_gpu[1], values, *on_gpu[2:], scale=0.05, out=out.cuda(), workspace=workspace, num_splits=8
    )
    torch.testing.assert_close(got.cpu(), expected, **close)

    cache = torch.randn(2, 40, 16, 2, 128).to(torch.float8_e4m3fn)
    scales = {"k_scale": torch.tensor([0.5, 1.5]), "v_scale": torch.tensor([2.0])}
    q, lens = torch.randn(2, 8, 128).to(dtype), torch.tensor([320, 77])
    expected = paged_decode(q, cache[0], cache[1], tables, lens, scale=0.1, out=torch.empty_like(q), **scales)
    cache, scales = cache.cuda(), {name: factors.cuda() for name, factors in scales.items()}
    got = paged_decode(
        q.cuda(), cache[0], cache[1], tables.cuda(), lens.cuda(), scale=0.1, out=torch.empty_like(q.cuda()), **scales
    )
    torch.testing.assert_close(got.cpu(), expected, **close)


@gpu
@pytest.mark.gpu
def test_on_the_gpu_padding_is_not_written_and_wrong_blocks_give_nan() -> None:
    pool = torch.full((2, 6, 16, 2, 64), torch.nan, device="cuda")
    k, v = torch.randn(2, 4, 2, 64, device="cuda")
    blocks = torch.tensor([3, -1, 6, 0], device="cuda")
    paged_write(k, v, pool[0, :], pool[1, :], blocks, torch.tensor([0, 0, 0, 15], device="cuda"))
    assert torch.equal(pool[0, 3, 0], k[0])
    assert torch.equal(pool[1, 0, 15], v[3])
    assert pool.isfinite().sum() == 4 * 2 * 64
    out = torch.zeros(3, 2, 64, device="cuda")
    tables = torch.tensor([[3], [6], [3]], dtype=torch.int32, device="cuda")
    paged_decode(k[:3], pool[0], pool[1], tables, torch.tensor([1, 1, 0], device="cuda"), scale=1.0, out=out)
    torch.testing.assert_close(out[0], v[0])
    assert out[1].isnan().all()
    assert not out[2].any()
