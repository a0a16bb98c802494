"""Compaction moves the fewest blocks, into holes only, and refuses moves that depend on each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.compact import compact, plan_compaction
from dynamo.kernels.layouts import from_paged
from dynamo.kernels.reference import compact_reference


@given(used=st.lists(st.booleans(), max_size=40))
@settings(deadline=None, max_examples=100)
def test_used_blocks_become_the_first_and_keep_their_bytes(used: list[bool]) -> None:
    mask = np.array(used, dtype=np.bool_)
    num_used = int(mask.sum())
    tensor = torch.arange(len(used) * 2 * 4 * 3).view(len(used), 2, 4, 3).to(torch.int16)
    before, twin = tensor.clone(), tensor.clone()
    moves = plan_compaction(mask)
    assert moves.shape == (int((~mask[:num_used]).sum()), 2)
    compact(from_paged(tensor, "BTHD"), moves)
    compact_reference(from_paged(twin, "BTHD"), moves)
    assert torch.equal(tensor, twin)
    places = np.arange(len(used))
    places[moves[:, 0]] = moves[:, 1]
    for block in np.flatnonzero(mask):
        assert torch.equal(tensor[places[block]], before[block])
    assert sorted(places[mask].tolist()) == list(range(num_used))


@pytest.mark.parametrize("order", ["BLPTHD", "LPBTHD", "BPTLHD"])
def test_any_layout_is_compacted_in_place(order: str) -> None:
    counts = {"B": 6, "L": 2, "P": 2, "T": 4, "H": 3, "D": 5}
    tensor = torch.arange(6 * 2 * 2 * 4 * 3 * 5).view([counts[letter] for letter in order])
    axis = order.index("B")
    expected = tensor.clone()
    expected.index_copy_(axis, torch.tensor([0, 2]), tensor.index_select(axis, torch.tensor([4, 5])))
    compact(from_paged(tensor, order), np.array([[4, 0], [5, 2]]))
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([[1, 0], [2, 1]], "block 1 is moved and moved to"),
        ([[1, 1]], "block 1 is moved and moved to"),
        ([[3, 0], [3, 1]], "sources of moves holds 3 more than once"),
        ([[2, 0], [3, 0]], "destinations of moves holds 0 more than once"),
        ([[4, 0]], "sources of moves holds 4, outside"),
        ([[3, -1]], "destinations of moves holds -1, outside"),
    ],
)
def test_moves_that_depend_on_each_other_are_refused(moves: list[list[int]], message: str) -> None:
    tensor = torch.arange(4 * 6).view(4, 2, 3, 1)
    with pytest.raises(KernelArgumentError, match=message):
        compact(from_paged(tensor, "BTHD"), np.array(moves))
    assert torch.equal(tensor.flatten(), torch.arange(24))


@pytest.mark.parametrize("moves", [np.zeros(4, dtype=np.int64), np.zeros((2, 2), dtype=np.int32), [[1, 0]]])
def test_moves_of_another_shape_are_refused(moves: object) -> None:
    with pytest.raises(KernelArgumentError, match=r"moves must be int64 \[num_moves, 2\]"):
        compact(from_paged(torch.zeros(4, 2, 3, 1), "BTHD"), moves)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [np.zeros(4, dtype=np.int64), np.zeros((2, 2), dtype=np.bool_), [True, False]])
def test_masks_of_another_shape_are_refused(mask: object) -> None:
    with pytest.raises(KernelArgumentError, match="used_mask must be bool"):
        plan_compaction(mask)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    tensor = torch.arange(64 * 2 * 16 * 8 * 32, dtype=torch.int32).view(64, 2, 16, 8, 32)
    moves = plan_compaction(np.random.default_rng(5).random(64) < 0.5)
    on_device = tensor.cuda()
    compact(from_paged(on_device, "BPTHD"), moves)
    compact(from_paged(tensor, "BPTHD"), moves)
    assert torch.equal(on_device.cpu(), tensor)
