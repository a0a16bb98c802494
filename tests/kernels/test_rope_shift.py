"""Keys moved to other positions: equal to keys computed there, within the stated tolerance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.layouts import from_paged
from dynamo.kernels.reference_transforms import rope_shift_reference
from dynamo.kernels.rope_shift import Rope, rope_shift

TOLERANCE = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Of a shifted key against the unrounded key at its new position, relative to the length of the pair."""

ALL = np.arange(3)


def compute_keys(raw, positions, rope):
    """fp64 keys [block, layer, token, head, dim] at their positions, from keys at position 0."""
    turned = torch.empty_like(raw)
    for token in range(raw.shape[2]):
        where = [start + token for start in positions]
        turned[:, :, token : token + 1] = rope_shift_reference(
            raw[:, :, token : token + 1],
            where,
            torch.from_numpy(rope.inv_freq),
            interleaved=rope.interleaved,
            rotary_offset=rope.offset,
        )
    return turned


def pair_lengths(keys, rope):
    half = rope.inv_freq.size
    part = keys[..., rope.offset : rope.offset + 2 * half]
    x, y = (part[..., 0::2], part[..., 1::2]) if rope.interleaved else part.split(half, dim=-1)
    length = torch.hypot(x, y)
    both = (
        torch.stack([length, length], dim=-1).flatten(-2) if rope.interleaved else torch.cat([length, length], dim=-1)
    )
    lengths = keys.abs().clone()
    lengths[..., rope.offset : rope.offset + 2 * half] = both
    return lengths


def shift(x, deltas, rope, *, axes="BLPTHD", values=True):
    """Shifted copy of a pool, NaN where nothing was written."""
    out, ids = torch.full_like(x, float("nan")), np.arange(len(deltas))
    deltas = np.array(deltas, dtype=np.int64)
    rope_shift(
        from_paged(x, axes),
        ids,
        from_paged(out, axes),
        ids,
        deltas=deltas,
        rope=rope,
        elements=x.dtype,
        values=values,
    )
    return out


@settings(max_examples=40, deadline=None)
@given(
    elements=st.sampled_from(list(TOLERANCE)),
    half=st.integers(1, 32),
    offset=st.sampled_from([0, 5, 64]),
    rest=st.integers(0, 9),
    interleaved=st.booleans(),
    positions=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20)), min_size=3, max_size=3),
)
def test_shifted_keys_equal_keys_computed_at_the_new_position(elements, half, offset, rest, interleaved, positions):
    rope = Rope.of_theta(2 * half, 500000.0, interleaved=interleaved, offset=offset)
    raw = torch.randn(3, 2, 4, 2, offset + 2 * half + rest, dtype=torch.float64)
    raw[..., :offset] = raw[..., :offset].to(elements)
    raw[..., offset + 2 * half :] = raw[..., offset + 2 * half :].to(elements)
    old, new = (compute_keys(raw, [pair[i] for pair in positions], rope) for i in (0, 1))
    shifted = shift(old.to(elements).unsqueeze(2), [b - a for a, b in positions], rope)
    assert ((shifted[:, :, 0].double() - new).abs() <= TOLERANCE[elements] * pair_lengths(new, rope)).all()


@pytest.mark.parametrize("elements", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_shifted_keys_equal_the_reference_but_for_fp32_rounding(elements, interleaved):
    rope = Rope.of_theta(128, interleaved=interleaved)
    x, deltas = torch.randn(3, 2, 2, 16, 8, 128).to(elements), [4096, -17, 100000]
    expected = rope_shift_reference(
        x[:, :, 0], deltas, torch.from_numpy(rope.inv_freq), interleaved=interleaved
    ).double()
    error = (shift(x, deltas, rope)[:, :, 0].double() - expected).abs()
    assert (error <= TOLERANCE[elements] * pair_lengths(expected, rope)).all()
    assert elements is torch.float32 or (error > 0).float().mean() < 0.001  # ties apart, the same after rounding


def test_values_are_copied_or_left_alone():
    x, rope = torch.randn(3, 2, 2, 4, 2, 16), Rope.of_theta(16)
    assert torch.equal(shift(x, [1, 2, 3], rope)[:, :, 1], x[:, :, 1])
    assert shift(x, [1, 2, 3], rope, values=False)[:, :, 1].isnan().all()


def test_no_difference_of_position_is_a_plain_copy():
    x = torch.randn(3, 2, 2, 4, 2, 16).bfloat16()
    assert torch.equal(shift(x, [0, 0, 0], Rope.of_theta(16)), x)


def test_shifts_add_up_and_every_layout_agrees():
    x, rope = torch.randn(3, 2, 2, 4, 2, 16), Rope.of_theta(16)
    once = shift(x, [7, -3, 900], rope)
    assert torch.allclose(shift(shift(x, [5, -1, 1000], rope), [2, -2, -100], rope), once, atol=1e-5)
    hnd = shift(x.transpose(3, 4).contiguous(), [7, -3, 900], rope, axes="BLPHTD")
    assert torch.equal(hnd.transpose(3, 4), once)


def test_latents_turn_only_their_last_elements():
    x, rope = torch.randn(3, 2, 64, 576).bfloat16(), Rope.of_theta(64, interleaved=True, offset=512)
    shifted = shift(x, [10, 10, -4], rope, axes="BLTD")
    assert torch.equal(shifted[..., :512], x[..., :512])
    expected = rope_shift_reference(
        x.unsqueeze(3), [10, 10, -4], torch.from_numpy(rope.inv_freq), interleaved=True, rotary_offset=512
    )
    assert torch.allclose(shifted.unsqueeze(3).float(), expected.float(), atol=0.04)


def test_blocks_can_be_shifted_in_place():
    x, rope = torch.randn(3, 2, 2, 4, 2, 16), Rope.of_theta(16)
    expected, view = shift(x, [3, 3, -9], rope), from_paged(x, "BLPTHD")
    rope_shift(view, ALL, view, ALL, deltas=np.array([3, 3, -9]), rope=rope, elements=torch.float32)
    assert torch.equal(x, expected)


def test_another_order_of_the_same_memory_is_not_in_place():
    x, rope = torch.randn(3, 2, 2, 4, 4, 16), Rope.of_theta(16)
    before, nhd, hnd = x.clone(), from_paged(x, "BLPTHD"), from_paged(x, "BLPHTD")
    with pytest.raises(KernelArgumentError, match="share memory"):
        rope_shift(nhd, ALL, hnd, ALL, deltas=ALL + 1, rope=rope, elements=torch.float32)
    assert torch.equal(x, before)


def test_strides_of_a_single_token_do_not_matter_in_place():
    x, rope = torch.randn(3, 1, 1, 1, 4, 16), Rope.of_theta(16)
    expected, view = shift(x, [1, 2, 3], rope), from_paged(x, "BLPTHD")
    other = replace(view, token_stride=10**6)
    rope_shift(view, ALL, other, ALL, deltas=ALL + 1, rope=rope, elements=torch.float32)
    assert torch.equal(x, expected)


def test_only_listed_blocks_are_written():
    x, rope = torch.randn(3, 1, 2, 40, 8, 128), Rope.of_theta(128)
    out = torch.full_like(x, float("nan"))
    src, dst = from_paged(x, "BLPTHD"), from_paged(out, "BLPTHD")
    rope_shift(src, ALL[:1], dst, ALL[2:], deltas=np.array([5]), rope=rope, elements=torch.float32)
    assert out[:2].isnan().all() and torch.equal(out[2], shift(x, [5], rope)[0])


def test_frequencies_are_those_of_the_model():
    exponents = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    assert np.allclose(Rope.of_theta(64, 500000.0).inv_freq, (500000.0**-exponents).numpy())
    scaled = Rope(np.array([0.5, 0.01], dtype=np.float32))
    assert scaled.inv_freq.dtype == np.float64 and scaled.inv_freq.size == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rope.of_theta(7),
        lambda: Rope.of_theta(64, -1.0),
        lambda: Rope(np.zeros((2, 2))),
        lambda: Rope(np.array([np.nan])),
        lambda: Rope.of_theta(8, offset=-8),
    ],
)
def test_embeddings_that_make_no_sense_are_refused(make):
    with pytest.raises(KernelArgumentError):
        make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": Rope.of_theta(32)}, "hold no"),
        ({"rope": Rope.of_theta(16, offset=1)}, "hold no"),
        ({"elements": torch.int16}, "only fp32"),
        ({"deltas": np.array([1, 2])}, "deltas must be"),
        ({"deltas": np.array([1.0, 2.0, 3.0])}, "deltas must be"),
        ({"deltas": [1, 2, 3]}, "deltas must be int64 .*, got list"),
        ({"deltas": np.array([1, 2, -(2**31) - 1])}, "past 2147483648 positions"),
        ({"dst_ids": np.array([0, 1, 1])}, "more than once"),
        ({"dst_ids": np.array([0, 1, 3])}, "holds 3"),
        ({"sm_budget": 0}, "sm_budget"),
    ],
)
def test_shifts_that_do_not_fit_are_refused_and_write_nothing(changes, message):
    x = torch.randn(3, 2, 2, 4, 2, 16)
    out = torch.full_like(x, float("nan"))
    options = {"dst_ids": ALL, "deltas": ALL, "rope": Rope.of_theta(16), "elements": torch.float32} | changes
    dst_ids = options.pop("dst_ids")
    with pytest.raises(KernelArgumentError, match=message):
        rope_shift(from_paged(x, "BLPTHD"), ALL, from_paged(out, "BLPTHD"), dst_ids, **options)
    assert out.isnan().all()


def test_moving_blocks_onto_blocks_still_to_be_read_is_refused():
    view = from_paged(torch.randn(3, 2, 2, 4, 2, 16), "BLPTHD")
    with pytest.raises(KernelArgumentError, match="both read and written"):
        rope_shift(
            view,
            np.array([0, 1]),
            view,
            np.array([1, 2]),
            deltas=np.array([1, 1]),
            rope=Rope.of_theta(16),
            elements=torch.float32,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("elements", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "rope", [Rope.of_theta(128), Rope.of_theta(64, interleaved=True, offset=6)], ids=["halves", "pairs"]
)
def test_gpu_gives_the_bytes_of_the_cpu(elements, rope):
    x = torch.randn(3, 2, 2, 33, 3, 128).to(elements)
    deltas = [4096, -17, 100000]
    assert torch.equal(shift(x.cuda(), deltas, rope).cpu(), shift(x, deltas, rope))
