"""The quantising kernels in Triton's interpreter give the CPU's bytes, both ways, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.kernels.layouts import from_paged
from dynamo.kernels.quantize import QuantizedLayout, dequantize_blocks, quantize_blocks

pytest.importorskip("triton", reason="needs Triton")

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
CPU = torch.device("cpu")


def run(interpreted, rows, row_ids, pool, pool_ids, *, to_codes, num_programs):
    from dynamo.kernels.quantize_kernel import build_call

    pool, rows = pool.fold_with(rows)
    call = build_call(rows, row_ids, pool, pool_ids, CPU, to_codes=to_codes)
    if call.num_items:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities among the elements
            interpreted(call.kernel)[(num_programs,)](torch.from_numpy(call.table), *call.arguments, **call.constexprs)


def make_rows(shape, elements, kind):
    """Elements of every kind a cache may hold, and some it should not."""
    x = torch.randn(shape, dtype=torch.float32)
    if kind == "spread":
        x = x * torch.exp2(torch.randint(-30, 15, shape).float())
    elif kind == "tiny":
        x = x * 2.0**-133
    elif kind == "broken":
        picks = torch.randint(0, 12, shape)
        for value, pick in ((float("nan"), 0), (float("inf"), 1), (float("-inf"), 2), (0.0, 3), (-0.0, 4)):
            x[picks == pick] = value
    elif kind == "zero":
        x.zero_()
    elif kind == "largest":
        x = torch.sign(x) * torch.finfo(elements).max
    return x.to(elements)


def equal_bits(a, b):
    """Whether the bytes agree; any NaN is as good as another."""
    same = a.view(INTEGERS[a.element_size()]) == b.view(INTEGERS[b.element_size()])
    return bool((same | (a.isnan() & b.isnan())).all())


@SLOW
@given(data=st.data())
def test_kernels_give_the_bytes_of_the_cpu(interpreted, data):
    elements = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    dtype = data.draw(st.sampled_from(["fp8_e4m3", "int8", "int4"]))
    planes, groups = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2]))
    heads = groups * data.draw(st.integers(1, 3))
    layout = QuantizedLayout(
        num_layers=data.draw(st.integers(1, 2)),
        num_planes=planes,
        num_tokens=data.draw(st.integers(1, 9)),
        num_heads=heads,
        head_dim=data.draw(st.sampled_from([2, 6, 8, 20, 32])),
        elements=elements,
        dtype=dtype,
        head_groups=groups,
        allow_int4=True,
    )
    axes = data.draw(st.sampled_from(["BLPTHD", "BLPHTD", "LPBTHD"]))
    sizes = {"B": 3, "L": layout.num_layers, "P": planes, "T": layout.num_tokens, "H": heads, "D": layout.head_dim}
    rows = make_rows(
        [sizes[a] for a in axes], elements, data.draw(st.sampled_from(["spread", "tiny", "broken", "zero", "largest"]))
    )
    ids = data.draw(st.lists(st.integers(0, 2), max_size=3, unique=True))
    row_ids, slot_ids = np.array(ids, dtype=np.int64), np.array(ids[::-1], dtype=np.int64)
    slot_bytes = layout.block_bytes + 4 * data.draw(st.integers(0, 3))
    expected, found = (torch.full((3, slot_bytes), 0xAA, dtype=torch.uint8) for _ in range(2))
    view = from_paged(rows, axes)
    programs = data.draw(st.integers(1, 4))

    quantize_blocks(view, row_ids, layout.view(expected), slot_ids)
    run(interpreted, view, row_ids, layout.view(found), slot_ids, to_codes=True, num_programs=programs)
    assert torch.equal(found, expected)

    back, twin = (torch.full_like(rows, float("nan")) for _ in range(2))
    dequantize_blocks(layout.view(expected), slot_ids, from_paged(back, axes), row_ids)
    run(
        interpreted,
        from_paged(twin, axes),
        row_ids,
        layout.view(found),
        slot_ids,
        to_codes=False,
        num_programs=programs,
    )
    assert equal_bits(back, twin)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int4"])
def test_blocks_longer_than_a_tile_are_read_twice(interpreted, dtype):
    layout = QuantizedLayout(
        num_layers=1,
        num_planes=1,
        num_tokens=70,
        num_heads=1,
        head_dim=144,
        elements=torch.bfloat16,
        dtype=dtype,
        allow_int4=True,
    )
    rows = make_rows((2, 70, 144), torch.bfloat16, "spread")
    ids = np.array([1, 0])
    expected, found = torch.zeros(2, 2, layout.block_bytes, dtype=torch.uint8)
    quantize_blocks(from_paged(rows, "BTD"), ids, layout.view(expected), ids)
    run(interpreted, from_paged(rows, "BTD"), ids, layout.view(found), ids, to_codes=True, num_programs=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("elements", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int8", "int4"])
def test_all_values_of_sixteen_bits(interpreted, elements, dtype):
    """Every bit pattern once beside a scale of 1, so that every rounding case of every code is met."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    layout = QuantizedLayout(
        num_layers=1,
        num_planes=1,
        num_tokens=16,
        num_heads=8,
        head_dim=512,
        elements=elements,
        dtype=dtype,
        allow_int4=True,
    )
    largest = {"fp8_e4m3": 448.0, "int8": 127.0, "int4": 7.0}[dtype]
    rows = bits.view(elements).view(1, 16, 8, 512).clone()
    rows[rows.abs().float() > largest] = 0.75
    rows[:, 0, :, 0] = largest
    ids = np.array([0])
    expected, found = torch.zeros(2, 1, layout.block_bytes, dtype=torch.uint8)
    quantize_blocks(from_paged(rows, "BTHD"), ids, layout.view(expected), ids)
    run(interpreted, from_paged(rows, "BTHD"), ids, layout.view(found), ids, to_codes=True, num_programs=1)
    assert torch.equal(found, expected)
