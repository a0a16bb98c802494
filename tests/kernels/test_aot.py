"""Machine code of every listed launch on every architecture: 128-bit accesses, no spills, registers within budget.

Nothing here runs on a GPU; compilation and disassembly do not need one.
"""

import ast
import dataclasses
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")

from dynamo.kernels.aot import (
    ARCHITECTURES,
    AotError,
    Specialization,
    all_specializations,
    check,
    compile_kernel,
    compile_specialization,
)

SPECIALIZATIONS = all_specializations()
TRITON = tuple(int(number) for number in version("triton").split(".")[:2])

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def scale(src_ptr, dst_address, count, TILE: tl.constexpr):
    dst = tl.multiple_of(dst_address.to(tl.pointer_type(tl.float32)), 16)
    offsets = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = offsets < count
    tl.store(dst + offsets, tl.load(src_ptr + offsets, mask=mask) * 2, mask=mask)


@triton.jit
def greedy(src_ptr, dst_ptr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    a = tl.load(src_ptr + offsets)
    tl.debug_barrier()
    b = tl.load(src_ptr + TILE + offsets)
    tl.store(dst_ptr + offsets, tl.cumsum(a, 0) * b)
"""


def _module(name: str, source: str, folder: Path) -> Any:
    """Imports `source` from a file, which is where Triton reads kernels from."""
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Unhinted(ast.NodeTransformer):
    """Replaces `tl.multiple_of(x, n)` and `tl.max_contiguous(x, n)` by `x`."""

    removed = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("multiple_of", "max_contiguous"):
            self.removed += 1
            return node.args[0]
        return node


def _without_hints(source: str) -> str:
    remover = _Unhinted()
    tree = remover.visit(ast.parse(source))
    assert remover.removed, "the source holds no hints"
    return ast.unparse(ast.fix_missing_locations(tree))


def _scale(kernel: Any) -> Specialization:
    return Specialization(
        name="scale",
        kernel=kernel,
        signature={"src_ptr": "*fp32", "dst_address": "i64", "count": "i32"},
        constexprs={"TILE": 4096},
        divisible_by_16=("src_ptr", "count"),
        num_warps=4,
        loaded_bytes=16384,
        stored_bytes=16384,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("specialization", SPECIALIZATIONS, ids=lambda s: s.name.replace(" ", "-"))
def test_machine_code_keeps_its_promises(specialization: Specialization, architecture: int) -> None:
    if architecture not in specialization.architectures:
        pytest.skip(f"not built for sm_{architecture}")
    if TRITON < (3, 9):  # it reads tables and scales in more instructions, data in as few
        specialization = dataclasses.replace(specialization, narrow_loads=specialization.narrow_loads + 100)
    wrong = check(specialization, compile_specialization(specialization, architecture))
    if TRITON < (3, 9) and architecture != 90:  # a launch of 3.6 spills on sm_80, one of 3.7 on sm_100
        wrong = [sentence for sentence in wrong if not sentence.startswith("spills: ")]
    assert wrong == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lost_hint_is_found(tmp_path: Path, architecture: int) -> None:
    hinted = _scale(_module("hinted", KERNEL, tmp_path).scale)
    assert check(hinted, compile_specialization(hinted, architecture)) == []
    bare = _scale(_module("unhinted", _without_hints(KERNEL), tmp_path).scale)
    wrong = check(bare, compile_specialization(bare, architecture))
    assert any("stores below 128 bits" in sentence for sentence in wrong)
    assert any("128-bit stores cover 0 B of a tile of 16384 B" in sentence for sentence in wrong)


@pytest.mark.parametrize(
    "specialization",
    [s for s in SPECIALIZATIONS if s.loaded_bytes and s.stored_bytes][:1],
    ids=lambda s: s.name.replace(" ", "-"),
)
def test_the_check_fails_for_a_listed_kernel_without_its_hints(specialization: Specialization, tmp_path: Path) -> None:
    source = Path(sys.modules[specialization.kernel.__module__].__file__ or "").read_text()
    module = _module("unhinted_kernel", _without_hints(source), tmp_path)
    bare = dataclasses.replace(specialization, kernel=getattr(module, specialization.kernel.__name__))
    wrong = check(bare, compile_specialization(bare, 90))
    assert any("below 128 bits" in sentence or "128-bit" in sentence for sentence in wrong), wrong


def test_an_argument_that_16_does_not_divide_is_found(tmp_path: Path) -> None:
    specialization = dataclasses.replace(_scale(_module("unaligned", KERNEL, tmp_path).scale), divisible_by_16=())
    wrong = check(specialization, compile_specialization(specialization, 90))
    assert any("loads below 128 bits" in sentence for sentence in wrong)


def test_allowed_narrow_accesses_do_not_excuse_data(tmp_path: Path) -> None:
    bare = dataclasses.replace(_scale(_module("excused", _without_hints(KERNEL), tmp_path).scale), narrow_stores=1000)
    wrong = check(bare, compile_specialization(bare, 90))
    assert wrong == ["128-bit stores cover 0 B of a tile of 16384 B"]


def test_spills_and_registers_beyond_the_budget_are_found(tmp_path: Path) -> None:
    specialization = Specialization(
        name="greedy",
        kernel=_module("greedy", KERNEL, tmp_path).greedy,
        signature={"src_ptr": "*fp32", "dst_ptr": "*fp32"},
        constexprs={"TILE": 32768},
        divisible_by_16=("src_ptr", "dst_ptr"),
        num_warps=4,
        max_registers=16,
    )
    wrong = check(specialization, compile_specialization(specialization, 90))
    assert any(sentence.startswith("spills: ") for sentence in wrong)
    assert any("the budget is 16" in sentence for sentence in wrong)


def test_arguments_that_do_not_fit_the_kernel_are_named(tmp_path: Path) -> None:
    kernel = _module("misnamed", KERNEL, tmp_path).scale
    with pytest.raises(AotError, match=r"without a type \['count'\], unknown arguments \['n'\]"):
        compile_kernel(kernel, {"src_ptr": "*fp32", "dst_address": "i64", "n": "i32"}, {"TILE": 16})


def test_a_kernel_that_does_not_compile_is_an_error_with_the_compilers_words(tmp_path: Path) -> None:
    kernel = _module("wrong_tile", KERNEL, tmp_path).scale
    with pytest.raises(AotError, match="power of 2"):
        compile_kernel(kernel, {"src_ptr": "*fp32", "dst_address": "i64", "count": "i32"}, {"TILE": 100})


def test_compiled_kernels_tell_widths_and_bytes(tmp_path: Path) -> None:
    specialization = _scale(_module("described", KERNEL, tmp_path).scale)
    compiled = compile_specialization(specialization, 90)
    assert compiled.widths(stores=False) == {128: 8}
    assert compiled.widths(stores=True) == {128: 8}
    assert compiled.wide_bytes(stores=False) == 16384
    assert compiled.narrow(stores=True) == 0
    assert 0 < compiled.registers <= 255
    assert ".entry scale" in compiled.ptx
