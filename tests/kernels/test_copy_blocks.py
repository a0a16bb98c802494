"""Copies between any two layouts equal the plain loop bit for bit, on the CPU and through the Triton kernel."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.aot import check, compile_specialization
from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.copy_blocks import copy_blocks, kernel_launch, specializations
from dynamo.kernels.copy_plan import CopyPlan, plan_copy
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.reference import block_rows, copy_blocks_reference
from dynamo.kernels.view import View

DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64)
Ids = npt.NDArray[np.int64]
Copy = Callable[..., None]


@dataclass(frozen=True)
class Side:
    """How to build one side; the same recipe gives the same bytes, so that a twin can be handed to the reference."""

    num_blocks: int
    num_layers: int
    num_planes: int
    num_tokens: int
    num_heads: int
    dim: int
    dtype: torch.dtype
    order: tuple[str, ...] = tuple("BLPTH")
    spread: str = "fused"  # one tensor, one per layer, one per layer and plane, or the stored layout
    head_groups: int = 1
    skipped: int = 0  # elements before the first
    padding: int = 0  # elements after each row, or after each stored block
    seed: int = 0

    def build(self) -> tuple[View, list[torch.Tensor]]:
        """The view, and all memory it could reach."""
        rng = np.random.default_rng(self.seed)
        roots: list[torch.Tensor] = []
        if self.spread == "stored":
            item = self.dtype.itemsize
            block = self.num_layers * self.num_planes * self.num_tokens * self.num_heads * self.dim * item
            slots = self._tensor(rng, roots, (self.num_blocks, block + self.padding), torch.uint8)
            view = stored(
                slots,
                num_layers=self.num_layers,
                num_planes=self.num_planes,
                num_tokens=self.num_tokens,
                num_heads=self.num_heads,
                row_bytes=self.dim * item,
                head_groups=self.head_groups,
            )
            return view, roots
        counts = {"B": self.num_blocks, "L": self.num_layers, "P": self.num_planes}
        counts |= {"T": self.num_tokens, "H": self.num_heads}
        absent = {"fused": "", "per layer": "L", "per plane": "LP"}[self.spread]
        letters = [letter for letter in self.order if letter not in absent]
        shape = (*(counts[letter] for letter in letters), self.dim + self.padding)
        axes = "".join(letters) + "D"

        def one() -> torch.Tensor:
            return self._tensor(rng, roots, shape, self.dtype)[..., : self.dim]

        if self.spread == "fused":
            return from_paged(one(), axes), roots
        if self.spread == "per layer" or self.num_planes == 1:
            return from_paged([one() for _ in range(self.num_layers)], axes), roots
        return from_paged([(one(), one()) for _ in range(self.num_layers)], axes), roots

    def _tensor(
        self, rng: np.random.Generator, roots: list[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        skipped = self.skipped * dtype.itemsize
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        root = torch.from_numpy(rng.integers(0, 256, num_bytes + skipped + 64, dtype=np.uint8))
        roots.append(root)
        return root[skipped : skipped + num_bytes].view(dtype).view(*shape)


@dataclass(frozen=True)
class Case:
    src: Side
    dst: Side
    src_ids: tuple[int, ...]
    dst_ids: tuple[int, ...]
    ranges: dict[str, tuple[int, int] | None] = field(default_factory=dict)


@st.composite
def sides(draw: st.DrawFn, **counts: Any) -> Side:
    spread = draw(st.sampled_from(["fused", "per layer", "per plane", "stored"]))
    groups = [g for g in (1, 2, 3, 4) if counts["num_heads"] % g == 0]
    return Side(
        **counts,
        order=tuple(draw(st.permutations("BLPTH"))),
        spread=spread,
        head_groups=draw(st.sampled_from(groups)) if spread == "stored" else 1,
        skipped=draw(st.sampled_from([0, 0, 1, 8])),
        padding=draw(st.sampled_from([0, 0, 0, 1, 16])),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    dim = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 41, 64]))
    common = {"dtype": dtype, "dim": dim, "num_planes": draw(st.integers(1, 2))}
    num_layers, num_heads = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    layers = heads = None
    extent = {"src": [num_layers, num_heads], "dst": [num_layers, num_heads]}
    if draw(st.booleans()):
        start = draw(st.integers(0, 2))
        layers = (start, start + num_layers)
        for side in draw(st.sampled_from([["src"], ["dst"], ["src", "dst"]])):
            extent[side][0] = start + num_layers + draw(st.integers(0, 1))
    if draw(st.booleans()):
        start = draw(st.integers(0, 3))
        heads = (start, start + num_heads)
        for side in draw(st.sampled_from([["src"], ["dst"], ["src", "dst"]])):
            extent[side][1] = start + num_heads + draw(st.integers(0, 2))
    unit = draw(st.sampled_from([1, 2, 3, 4]))
    src_units, dst_units = draw(st.sampled_from([(1, 1), (1, 1), (4, 4), (2, 1), (1, 3), (2, 3)]))
    num_units = src_units * dst_units * draw(st.integers(0, 2))
    num_src, num_dst = num_units // src_units, num_units // dst_units
    src_blocks = draw(st.integers(max(num_src, 1), num_src + 2))
    dst_blocks = draw(st.integers(max(num_dst, 1), num_dst + 2))
    src, dst = (
        draw(
            sides(**common, num_blocks=blocks, num_layers=extent[name][0], num_heads=extent[name][1], num_tokens=tokens)
        )
        for name, blocks, tokens in (("src", src_blocks, unit * src_units), ("dst", dst_blocks, unit * dst_units))
    )
    src_ids = draw(st.lists(st.integers(0, src_blocks - 1), min_size=num_src, max_size=num_src))
    dst_ids = draw(st.permutations(range(dst_blocks)))[:num_dst]
    return Case(src, dst, tuple(src_ids), tuple(dst_ids), {"layers": layers, "heads": heads})


def ids(numbers: tuple[int, ...]) -> Ids:
    return np.array(numbers, dtype=np.int64)


def expect_equal_to_reference(case: Case, copy: Copy) -> None:
    """Compares all memory, so that rows left out and bytes written outside both show."""
    src, _ = case.src.build()
    (dst, written), (twin, expected) = case.dst.build(), case.dst.build()
    copy_blocks_reference(src, ids(case.src_ids), twin, ids(case.dst_ids), **case.ranges)
    copy(src, ids(case.src_ids), dst, ids(case.dst_ids), **case.ranges)
    for ours, theirs in zip(written, expected, strict=True):
        assert torch.equal(ours, theirs)


@given(case=cases())
@settings(deadline=None, max_examples=300)
def test_on_the_cpu(case: Case) -> None:
    expect_equal_to_reference(case, copy_blocks)


@pytest.fixture
def kernel_copy(interpreted: Callable[[Any], Any]) -> Copy:
    """copy_blocks with the kernel run by the interpreter, by few programs or one per tile."""
    from dynamo.kernels.copy_blocks_kernel import WORD_TYPES, copy_blocks_kernel

    kernel = interpreted(copy_blocks_kernel)

    def run(plan: CopyPlan, ordered_by: str, max_programs: int) -> None:
        if plan.num_bytes == 0:
            return
        launch = kernel_launch(plan, ordered_by)
        word = WORD_TYPES[int(launch.constants["ALIGNMENT"])]
        grid = (min(max_programs, launch.num_tiles),)
        kernel[grid](torch.from_numpy(np.concatenate(launch.tables)), **launch.arguments, **launch.constants, WORD=word)

    def copy(src: View, src_ids: Ids, dst: View, dst_ids: Ids, **ranges: Any) -> None:
        seed = int(src_ids.sum() + dst_ids.size)
        run(plan_copy(src, src_ids, dst, dst_ids, **ranges), ("src", "dst")[seed % 2], (1, 3, 10**6)[seed % 3])

    return copy


@pytest.mark.slow
def test_through_the_kernel(kernel_copy: Copy) -> None:
    @given(case=cases())
    @settings(deadline=None, max_examples=120)
    def check(case: Case) -> None:
        expect_equal_to_reference(case, kernel_copy)

    check()


def blocks(order: str, *, row: int = 256, tokens: int = 16, heads: int = 8, spread: str = "fused", **more: Any) -> Side:
    """Three layers of K and V, large enough for several tiles."""
    shape = {"num_blocks": 5, "num_layers": 3, "num_planes": 2, "num_tokens": tokens, "num_heads": heads}
    return Side(**(shape | more), dim=row, dtype=torch.uint8, order=tuple(order), spread=spread)


CONVERSIONS = {
    "NHD to HND": (blocks("PLBTH"), blocks("PLBHT", seed=1)),
    "HND to NHD": (blocks("BLPHT"), blocks("PLBTH", seed=1)),
    "NHD to stored": (blocks("PBTH", spread="per layer"), blocks("", spread="stored", seed=1)),
    "stored to split": (blocks("", spread="stored"), blocks("BTH", spread="per plane", seed=1)),
    "stored to four groups": (blocks("LPBTH"), blocks("", spread="stored", head_groups=4, padding=48, seed=1)),
    "656 B rows": (blocks("PLBTH", row=656, padding=16), blocks("LPBHT", row=656, seed=1)),
    "odd rows": (blocks("PLBTH", row=101), blocks("LPBHT", row=101, seed=1)),
    "MLA": (blocks("LBTH", row=1152, heads=1, num_planes=1), blocks("BLTH", row=1152, heads=1, num_planes=1, seed=1)),
    "large blocks": (blocks("LPBTH", tokens=96), blocks("BLPTH", tokens=96, seed=1)),
}


@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS.keys())
@pytest.mark.parametrize("way", ["cpu", "kernel"])
def test_engine_layouts(conversion: tuple[Side, Side], way: str, request: pytest.FixtureRequest) -> None:
    copy = copy_blocks if way == "cpu" else request.getfixturevalue("kernel_copy")
    expect_equal_to_reference(Case(*conversion, (3, 0, 0, 4), (1, 2, 0, 4)), copy)


@pytest.mark.parametrize("way", ["cpu", "kernel"])
def test_a_rank_takes_and_returns_its_heads(way: str, request: pytest.FixtureRequest) -> None:
    copy = copy_blocks if way == "cpu" else request.getfixturevalue("kernel_copy")
    whole = blocks("", spread="stored", head_groups=4, num_blocks=3)
    rank = blocks("PBTH", spread="per layer", heads=2, num_blocks=3, seed=1)
    expect_equal_to_reference(Case(whole, rank, (2, 0), (1, 0), {"heads": (4, 6)}), copy)
    expect_equal_to_reference(Case(rank, whole, (2, 0), (1, 0), {"heads": (3, 5)}), copy)


@pytest.mark.parametrize("src_order", [range(40), range(39, -1, -1), [*range(20, 40), *range(20)], "random", "pairs"])
@pytest.mark.parametrize("dst_order", [range(40), "random", range(0, 80, 2)])
@pytest.mark.parametrize("dst_axes", ["BPTHD", "BPHTD"])
@pytest.mark.parametrize("tokens", [4, 512])
def test_every_pattern_of_ids_on_the_cpu(src_order: Any, dst_order: Any, dst_axes: str, tokens: int) -> None:
    rng = np.random.default_rng(3)
    patterns = {"random": rng.permutation(40), "pairs": rng.permutation(20).repeat(2) * 2 + np.tile([0, 1], 20)}
    src_ids, dst_ids = (
        (patterns[order] if isinstance(order, str) else np.array(order, dtype=np.int64)) + first
        for order, first in ((src_order, 5), (dst_order, 3))
    )
    src = torch.from_numpy(rng.integers(0, 256, (45, 2, tokens, 3, 16), dtype=np.uint8))
    dst = torch.from_numpy(rng.integers(0, 256, (83, 2, tokens, 3, 16), dtype=np.uint8))
    dst = dst if dst_axes == "BPTHD" else dst.view(83, 2, 3, tokens, 16)
    expected = dst.clone()
    moved = src[torch.from_numpy(src_ids)]
    expected[torch.from_numpy(dst_ids)] = moved if dst_axes == "BPTHD" else moved.transpose(2, 3)
    copy_blocks(from_paged(src, "BPTHD"), src_ids, from_paged(dst, dst_axes), dst_ids)
    assert torch.equal(dst, expected)


@pytest.mark.parametrize("row", [256, 288, 1031])
@pytest.mark.parametrize("is_gather", [True, False])
def test_wide_rows_of_a_rank_on_the_cpu(row: int, is_gather: bool) -> None:
    """Four heads of eight make rows of about 1 KiB, which are cut where that is faster; 1031 is prime."""
    rng = np.random.default_rng(7)
    whole = torch.from_numpy(rng.integers(0, 256, (40, 16, 8, row), dtype=np.uint8))
    part = torch.from_numpy(rng.integers(0, 256, (40, 16, 4, row), dtype=np.uint8))
    order, run = rng.permutation(40), np.arange(40)
    views = from_paged(whole, "BTHD").slice_heads(2, 6), from_paged(part, "BTHD")
    if is_gather:
        expected = whole[torch.from_numpy(order), :, 2:6]
        copy_blocks(views[0], order, views[1], run)
        assert torch.equal(part, expected)
    else:
        expected = whole.clone()
        expected[torch.from_numpy(order), :, 2:6] = part
        copy_blocks(views[1], run, views[0], order)
        assert torch.equal(whole, expected)


@pytest.mark.parametrize("block_bytes", [160 << 10, 2 << 20, (2 << 20) + 36, 1_500_001])
@pytest.mark.parametrize("skipped", [0, 3])
@pytest.mark.parametrize("dst_ids", [(4, 0, 1, 2), (0, 1, 2, 3), (5, 2, 4, 0)])
def test_blocks_that_are_long_runs_on_the_cpu(block_bytes: int, skipped: int, dst_ids: tuple[int, ...]) -> None:
    """Runs of any length, at any address, alone and joined, in memory that holds other bytes before, between and behind."""
    rng = np.random.default_rng(11)
    src_memory, dst_memory = (
        torch.from_numpy(rng.integers(0, 256, 6 * block_bytes + 8, dtype=np.uint8)) for _ in range(2)
    )
    expected = dst_memory.clone()
    src, dst, wanted = (
        memory[start : start + 6 * block_bytes].view(6, block_bytes)
        for memory, start in ((src_memory, skipped), (dst_memory, 1), (expected, 1))
    )
    src_ids = (5, 2, 3, 1)
    wanted[list(dst_ids)] = src[list(src_ids)]
    copy_blocks(from_paged(src, "BD"), ids(src_ids), from_paged(dst, "BD"), ids(dst_ids))
    assert torch.equal(dst_memory, expected)


@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize("axes", [("PBTHD", "PBHTD"), ("PBHTD", "PBTHD"), ("PBTHD", "BPTHD"), ("BPHTD", "PBTHD")])
@pytest.mark.parametrize("order", ["all", "gaps in the source", "gaps in the destination", "gaps in both"])
def test_blocks_dense_below_one_plane_on_the_cpu(heads: int, axes: tuple[str, str], order: str) -> None:
    """K and V lie apart on one side at least, so that rows are moved by number plane by plane, or pair by pair."""
    rng = np.random.default_rng(5)
    shape = {"P": 2, "B": 96, "T": 16, "H": heads, "D": 64}
    src, dst = (torch.from_numpy(rng.integers(0, 256, [shape[a] for a in names], dtype=np.uint8)) for names in axes)
    src_ids, dst_ids = (
        rng.permutation(96)[:60] if order in ("gaps in both", f"gaps in the {name}") else run
        for name, run in (("source", np.arange(60)), ("destination", rng.permutation(60)))
    )
    turned = [t.permute([names.index(a) for a in "BPTHD"]) for t, names in zip((src, dst), axes, strict=True)]
    expected = turned[1].clone()
    expected[torch.from_numpy(dst_ids)] = turned[0][torch.from_numpy(src_ids)]
    copy_blocks(from_paged(src, axes[0]), src_ids, from_paged(dst, axes[1]), dst_ids)
    assert torch.equal(turned[1], expected)


def test_blocks_far_apart_are_reached_with_64_bit_offsets(kernel_copy: Copy) -> None:
    """Anonymous memory that is never touched costs nothing, so 5 GiB between two planes are fine."""
    pool = torch.empty(2, 5, 1 << 29, dtype=torch.uint8)[:, :, : 1 << 12].view(2, 5, 4, 4, 256)
    src, dst = from_paged(pool, "PBTHD"), from_paged(torch.zeros(5, 2, 4, 4, 256, dtype=torch.uint8), "BPHTD")
    pool[:, 4] = torch.arange(2 * 16 * 256).view(2, 4, 4, 256).to(torch.uint8)
    kernel_copy(src, ids((4,)), dst, ids((1,)))
    assert (block_rows(src, ids((4,))) == block_rows(dst, ids((1,)))).all()


def test_pools_without_blocks_are_copied_by_doing_nothing() -> None:
    src, dst = (from_paged([torch.zeros(0, 2, 16, 1, 64) for _ in range(3)], "BPTHD") for _ in range(2))
    copy_blocks(src, ids(()), dst, ids(()))


def pool(num_blocks: int = 4, heads: int = 2, row: int = 8) -> View:
    return from_paged(torch.zeros(num_blocks, 2, 4, heads, row, dtype=torch.uint8), "BPTHD")


@pytest.mark.parametrize(
    ("src", "src_ids", "dst", "dst_ids", "ranges", "message"),
    [
        pytest.param(pool(), (0,), pool(), (4,), {}, r"dst_ids holds 4, outside", id="id-past-the-end"),
        pytest.param(pool(), (-1,), pool(), (0,), {}, r"src_ids holds -1", id="negative-id"),
        pytest.param(pool(), (0, 1), pool(), (0,), {}, r"pair up", id="lengths"),
        pytest.param(pool(), (0, 1), pool(), (2, 2), {}, r"dst_ids holds 2 more than once", id="repeated-destination"),
        pytest.param(pool(heads=3), (0,), pool(), (0,), {}, r"total_heads 3.* 2", id="heads"),
        pytest.param(pool(row=4), (0,), pool(), (0,), {}, r"row_bytes 4.* 8", id="row-bytes"),
        pytest.param(pool(), (0,), pool(), (0,), {"heads": (1, 3)}, r"heads \[1, 3\)", id="head-range"),
        pytest.param(pool(), (0,), pool(), (0,), {"layers": (1, 1)}, r"layers \[1, 1\)", id="empty-layer-range"),
        pytest.param(pool(), (0,), pool(), (0,), {"sm_budget": 0}, r"sm_budget is 0", id="budget"),
    ],
)
def test_what_does_not_fit_is_refused(
    src: View, src_ids: tuple[int, ...], dst: View, dst_ids: tuple[int, ...], ranges: dict[str, Any], message: str
) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        copy_blocks(src, ids(src_ids), dst, ids(dst_ids), **ranges)
    assert int(dst.tensors[0].sum()) == 0


def test_memory_read_and_written_is_refused() -> None:
    buffer = torch.arange(8 * 64, dtype=torch.int64).view(8, 2, 4, 8).clone()
    whole, shifted = from_paged(buffer, "BTHD"), from_paged(buffer.view(-1)[32:-32].view(7, 2, 4, 8), "BTHD")
    with pytest.raises(KernelArgumentError, match="block 3 is both read and written"):
        copy_blocks(whole, ids((2, 3)), whole, ids((3, 4)))
    with pytest.raises(KernelArgumentError, match="share memory"):
        copy_blocks(whole, ids((2,)), shifted, ids((2,)))
    copy_blocks(whole, ids((2, 2)), shifted, ids((4, 6)))
    assert torch.equal(buffer.view(-1)[32:-32].view(7, 2, 4, 8)[4], torch.arange(128, 192).view(2, 4, 8))


def test_runs_are_widened_before_anything_is_launched() -> None:
    def layers(axes: str, *shape: int) -> View:
        return from_paged(torch.zeros(shape, dtype=torch.uint8), axes)

    nhd, hnd = layers("BLPTHD", 4, 3, 2, 16, 8, 64), layers("BLPHTD", 4, 3, 2, 8, 16, 64)
    two = ids((1, 2))
    same = plan_copy(nhd, two, layers("BLPTHD", 4, 3, 2, 16, 8, 64), two)
    assert (same.row_bytes, same.axes, same.num_bases) == (3 * 2 * 16 * 8 * 64, (), 1)
    split = plan_copy(layers("LPBTHD", 3, 2, 4, 16, 8, 64), two, nhd, two)
    assert (split.row_bytes, len(split.axes), split.rows_per_pair) == (16 * 8 * 64, 1, 6)
    turned = plan_copy(nhd, two, hnd, two)
    assert (turned.row_bytes, turned.rows_per_pair, turned.num_bytes) == (64, 3 * 2 * 16 * 8, 2 * nhd.block_bytes)


@pytest.mark.parametrize(("skipped", "alignment"), [(0, 16), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)])
def test_the_word_is_as_wide_as_the_addresses_allow(skipped: int, alignment: int) -> None:
    buffer = torch.zeros(1024, dtype=torch.uint8)
    shifted = buffer[-int(buffer.data_ptr()) % 16 + skipped :][: 4 * 48].view(4, 1, 1, 48)
    plan = plan_copy(
        from_paged(shifted, "BTHD"), ids((2,)), from_paged(buffer.new_zeros(4, 1, 1, 48), "BTHD"), ids((0,))
    )
    assert kernel_launch(plan, "dst").constants["ALIGNMENT"] == alignment


def test_without_the_alignment_hint_accesses_are_narrow() -> None:
    pytest.importorskip("triton")
    chosen = next(s for s in specializations() if "NHD to HND, 256 B" in s.name)
    assert check(chosen, compile_specialization(chosen, 90)) == []
    unhinted = replace(chosen, constexprs={**chosen.constexprs, "ALIGNMENT": 4})
    complaints = check(unhinted, compile_specialization(unhinted, 90))
    assert any("below 128 bits" in complaint for complaint in complaints)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnTheGpu:
    """The same conversions on the device, and between it and pinned host memory in both directions."""

    @pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS.keys())
    @pytest.mark.parametrize("where", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
    @pytest.mark.parametrize("sm_budget", [None, 1])
    def test_engine_layouts(self, conversion: tuple[Side, Side], where: tuple[str, str], sm_budget: int | None) -> None:
        (src, _), (dst, written) = (moved(side, device) for side, device in zip(conversion, where, strict=True))
        src_ids, dst_ids = ids((3, 0, 0, 4)), ids((1, 2, 0, 4))
        copy_blocks(src, src_ids, dst, dst_ids, sm_budget=sm_budget)
        (twin_src, _), (twin, expected) = (side.build() for side in conversion)
        copy_blocks(twin_src, src_ids, twin, dst_ids)
        torch.cuda.synchronize()
        for ours, theirs in zip(written, expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)

    def test_pageable_memory_is_refused(self) -> None:
        device = from_paged(torch.zeros(4, 2, 4, 2, 8, dtype=torch.uint8, device="cuda"), "BPTHD")
        with pytest.raises(KernelArgumentError, match=r"not all of the \d+ bytes of host memory at .* are pinned"):
            copy_blocks(pool(), ids((0,)), device, ids((0,)))


def moved(side: Side, device: str) -> tuple[View, list[torch.Tensor]]:
    """The side's view over copies of its memory, on the device or pinned, and the copies."""
    view, roots = side.build()
    copies = [root.to(device) if device == "cuda" else root.pin_memory() for root in roots]
    starts = {root.data_ptr(): copy.data_ptr() for root, copy in zip(roots, copies, strict=True)}
    shift = np.array([[starts[first] - first for first, _ in row] for row in view.limits.tolist()])
    moved_view = replace(view, tensors=tuple(copies), base=view.base + shift, limits=view.limits + shift[..., None])
    return moved_view, copies
