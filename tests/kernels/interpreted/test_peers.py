"""The other projects' kernels that `dynamo.perf kernels` measures ours against: a rival that copies wrongly is no rival."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.runs import find_runs
from dynamo.perf import kernels_peers_kernel
from dynamo.perf.kernels_layouts import universal_pack
from dynamo.perf.kernels_peers import PointerList, UniversalPack
from dynamo.perf.kernels_pinned import crossings, zero_copy

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreted_peers(monkeypatch: pytest.MonkeyPatch, interpreted: Callable[[Any], Any]) -> None:
    for name in kernels_peers_kernel.__all__:
        monkeypatch.setattr(kernels_peers_kernel, name, interpreted(getattr(kernels_peers_kernel, name)))


def test_the_pointer_list_copies_every_piece_whole() -> None:
    src = torch.randint(0, 255, (2, 5, 16, 3, 24), dtype=torch.uint8)
    dst = torch.full((2, 6, 3, 16, 24), 255, dtype=torch.uint8)
    wanted = dst.clone()
    views = from_paged(src, "PBTHD"), from_paged(dst, "PBHTD")
    ids = np.array([4, 0, 2]), np.array([5, 1, 3])
    copy_blocks(views[0], ids[0], from_paged(wanted, "PBHTD"), ids[1])
    pieces = find_runs(views[0], ids[0], views[1], ids[1]).expand()
    PointerList(pieces.src, pieces.dst, pieces.sizes, CPU).run(programs=2)
    assert torch.equal(dst, wanted)
    long = torch.randint(0, 255, (2, 40_000), dtype=torch.uint8)  # more words than one program's tile
    numbers = np.array([long.data_ptr()]), np.array([long.data_ptr() + 40_000]), np.array([40_000])
    PointerList(*numbers, CPU).run()
    assert torch.equal(long[0], long[1])


def test_the_universal_kernel_packs_as_our_head_groups_do() -> None:
    layers = [torch.randn(2, 6, 16, 4, 8).bfloat16() for _ in range(3)]
    blocks, consecutive = np.array([5, 0, 3]), np.arange(3)
    block_bytes = 3 * 2 * 16 * 4 * 16
    theirs, ours = (torch.zeros(3, block_bytes, dtype=torch.uint8) for _ in range(2))
    UniversalPack(layers, blocks, theirs).run()
    target = stored(ours, num_layers=3, num_tokens=16, num_heads=4, row_bytes=16, head_groups=4)
    copy_blocks(from_paged(layers, "PBTHD"), blocks, target, consecutive)
    assert torch.equal(theirs, ours)


def test_the_packing_case_gives_both_the_same_task() -> None:
    case = universal_pack(64, 1 << 18, CPU)
    case.others[0].run()
    copy_blocks(case.src, case.src_ids, case.dst, case.dst_ids)
    assert case.num_bytes == case.src_ids.size * case.src.block_bytes


@pytest.mark.parametrize(("tile_kib", "stages"), [(4, 2), (16, 3), (32, 5)])
def test_our_kernel_copies_with_any_tile_and_depth(
    tile_kib: int, stages: int, monkeypatch: pytest.MonkeyPatch, interpreted: Callable[[Any], Any]
) -> None:
    from dynamo.kernels import copy_blocks_kernel

    kernel = interpreted(copy_blocks_kernel.copy_blocks_kernel)
    monkeypatch.setattr(copy_blocks_kernel, "copy_blocks_kernel", kernel)
    for crossing in crossings(2, 1 << 17, CPU, FakeDriver()):
        for tensor in crossing.src.tensors:
            tensor.random_(0, 255)
        zero_copy(crossing, CPU, tile_kib << 10, stages, programs=2)()
        found = [tensor.clone() for tensor in crossing.dst.tensors]
        copy_blocks(crossing.src, crossing.src_ids, crossing.dst, crossing.dst_ids)
        assert all(torch.equal(a, b) for a, b in zip(found, crossing.dst.tensors, strict=True))
