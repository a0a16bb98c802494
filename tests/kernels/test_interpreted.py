"""The `interpreted` fixture itself: what it must be able to run, and that it leaves nothing behind."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

KERNEL = """
import triton
import triton.language as tl

FACTOR: tl.constexpr = tl.constexpr(3)


@triton.jit
def last_and_twice_the_rest(a, b):
    return a * 2 + b


@triton.jit
def summary(x, N: tl.constexpr):
    return tl.sum(x, axis=0) + tl.max(x, 0) + x.sum() + N * FACTOR


@triton.jit
def add_summary(src_ptr, dst_address, count, TILE: tl.constexpr):
    dst = tl.multiple_of(dst_address.to(tl.pointer_type(tl.int32)), 4)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, TILE), tl.num_programs(0), num_stages=2):
        offsets = tile * TILE + tl.arange(0, TILE)
        x = tl.load(src_ptr + offsets, mask=offsets < count, other=0)
        y = tl.zeros((TILE,), tl.int32) + summary(x, TILE) + tl.reduce(x, 0, last_and_twice_the_rest)
        tl.store(dst + offsets, x + y, mask=offsets < count)


@triton.jit
def fails(dst_ptr):
    tl.store(dst_ptr, unknown_name)
"""


@pytest.fixture
def module(tmp_path: Path) -> Any:
    path = tmp_path / "interpreted_example.py"
    path.write_text(KERNEL)
    spec = importlib.util.spec_from_file_location("interpreted_example", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _expected(src: torch.Tensor, tile: int) -> torch.Tensor:
    dst = torch.empty_like(src)
    for start in range(0, src.numel(), tile):
        part = src[start : start + tile]
        padded = torch.zeros(tile, dtype=src.dtype)
        padded[: part.numel()] = part
        folded = 0
        for value in padded.tolist():
            folded = folded * 2 + value
        folded = (folded + 2**31) % 2**32 - 2**31
        dst[start : start + tile] = part + 2 * padded.sum() + padded.max() + 3 * tile + folded
    return dst


def _language() -> list[dict[str, Any]]:
    import triton.language as tl

    owners = (tl, tl.core, tl.math, tl.standard, tl.random, tl.tensor, tl.condition, tl.dtype)
    return [dict(vars(owner)) for owner in owners]


def test_nested_functions_the_library_addresses_and_pipelined_loops_work(
    interpreted: Callable[[Any], Any], module: Any
) -> None:
    src = torch.arange(100, dtype=torch.int32)
    dst = torch.full((101,), -7, dtype=torch.int32)
    interpreted(module.add_summary)[(2,)](src, dst.data_ptr(), 100, TILE=8, num_warps=4)
    assert torch.equal(dst[:100], _expected(src, 8))
    assert dst[100] == -7


def test_nothing_is_left_behind_and_compilation_still_works(
    interpreted: Callable[[Any], Any], aot: Callable[..., Any], module: Any
) -> None:
    from triton import knobs

    language, names = _language(), set(vars(module))
    src, dst = torch.ones(8, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    signature = {"src_ptr": "*i32", "dst_address": "i64", "count": "i32"}
    for _ in range(2):
        interpreted(module.add_summary)[(1,)](src, dst.data_ptr(), 8, TILE=8)
        assert torch.equal(dst, _expected(src, 8))
        assert _language() == language
        assert set(vars(module)) == names
        assert knobs.runtime.interpret is False
        assert aot(module.add_summary, signature, {"TILE": 1024}).registers > 0


def test_a_failing_kernel_leaves_nothing_behind_either(interpreted: Callable[[Any], Any], module: Any) -> None:
    language = _language()
    with pytest.raises(Exception, match="unknown_name"):
        interpreted(module.fails)[(1,)](torch.empty(1))
    assert _language() == language


def test_only_jit_functions_are_taken(interpreted: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"@triton\.jit"):
        interpreted(sys.exit)
