"""Quantised copies: stated error bounds, layouts, planes apart, and what is refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.layouts import from_paged
from dynamo.kernels.quantize import QuantizedLayout, dequantize_blocks, quantize_blocks
from dynamo.kernels.reference_transforms import dequantize_reference, quantize_reference

LARGEST = {"fp8_e4m3": 448, "int8": 127, "int4": 7}
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ALL = np.arange(4)


def make_layout(**changes):
    sizes = {"num_layers": 2, "num_tokens": 5, "num_heads": 4, "head_dim": 16, "elements": torch.float32}
    return QuantizedLayout(**{"allow_int4": True, **sizes, **changes})


def make_rows(layout, num_blocks=4):
    """Random rows [block, layer, plane, token, head, dim], of different magnitude per head."""
    shape = (num_blocks, layout.num_layers, layout.num_planes, layout.num_tokens, layout.num_heads, layout.head_dim)
    magnitudes = torch.exp2(torch.randint(-12, 12, (*shape[:3], 1, shape[4], 1)).float())
    return (torch.randn(shape) * magnitudes).to(layout.elements)


def make_slots(layout, num_slots=4, extra_bytes=0):
    return torch.full((num_slots, layout.block_bytes + extra_bytes), 0xAA, dtype=torch.uint8)


def round_trip(layout, rows):
    slots, back = layout.view(make_slots(layout, rows.shape[0])), torch.full_like(rows, float("nan"))
    ids = np.arange(rows.shape[0])
    quantize_blocks(from_paged(rows, "BLPTHD"), ids, slots, ids)
    dequantize_blocks(slots, ids, from_paged(back, "BLPTHD"), ids)
    return back


@settings(max_examples=60, deadline=None)
@given(
    elements=st.sampled_from(list(HALF_ULP)),
    dtype=st.sampled_from(list(LARGEST)),
    num_tokens=st.integers(1, 40),
    num_heads=st.integers(1, 5),
    head_dim=st.sampled_from([2, 4, 10, 16, 128]),
    seed=st.integers(0, 2**31),
)
def test_errors_stay_within_the_stated_bounds(elements, dtype, num_tokens, num_heads, head_dim, seed):
    torch.manual_seed(seed)
    layout = make_layout(elements=elements, dtype=dtype, num_tokens=num_tokens, num_heads=num_heads, head_dim=head_dim)
    rows = make_rows(layout)
    x, restored = rows.double(), round_trip(layout, rows).double()
    amax = x.abs().amax(dim=(3, 5), keepdim=True)
    if dtype == "fp8_e4m3":
        bound = torch.maximum(x.abs() / 16, amax / 458752)
    else:
        bound = amax / (2 * LARGEST[dtype])
    bound = (
        bound * (1 + 2.0**-20) + restored.abs() * HALF_ULP[elements] + (2.0**-25 if elements is torch.float16 else 0)
    )
    assert ((restored - x).abs() <= bound).all()


@pytest.mark.parametrize("elements", HALF_ULP, ids=str)
@pytest.mark.parametrize("dtype", LARGEST)
def test_restored_rows_equal_the_reference(elements, dtype):
    layout = make_layout(elements=elements, dtype=dtype, num_tokens=40, head_dim=128)
    rows = make_rows(layout)
    values, scales = quantize_reference(rows, dtype)
    assert torch.equal(round_trip(layout, rows), dequantize_reference(values, scales, elements))


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("fp8_e4m3", 0.025, 0.028), ("int8", 0.007, 0.01), ("int4", 0.13, 0.17)]
)
def test_gaussian_rows_lose_what_the_docstring_says(dtype, low, high):
    layout = make_layout(dtype=dtype, num_tokens=16, num_heads=8, head_dim=128)
    rows = torch.randn(make_rows(layout).shape)
    error = (round_trip(layout, rows) - rows).norm() / rows.norm()
    assert low < error < high


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("keys", "values"), [(True, False), (False, True)])
def test_the_plane_that_is_not_quantised_is_copied_as_it_is(dtype, keys, values):
    layout = make_layout(dtype=dtype, keys=keys, values=values, elements=torch.bfloat16, head_groups=2)
    rows = make_rows(layout)
    restored = round_trip(layout, rows)
    same = [torch.equal(restored[:, :, plane], rows[:, :, plane]) for plane in (0, 1)]
    assert same == [not keys, not values]
    both = round_trip(replace(layout, keys=True, values=True), rows)
    assert torch.equal(restored[:, :, int(values)], both[:, :, int(values)])


@pytest.mark.parametrize("axes", ["BLPHTD", "LPBTHD", "BLTHPD"])
def test_every_layout_gives_the_same_slots(axes):
    layout = make_layout(elements=torch.float16, head_groups=4)
    rows = make_rows(layout)
    other = rows.permute(*("BLPTHD".index(letter) for letter in axes)).contiguous()
    slots, twins = make_slots(layout, extra_bytes=12), make_slots(layout, extra_bytes=12)
    quantize_blocks(from_paged(rows, "BLPTHD"), ALL, layout.view(slots), ALL[::-1].copy())
    quantize_blocks(from_paged(other, axes), ALL, layout.view(twins), ALL[::-1].copy())
    assert torch.equal(slots, twins)
    back = torch.full_like(other, float("nan"))
    dequantize_blocks(layout.view(slots), ALL[::-1].copy(), from_paged(back, axes), ALL)
    assert torch.equal(back.permute(*(axes.index(letter) for letter in "BLPTHD")), round_trip(layout, rows))


def test_a_group_of_heads_is_one_contiguous_block_of_its_own():
    layout = make_layout(head_groups=2)
    rows, slots = make_rows(layout), make_slots(layout)
    quantize_blocks(from_paged(rows, "BLPTHD"), ALL, layout.view(slots), ALL)
    half = make_layout(num_heads=2)
    parts = make_slots(half)
    quantize_blocks(from_paged(rows, "BLPTHD").slice_heads(2, 4), ALL, half.view(parts), ALL)
    assert torch.equal(slots[:, layout.group_bytes :], parts)


def test_latents_with_one_plane():
    layout = make_layout(num_planes=1, num_heads=1, head_dim=576, num_tokens=64, elements=torch.bfloat16)
    rows = make_rows(layout)
    slots, back = layout.view(make_slots(layout)), torch.full_like(rows, float("nan"))
    quantize_blocks(from_paged(rows.view(4, 2, 64, 576), "BLTD"), ALL, slots, ALL)
    dequantize_blocks(slots, ALL, from_paged(back.view(4, 2, 64, 576), "BLTD"), ALL)
    assert (back - rows).float().norm() < 0.03 * rows.float().norm()


def test_only_listed_slots_and_blocks_are_written():
    layout = make_layout(dtype="int8")
    rows, slots = make_rows(layout), make_slots(layout, extra_bytes=8)
    quantize_blocks(from_paged(rows, "BLPTHD"), np.array([3, 0]), layout.view(slots), np.array([0, 2]))
    assert (slots[[1, 3]] == 0xAA).all() and (slots[:, layout.block_bytes :] == 0xAA).all()
    back = torch.full_like(rows, float("nan"))
    dequantize_blocks(layout.view(slots), np.array([2]), from_paged(back, "BLPTHD"), np.array([1]))
    assert back[[0, 2, 3]].isnan().all() and not back[1].isnan().any()


@pytest.mark.parametrize("elements", HALF_ULP, ids=str)
@pytest.mark.parametrize("dtype", LARGEST)
def test_broken_elements_harm_only_themselves(elements, dtype):
    layout = make_layout(dtype=dtype, elements=elements)
    rows = make_rows(layout)
    broken, bad = rows.clone(), (slice(None), 0, 1, 2, 3)
    rows[(*bad, slice(0, 3))] = 0
    broken[(*bad, 0)], broken[(*bad, 1)], broken[(*bad, 2)] = float("nan"), float("inf"), float("-inf")
    whole, restored = round_trip(layout, rows), round_trip(layout, broken)
    amax = round_trip(layout, rows)[:, 0, 1, :, 3].abs().amax(dim=(1, 2))
    assert torch.equal(restored[(*bad, 1)], amax) and torch.equal(restored[(*bad, 2)], -amax)
    assert restored[(*bad, 0)].isnan().all() if dtype == "fp8_e4m3" else (restored[(*bad, 0)] == 0).all()
    restored[(*bad, slice(0, 3))] = 0
    assert torch.equal(restored, whole)


@pytest.mark.parametrize("elements", HALF_ULP, ids=str)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("steps_below", range(3))
def test_the_largest_numbers_stay_finite(elements, dtype, steps_below):
    layout, largest = make_layout(dtype=dtype, elements=elements), torch.tensor(torch.finfo(elements).max)
    for _ in range(steps_below):
        largest = torch.nextafter(largest.to(elements), torch.zeros((), dtype=elements))
    rows = torch.full_like(make_rows(layout), float(largest))
    rows[:, :, :, ::2] *= -1
    restored = round_trip(layout, rows)
    assert restored.isfinite().all() and torch.allclose(restored.double(), rows.double(), rtol=2**-20, atol=0.0)
    assert torch.equal(restored, dequantize_reference(*quantize_reference(rows, dtype), elements))


def test_zeros_stay_zeros_and_empty_lists_do_nothing():
    layout = make_layout(elements=torch.bfloat16)
    rows = torch.zeros_like(make_rows(layout))
    assert torch.equal(round_trip(layout, rows), rows)
    slots, none = make_slots(layout), np.zeros(0, dtype=np.int64)
    quantize_blocks(from_paged(rows, "BLPTHD"), none, layout.view(slots), none)
    assert (slots == 0xAA).all()


def test_int4_must_be_asked_for():
    with pytest.raises(KernelArgumentError, match="allow_int4"):
        make_layout(dtype="int4", allow_int4=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp4"}, "not one of"),
        ({"elements": torch.int8}, "only fp32"),
        ({"num_heads": 3, "head_groups": 2}, "groups divide heads"),
        ({"dtype": "int4", "head_dim": 15}, "odd"),
        ({"keys": False, "values": False}, "use copy_blocks"),
        ({"num_tokens": 0}, "must be positive"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(KernelArgumentError, match=message):
        make_layout(**changes)


def test_slots_that_do_not_fit_are_refused():
    layout = make_layout()
    with pytest.raises(KernelArgumentError, match="do not fit slots"):
        layout.view(torch.zeros(2, layout.block_bytes - 1, dtype=torch.uint8))
    with pytest.raises(KernelArgumentError, match="not of 4 bytes"):
        layout.view(torch.zeros(2, layout.block_bytes + 2, dtype=torch.uint8))
    with pytest.raises(KernelArgumentError, match="must be uint8"):
        layout.view(torch.zeros(2, layout.block_bytes, dtype=torch.int8))


@pytest.mark.parametrize(
    ("changes", "row_ids", "slot_ids", "message"),
    [
        ({"num_tokens": 6}, [0], [0], "in the slots"),
        ({"elements": torch.float16}, [0], [0], "in the slots"),
        ({}, [4], [0], "holds 4"),
        ({}, [0], [-1], "holds -1"),
        ({}, [0, 1], [0], "must pair up"),
        ({}, [0, 1], [2, 2], "more than once"),
    ],
)
def test_copies_that_do_not_fit_are_refused_and_write_nothing(changes, row_ids, slot_ids, message):
    rows, layout = make_rows(make_layout()), make_layout(**changes)
    slots = make_slots(layout)
    with pytest.raises(KernelArgumentError, match=message):
        quantize_blocks(from_paged(rows, "BLPTHD"), np.array(row_ids), layout.view(slots), np.array(slot_ids))
    assert (slots == 0xAA).all()


def test_rows_below_the_alignment_of_their_elements_are_refused():
    layout = make_layout(num_layers=1)
    memory = torch.zeros(1 + 2 * 5 * 4 * 64, dtype=torch.uint8)
    view = from_paged(memory[1:].view(1, 2, 5, 4, 64), "BPTHD")
    with pytest.raises(KernelArgumentError, match="aligned to 1 bytes"):
        quantize_blocks(view, np.array([0]), layout.view(make_slots(layout)), np.array([0]))


def test_reading_and_writing_the_same_memory_is_refused():
    layout = make_layout(num_layers=1)
    memory = torch.zeros(2, 2 * 5 * 4 * 64, dtype=torch.uint8)
    rows = from_paged(memory.view(2, 2, 5, 4, 64), "BPTHD")
    with pytest.raises(KernelArgumentError, match="overlap"):
        quantize_blocks(rows, np.array([0]), layout.view(memory), np.array([1]))


def test_slices_of_one_arena_are_the_same_memory():
    layout = make_layout(num_layers=1)
    arena = np.zeros(4 * 2 * 5 * 4 * 64, dtype=np.uint8)
    rows = from_paged(torch.from_numpy(arena[: arena.size // 2]).view(2, 2, 5, 4, 64), "BPTHD")
    slots = torch.from_numpy(arena[64 : 64 + layout.block_bytes]).view(1, -1)
    with pytest.raises(KernelArgumentError, match="overlap"):
        quantize_blocks(rows, np.array([0]), layout.view(slots), np.array([0]))
    assert not arena.any()


def test_scales_must_not_lie_among_the_rows():
    layout = make_layout(num_layers=1)
    codes_bytes = 2 * 5 * 4 * layout.head_dim
    memory = torch.zeros(codes_bytes + 2 * 5 * 4 * layout.head_dim * layout.elements.itemsize, dtype=torch.uint8)
    rows = from_paged(memory[codes_bytes:].view(1, 2, 5, 4, -1), "BPTHD")
    slots = memory[: layout.block_bytes].view(1, -1)
    with pytest.raises(KernelArgumentError, match="overlap"):
        quantize_blocks(rows, np.array([0]), layout.view(slots), np.array([0]))


@pytest.mark.parametrize("module", ["quantize", "digest_blocks", "rope_shift"])
def test_the_cpu_needs_no_triton(module, tmp_path):
    code = f"import sys; sys.modules['triton'] = None; import dynamo.kernels.{module}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path, timeout=60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("elements", HALF_ULP, ids=str)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("shape", [(16, 8, 128), (5, 3, 10), (70, 1, 576)], ids=str)
def test_gpu_gives_the_bytes_of_the_cpu(elements, dtype, shape):
    num_tokens, num_heads, head_dim = shape
    layout = make_layout(elements=elements, dtype=dtype, num_tokens=num_tokens, num_heads=num_heads, head_dim=head_dim)
    rows, slots = make_rows(layout), make_slots(layout)
    rows[1, 0, 0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    quantize_blocks(from_paged(rows, "BLPTHD"), ALL, layout.view(slots), ALL)
    found = make_slots(layout).cuda()
    quantize_blocks(from_paged(rows.cuda(), "BLPTHD"), ALL, layout.view(found), ALL)
    assert torch.equal(found.cpu(), slots)
    back, twin = torch.zeros_like(rows), torch.zeros_like(rows).cuda()
    dequantize_blocks(layout.view(slots), ALL, from_paged(back, "BLPTHD"), ALL)
    dequantize_blocks(layout.view(found), ALL, from_paged(twin, "BLPTHD"), ALL)
    assert torch.equal(twin.cpu().nan_to_num(nan=7.0), back.nan_to_num(nan=7.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_writes_slots_in_pinned_memory():
    layout = make_layout(elements=torch.bfloat16)
    rows = make_rows(layout).cuda()
    pinned, slots = make_slots(layout).pin_memory(), make_slots(layout)
    quantize_blocks(from_paged(rows, "BLPTHD"), ALL, layout.view(pinned), ALL, sm_budget=2)
    quantize_blocks(from_paged(rows.cpu(), "BLPTHD"), ALL, layout.view(slots), ALL)
    torch.cuda.synchronize()
    assert torch.equal(pinned, slots)
    with pytest.raises(KernelArgumentError, match=r"not all of the \d+ bytes of host memory at .* are pinned"):
        quantize_blocks(from_paged(rows, "BLPTHD"), ALL, layout.view(slots), ALL)
