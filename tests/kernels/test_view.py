"""A view names exactly the bytes of the tensors it was made of, and cannot be made to name others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.layouts import flashinfer, from_paged, from_tokens, mla, stored, vllm
from dynamo.kernels.reference import block_rows
from dynamo.kernels.view import View, common_alignment

LAYERS, BLOCKS, TOKENS, HEADS, DIM = 3, 5, 4, 2, 6


def numbered(*shape: int) -> torch.Tensor:
    """Distinct int32 in every element."""
    return torch.arange(int(np.prod(shape)), dtype=torch.int32).view(*shape) * 7919


def expect_rows(view: View, expected: torch.Tensor) -> None:
    """`expected` is [layer, plane, block, token, head, dim]."""
    blocks = np.arange(expected.shape[2])
    rows = expected.flatten(2, 3).contiguous().view(torch.uint8).numpy()
    assert (block_rows(view, blocks) == rows).all()
    assert view.block_bytes * view.num_blocks == expected.numel() * expected.element_size()


@given(order=st.permutations("BLPTH"), spread=st.sampled_from(["", "L", "LP"]))
@settings(deadline=None, max_examples=60)
def test_axes_in_any_order_and_spread_over_any_tensors(order: list[str], spread: str) -> None:
    counts = dict(zip("LPBTH", (LAYERS, 2, BLOCKS, TOKENS, HEADS), strict=True))
    letters = [letter for letter in order if letter not in spread]
    canonical = [letter for letter in "LPBTH" if letter not in spread]

    def one(seed: int) -> torch.Tensor:
        return numbered(*(counts[letter] for letter in letters), DIM) + seed

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.permute(*(letters.index(letter) for letter in canonical), -1)

    axes = "".join(letters) + "D"
    if not spread:
        whole = one(0)
        expect_rows(from_paged(whole, axes), turned(whole))
    elif spread == "L":
        tensors = [one(layer) for layer in range(LAYERS)]
        expect_rows(from_paged(tensors, axes), torch.stack([turned(t) for t in tensors]))
    else:
        pairs = [(one(2 * layer), one(2 * layer + 1)) for layer in range(LAYERS)]
        expect_rows(from_paged(pairs, axes), torch.stack([torch.stack([turned(t) for t in pair]) for pair in pairs]))


def test_permuted_tensors_are_followed_by_their_strides() -> None:
    hnd = [numbered(BLOCKS, 2, HEADS, TOKENS, DIM) for _ in range(LAYERS)]
    as_nhd = from_paged([kv.transpose(2, 3) for kv in hnd], "BPTHD")
    named = from_paged(hnd, "BPHTD")
    assert (as_nhd.token_stride, as_nhd.head_stride) == (named.token_stride, named.head_stride) == (24, 96)
    assert (as_nhd.base == named.base).all()


@pytest.mark.parametrize("outer_first", [False, True])
def test_vllm_five_dimensions(outer_first: bool) -> None:
    shape = (2, BLOCKS) if outer_first else (BLOCKS, 2)
    layers = [numbered(*shape, TOKENS, HEADS, DIM) + i for i in range(LAYERS)]
    stacked = torch.stack([kv if outer_first else kv.transpose(0, 1) for kv in layers])
    expect_rows(vllm(layers), stacked)


def test_vllm_keys_beside_values() -> None:
    layers = [numbered(BLOCKS, HEADS, TOKENS, 2 * DIM) + i for i in range(LAYERS)]
    expect_rows(vllm(layers), torch.stack([kv.unflatten(3, (2, DIM)).permute(3, 0, 2, 1, 4) for kv in layers]))


def test_vllm_latents() -> None:
    layers = [numbered(BLOCKS, TOKENS, DIM) + i for i in range(LAYERS)]
    expect_rows(vllm(layers), torch.stack(layers)[:, None, :, :, None])
    expect_rows(mla([layer.unsqueeze(2) for layer in layers]), torch.stack(layers)[:, None, :, :, None])


@pytest.mark.parametrize("shape", [(2, 2, TOKENS, HEADS, DIM), (3, 3, TOKENS, HEADS, DIM), (2, 3), (4, 4, 4, 5)])
def test_vllm_refuses_to_guess(shape: tuple[int, ...]) -> None:
    with pytest.raises(KernelArgumentError, match="name its axes"):
        vllm([torch.zeros(shape)])


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("is_split", [False, True])
def test_flashinfer(order: str, is_split: bool) -> None:
    inner = (TOKENS, HEADS) if order == "NHD" else (HEADS, TOKENS)
    layers = [numbered(BLOCKS, 2, *inner, DIM) + i for i in range(LAYERS)]
    stacked = torch.stack(layers).transpose(1, 2)
    expected = stacked if order == "NHD" else stacked.transpose(3, 4)
    pages = [(kv[:, 0], kv[:, 1]) for kv in layers] if is_split else layers
    expect_rows(flashinfer(pages, order), expected)


def test_pools_indexed_by_token() -> None:
    pairs = [(numbered(BLOCKS * TOKENS, HEADS, DIM) + i, numbered(BLOCKS * TOKENS, HEADS, DIM) - i) for i in range(3)]
    expected = torch.stack([torch.stack(pair) for pair in pairs]).unflatten(2, (BLOCKS, TOKENS))
    expect_rows(from_tokens(pairs, TOKENS), expected)
    with pytest.raises(KernelArgumentError, match="20 slots"):
        from_tokens(pairs, 3)
    with pytest.raises(KernelArgumentError, match="3 pools"):
        from_tokens([(*pair, pair[0]) for pair in pairs], TOKENS)  # type: ignore[misc]


@pytest.mark.parametrize("head_groups", [1, 2, 4])
def test_the_stored_layout(head_groups: int) -> None:
    blocks = numbered(BLOCKS, head_groups, LAYERS, 2, TOKENS, 4 // head_groups, DIM)
    slots = torch.zeros(BLOCKS, blocks[0].numel() * 4 + 100, dtype=torch.uint8)
    slots[:, : blocks[0].numel() * 4] = blocks.view(BLOCKS, -1).view(torch.uint8)
    shape = {"num_layers": LAYERS, "num_tokens": TOKENS, "num_heads": 4, "row_bytes": DIM * 4}
    view = stored(slots, **shape, head_groups=head_groups)
    expected = blocks.permute(2, 3, 0, 4, 1, 5, 6).flatten(4, 5)
    expect_rows(view, expected)
    for start, stop in ((0, 4), (0, 1), (1, 3), (2, 4), (1, 4), (3, 4)):
        expect_rows(view.slice_heads(start, stop), expected[:, :, :, :, start:stop])
    expect_rows(view.slice_layers(1, 3), expected[1:3])
    expect_rows(view.fold_heads(4), expected)
    expect_rows(view.slice_heads(1, 3).slice_layers(2, 3).slice_heads(1, 2), expected[2:3, :, :, :, 2:3])
    with pytest.raises(KernelArgumentError, match="does not fit slots"):
        stored(slots[:, :100], **shape)


def test_blocks_are_divided_and_joined() -> None:
    tensor = numbered(BLOCKS, 2, 12, HEADS, DIM)
    view = from_paged(tensor, "BPTHD")
    expected = tensor.transpose(0, 1)[None]
    divided = view.regroup(4)
    expect_rows(divided, expected.unflatten(3, (3, 4)).flatten(2, 3))
    expect_rows(divided.regroup(12), expected)
    with pytest.raises(KernelArgumentError, match="do not make whole blocks of 5"):
        view.regroup(5)
    with pytest.raises(KernelArgumentError, match="do not follow each other"):
        from_paged(tensor[:4], "BPTHD").regroup(24)


def test_single_tokens_are_joined_into_blocks() -> None:
    slots = numbered(BLOCKS * TOKENS, HEADS, DIM)
    expected = slots.view(1, 1, BLOCKS, TOKENS, HEADS, DIM)
    expect_rows(from_paged(slots, "BHD").regroup(TOKENS), expected)


def test_alignment_is_that_of_the_least_aligned_number() -> None:
    base = torch.zeros(4096, dtype=torch.uint8)
    start = -base.data_ptr() % 64
    assert from_paged(base[start:][:2048].view(2, 4, 4, 64), "BTHD").alignment == 16
    assert from_paged(base[start + 8 :][:2048].view(2, 4, 4, 64), "BTHD").alignment == 8
    assert from_paged(base[start:][: 2 * 16 * 20].view(2, 4, 4, 20), "BTHD").alignment == 4
    assert from_paged(base[start:][: 2 * 16 * 33].view(2, 4, 4, 33), "BTHD").alignment == 1
    assert common_alignment(0) == 16


def test_run_bytes() -> None:
    assert from_paged(numbered(BLOCKS, 2, TOKENS, HEADS, DIM), "BPTHD").run_bytes == TOKENS * HEADS * DIM * 4
    assert from_paged(numbered(BLOCKS, 2, HEADS, TOKENS, DIM), "BPHTD").run_bytes == TOKENS * HEADS * DIM * 4
    assert from_paged(numbered(BLOCKS, TOKENS, 2, HEADS, DIM), "BTPHD").run_bytes == HEADS * DIM * 4
    assert from_paged(numbered(BLOCKS, TOKENS, HEADS, 2, DIM), "BTHPD").run_bytes == DIM * 4


def test_no_view_reaches_outside_its_storage() -> None:
    view = from_paged(numbered(BLOCKS, 2, TOKENS, HEADS, DIM), "BPTHD")
    for change in (
        {"base": view.base - 1},
        {"base": view.base + 1},
        {"block_offsets": view.block_offsets + 1},
        {"num_tokens": TOKENS + 1},
        {"row_bytes": 8, "head_stride": 10**6},
    ):
        with pytest.raises(KernelArgumentError, match=r"reaches bytes \[.*\) of a storage of 1920 bytes"):
            replace(view, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_bytes": 0}, "must be positive"),
        ({"num_heads": 0}, "must be positive"),
        ({"head_groups": 2}, "head groups must divide"),
        ({"tensors": ()}, "at least one tensor"),
        ({"base": np.zeros(3, dtype=np.int64)}, "base must be int64 with 2 dimensions"),
        ({"block_offsets": np.zeros(3, dtype=np.int32)}, "block_offsets must be int64"),
        ({"limits": np.zeros((1, 2, 3), dtype=np.int64)}, "limits must be int64"),
        ({"head_stride": DIM}, "rows of 24 bytes overlap"),
        ({"token_stride": 24, "head_stride": 24}, "overlap"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    view = from_paged(numbered(BLOCKS, 2, TOKENS, HEADS, DIM), "BPTHD")
    with pytest.raises(KernelArgumentError, match=message):
        replace(view, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "axes", "message"),
    [
        (torch.zeros(2, 3, 4), "BT", "must name B once and end in D"),
        (torch.zeros(2, 3, 4), "TTD", "must name B once"),
        (torch.zeros(2, 3, 4), "BTHD", "name 4 dimensions"),
        (torch.zeros(2, 3, 4).transpose(1, 2), "BTD", "rows must be contiguous"),
        (torch.zeros(2, 0, 4), "BTD", "only the number of blocks may be 0"),
        (torch.zeros(2, 1, 4).expand(2, 3, 4), "BTD", "repeats the same memory"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)], "BTD", "must be alike"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float64)], "BTD", "must be alike"),
        ([], "BTD", "at least one layer"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: list[torch.Tensor], axes: str, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        from_paged(tensors, axes)


def test_limits_are_those_of_the_tensors() -> None:
    view = from_paged(numbered(BLOCKS, 2, TOKENS, HEADS, DIM), "BPTHD")
    for change in ({"limits": view.limits + np.array([0, 1])}, {"tensors": (torch.zeros(1000),)}):
        with pytest.raises(KernelArgumentError, match="not those of a storage"):
            replace(view, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63 - 4096, -(2**63)])
def test_offsets_do_not_wrap_around(offset: int) -> None:
    view = from_paged(numbered(BLOCKS, 2, TOKENS, HEADS, DIM), "BPTHD")
    with pytest.raises(KernelArgumentError, match="past the addresses"):
        replace(view, block_offsets=np.array([0, offset]))
    with pytest.raises(KernelArgumentError, match=r"past the addresses|of a storage"):
        replace(view, base=np.full_like(view.base, offset))


def test_what_was_checked_stays_so() -> None:
    offsets = np.zeros(1, dtype=np.int64)
    view = replace(from_paged(numbered(BLOCKS, 2, TOKENS, HEADS, DIM), "BPTHD"), block_offsets=offsets)
    offsets[0] = 2**40
    assert view.block_offsets.tolist() == [0]
    for array in (view.base, view.block_offsets, view.limits):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_a_pool_without_blocks_is_a_view() -> None:
    view = from_paged(torch.zeros(0, 2, 4, 2, 8), "BPTHD")
    assert (view.num_blocks, view.block_bytes) == (0, 2 * 4 * 2 * 32)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (-1, 1), (1, 3), (2, 1)])
def test_ranges_outside_are_refused(start: int, stop: int) -> None:
    view = from_paged(numbered(BLOCKS, 2, TOKENS, HEADS, DIM), "BPTHD")
    with pytest.raises(KernelArgumentError, match="heads"):
        view.slice_heads(start, stop)
    with pytest.raises(KernelArgumentError, match="layers"):
        view.slice_layers(start, stop)
