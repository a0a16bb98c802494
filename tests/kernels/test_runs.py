"""Views become the fewest pieces that their bytes allow, in the order of the side that was asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.runs import ascending_pairs, find_runs

SHAPE = {"B": 6, "L": 3, "P": 2, "T": 4, "H": 2, "D": 32}


def tensor(axes: str) -> torch.Tensor:
    return torch.zeros([SHAPE[letter] for letter in axes], dtype=torch.uint8)


def slots() -> torch.Tensor:
    return torch.zeros(6, 2048, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("src_axes", "dst_axes", "src_ids", "dst_ids", "expected"),
    [
        pytest.param("BLPTHD", "BLPTHD", [4, 1], [2, 0], {1536: 2}, id="same-layout-a-piece-per-block"),
        pytest.param(
            "BLPTHD", "BLPTHD", [4, 1, 2, 3], [5, 0, 1, 2], {1536: 1, 4608: 1}, id="consecutive-blocks-joined"
        ),
        pytest.param("BLPTHD", "BLPTHD", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], {9216: 1}, id="whole-pool-one-piece"),
        pytest.param(
            "LPBTHD", "LPBTHD", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], {9216: 1}, id="whole-layer-first-pool"
        ),
        pytest.param("LPBTHD", "LPBTHD", [0, 1, 3], [2, 3, 5], {256: 6, 512: 6}, id="runs-of-blocks-per-plane"),
        pytest.param("LPBTHD", "BLPTHD", [0, 1], [4, 5], {256: 12}, id="split-to-fused"),
        pytest.param("BLPTHD", "BLPHTD", [0], [3], {32: 48}, id="NHD-to-HND"),
        pytest.param("BLTPHD", "BLPTHD", [0], [3], {64: 24}, id="interleaved-to-split"),
    ],
)
def test_runs_are_as_long_as_both_layouts_allow(
    src_axes: str, dst_axes: str, src_ids: list[int], dst_ids: list[int], expected: dict[int, int]
) -> None:
    src, dst = from_paged(tensor(src_axes), src_axes), from_paged(tensor(dst_axes), dst_axes)
    runs = find_runs(src, np.array(src_ids), dst, np.array(dst_ids))
    assert runs.sizes() == expected
    pieces = runs.expand()
    assert pieces.num_pieces == runs.num_pieces == sum(expected.values())
    assert pieces.num_bytes == runs.num_bytes == len(src_ids) * 1536
    assert (np.diff(pieces.dst) > 0).all()


@pytest.mark.parametrize("order_by", ["src", "dst"])
@pytest.mark.parametrize("dst_axes", ["BLPTHD", "LPBTHD", "PBLHTD", "TBHLPD"])
def test_pieces_ascend_on_the_side_that_gives_the_order(order_by: str, dst_axes: str) -> None:
    src, dst = from_paged(tensor("LPBTHD"), "LPBTHD"), from_paged(tensor(dst_axes), dst_axes)
    pieces = find_runs(src, np.array([5, 0, 3]), dst, np.array([1, 4, 2]), order_by=order_by).expand()
    assert (np.diff(pieces.src if order_by == "src" else pieces.dst) > 0).all()


def test_layers_of_their_own_are_ordered_by_address() -> None:
    layers = [tensor("PBTHD") for _ in range(3)]
    host = stored(slots(), num_layers=3, num_tokens=4, num_heads=2, row_bytes=32)
    pieces = find_runs(host, np.array([3, 1]), from_paged(layers, "PBTHD"), np.array([0, 5])).expand()
    assert pieces.num_pieces == 12
    assert (np.diff(pieces.dst) > 0).all()


def test_blocks_of_other_sizes_are_cut_to_the_common_divisor() -> None:
    src, dst = from_paged(tensor("BLPTHD"), "BLPTHD"), from_paged(tensor("BLPTHD"), "BLPTHD").regroup(2)
    runs = find_runs(src, np.array([5, 2]), dst, np.array([0, 1, 9, 4]))
    assert runs.num_bytes == 2 * 1536
    assert runs.sizes() == {128: 12, 256: 6}  # two halves follow each other on both sides


def test_no_blocks_are_no_pieces() -> None:
    src, none = from_paged(tensor("BLPTHD"), "BLPTHD"), np.zeros(0, dtype=np.int64)
    runs = find_runs(src, none, from_paged(tensor("BLPHTD"), "BLPHTD"), none)
    assert (runs.num_pieces, runs.num_bytes, runs.sizes(), runs.expand().num_pieces) == (0, 0, {}, 0)


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "message"),
    [
        ([6], [0], r"src_ids holds 6, outside \[0, 6\)"),
        ([0], [-1], "dst_ids holds -1"),
        ([0, 1], [3, 3], "dst_ids holds 3 more than once"),
        ([0, 1], [3], "are not the same tokens"),
    ],
)
def test_bad_ids_are_refused(src_ids: list[int], dst_ids: list[int], message: str) -> None:
    src, dst = from_paged(tensor("BLPTHD"), "BLPTHD"), from_paged(tensor("BLPHTD"), "BLPHTD")
    with pytest.raises(KernelArgumentError, match=message):
        find_runs(src, np.array(src_ids), dst, np.array(dst_ids))


@pytest.mark.parametrize("axes", ["BLPTHD", "LPBTHD", "TBHLPD"])
@pytest.mark.parametrize("at_once", [1, 5, 1000])
def test_pieces_in_parts_are_the_pieces_at_once(axes: str, at_once: int) -> None:
    src, dst = from_paged(tensor("BLPTHD"), "BLPTHD"), from_paged(tensor(axes), axes)
    runs = find_runs(src, np.array([5, 0, 3, 2]), dst, np.array([1, 4, 2, 5]))
    parts = list(runs.parts(at_once))
    assert max(part.num_pieces for part in parts) <= at_once
    assert np.array_equal(np.concatenate([part.table for part in parts], axis=1), runs.expand().table)


@given(st.integers(1, 300), st.integers(0, 40), st.booleans(), st.integers(0, 1000))
def test_pairs_are_put_in_the_order_of_one_side(num_ids: int, count: int, may_repeat: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_ids, count) if may_repeat else rng.permutation(num_ids)[:count]
    others = rng.integers(0, 1000, ids.size)
    ordered, partners = ascending_pairs(ids, others, "src", num_ids)
    assert (np.diff(ordered) >= 0).all()
    assert sorted(zip(ordered.tolist(), partners.tolist(), strict=True)) == sorted(
        zip(ids.tolist(), others.tolist(), strict=True)
    )
    swapped = ascending_pairs(others, ids, "dst", num_ids)
    assert np.array_equal(swapped[0], partners)
    assert np.array_equal(swapped[1], ordered)
