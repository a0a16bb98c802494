"""Kernels compiled ahead of time, without a GPU, and read as machine code: registers, spills, widths of global accesses.

A kernel module lists what it will be launched with as `specializations()`; `all_specializations()` gathers them. For each
one and each architecture `check` compiles, disassembles and says what is wrong in sentences: a lost alignment hint shows
as loads narrower than 128 bits, a tile too large for the registers as spills.

Compiled code is cached by Triton (TRITON_CACHE_DIR), the disassembly beside it. Needs Triton 3.6 or newer with its bundled
`cuobjdump` and `nvdisasm`; importing this module needs neither.
"""

import hashlib
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ARCHITECTURES",
    "Access",
    "AotError",
    "Compiled",
    "Specialization",
    "all_specializations",
    "check",
    "compile_kernel",
    "compile_specialization",
]

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities checked: A100, H100/H200, B200."""

WIDE_BITS = 128
"""The widest access of one thread that every architecture has."""

_WARP_SIZE = 32
_TOOL_TIMEOUT_S = 120.0
_LOADS = frozenset({"LDG", "LD", "LDGSTS"})
_STORES = frozenset({"STG", "ST"})
_WIDTHS = {"8": 8, "U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


class AotError(RuntimeError):
    """A kernel does not compile ahead of time, or a tool of the CUDA toolkit fails. The message carries its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialization:
    """One way a kernel is launched, and what its machine code must look like.

    Attributes:
        name: what it does, such as "NHD to HND, 256 B rows"; unique.
        kernel: the `@triton.jit` function.
        signature: Triton type of every run-time argument: "*i8", "i64", "fp32". Constants are left out.
        constexprs: value of every constexpr argument.
        divisible_by_16: run-time arguments of which the launcher guarantees that 16 divides them.
        max_registers: budget per thread.
        loaded_bytes: data one program loads per tile, all of it by 128-bit loads; 0 leaves loads unchecked.
        stored_bytes: data one program stores per tile, all of it by 128-bit stores; 0 leaves stores unchecked.
        narrow_loads: instructions narrower than 128 bits that are allowed, as for address tables and scales.
        narrow_stores: the same for stores, as for scales and digests.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 8
    num_stages: int = 3
    max_registers: int = 128
    loaded_bytes: int = 0
    stored_bytes: int = 0
    narrow_loads: int = 0
    narrow_stores: int = 0
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Access:
    """Global memory instructions of one kind in the machine code.

    Attributes:
        opcode: with modifiers, such as "LDG.E.128".
        bits: moved by one thread.
        count: instructions, not executions.
    """

    opcode: str
    bits: int
    count: int

    @property
    def is_store(self) -> bool:
        return self.opcode.partition(".")[0] in _STORES


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A kernel compiled for one architecture.

    Attributes:
        registers: per thread.
        stack_bytes: local memory frame per thread; 0 unless something is spilled or indexed dynamically.
        spill_loads: LDL instructions.
        spill_stores: STL instructions.
        shared_bytes: dynamic shared memory of one program.
        accesses: global memory instructions by kind.
    """

    architecture: int
    num_warps: int
    ptx: str
    sass: str
    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    accesses: tuple[Access, ...]

    def wide_bytes(self, *, stores: bool) -> int:
        """Bytes that one program moves if each access of at least 128 bits is executed once."""
        wide = (a for a in self.accesses if a.is_store == stores and a.bits >= WIDE_BITS)
        return sum(a.bits // 8 * a.count for a in wide) * _WARP_SIZE * self.num_warps

    def narrow(self, *, stores: bool) -> int:
        """Number of instructions below 128 bits."""
        return sum(a.count for a in self.accesses if a.is_store == stores and a.bits < WIDE_BITS)

    def widths(self, *, stores: bool) -> dict[int, int]:
        """Instructions by width in bits, widest first."""
        counts: Counter[int] = Counter()
        for access in self.accesses:
            if access.is_store == stores:
                counts[access.bits] += access.count
        return dict(sorted(counts.items(), reverse=True))


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible_by_16: Sequence[str] = (),
    num_warps: int = 8,
    num_stages: int = 3,
    architecture: int = 90,
) -> Compiled:
    """Compiles a `@triton.jit` function for a GPU that need not be there. Takes 0.3 to 2 s, or a few ms from the cache.

    Args:
        kernel: the JIT function.
        signature: Triton type of every run-time argument, by name.
        constexprs: value of every constexpr argument, by name.
        divisible_by_16: run-time arguments that 16 divides.
        num_warps: warps of one program.
        num_stages: default depth of pipelined loops.
        architecture: compute capability times ten, such as 90.

    Raises:
        AotError: it does not compile, an argument is missing, or the disassembler fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    missing = [name for name in kernel.arg_names if name not in signature and name not in constexprs]
    unknown = [name for name in (*signature, *constexprs, *divisible_by_16) if name not in kernel.arg_names]
    if missing or unknown:
        raise AotError(f"{kernel.__name__}: arguments without a type {missing}, unknown arguments {unknown}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(kernel, types, dict(constexprs), attributes)
    # Fusion is the compiler's own default up to 3.9, which warns unless told.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    try:
        built = triton.compile(source, target=GPUTarget("cuda", architecture, _WARP_SIZE), options=options)
    except (triton.CompilationError, RuntimeError) as error:
        raise AotError(f"{kernel.__name__} does not compile for sm_{architecture}: {error}") from error
    return _inspect(built.asm["cubin"], built.asm["ptx"], built.metadata.shared, architecture, num_warps)


def compile_specialization(specialization: Specialization, architecture: int) -> Compiled:
    """Compiles `specialization` for one architecture.

    Raises:
        AotError: as of `compile_kernel`.
    """
    return compile_kernel(
        specialization.kernel,
        specialization.signature,
        specialization.constexprs,
        divisible_by_16=specialization.divisible_by_16,
        num_warps=specialization.num_warps,
        num_stages=specialization.num_stages,
        architecture=architecture,
    )


def check(specialization: Specialization, compiled: Compiled) -> list[str]:
    """What is wrong with the machine code, one sentence each; empty when it keeps all promises."""
    wrong = []
    if compiled.spill_loads or compiled.spill_stores or compiled.stack_bytes:
        wrong.append(
            f"spills: {compiled.spill_stores} STL, {compiled.spill_loads} LDL, {compiled.stack_bytes} B of stack"
        )
    if compiled.registers > specialization.max_registers:
        wrong.append(f"{compiled.registers} registers, the budget is {specialization.max_registers}")
    promises = (
        ("load", False, specialization.loaded_bytes, specialization.narrow_loads),
        ("store", True, specialization.stored_bytes, specialization.narrow_stores),
    )
    for verb, stores, num_bytes, num_narrow in promises:
        if num_bytes == 0:
            continue
        wide, narrow = compiled.wide_bytes(stores=stores), compiled.narrow(stores=stores)
        if wide < num_bytes:
            wrong.append(f"128-bit {verb}s cover {wide} B of a tile of {num_bytes} B")
        if narrow > num_narrow:
            found = compiled.widths(stores=stores)
            wrong.append(f"{narrow} {verb}s below 128 bits, {num_narrow} are allowed; instructions by bits: {found}")
    return wrong


def all_specializations() -> list[Specialization]:
    """What `specializations()` of every module of this package lists, in the order of the modules' names.

    Raises:
        AotError: two have the same name.
    """
    package = importlib.import_module("dynamo.kernels")
    found: dict[str, Specialization] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        module = importlib.import_module(f"dynamo.kernels.{name}")
        lister = getattr(module, "specializations", None)
        if lister is None or lister.__module__ != module.__name__:
            continue
        for specialization in lister():
            if specialization.name in found:
                raise AotError(f"two specializations are called {specialization.name!r}")
            found[specialization.name] = specialization
    return list(found.values())


def _inspect(cubin: bytes, ptx: str, shared_bytes: int, architecture: int, num_warps: int) -> Compiled:
    usage, sass = _disassemble(cubin)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(_INSTRUCTION.findall(sass))
    if "REG" not in numbers or not opcodes:
        raise AotError(f"cuobjdump and nvdisasm say nothing readable about the kernel: {usage[:500]!r}")
    by_name = Counter[str]()
    for opcode, count in opcodes.items():
        by_name[opcode.partition(".")[0]] += count
    accesses = tuple(
        Access(opcode, _bits(opcode), count)
        for opcode, count in sorted(opcodes.items())
        if opcode.partition(".")[0] in _LOADS | _STORES
    )
    return Compiled(
        architecture=architecture,
        num_warps=num_warps,
        ptx=ptx,
        sass=sass,
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        spill_loads=by_name["LDL"],
        spill_stores=by_name["STL"],
        shared_bytes=shared_bytes,
        accesses=accesses,
    )


def _bits(opcode: str) -> int:
    """Width of an access from its modifiers; without one it is 32. "LTC128B" and the like are cache hints."""
    return next((_WIDTHS[part] for part in opcode.split(".")[1:] if part in _WIDTHS), 32)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, kept beside Triton's own cache since the tools take longer than a cached compile."""
    import triton
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(b"disassembly" + cubin).hexdigest())
    paths = [cache.get_file(name) for name in ("usage.txt", "sass.txt")]
    if paths[0] is not None and paths[1] is not None:
        return Path(paths[0]).read_text(), Path(paths[1]).read_text()
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        sass = _run(tools / "nvdisasm", "-c", file.name)
    cache.put(usage, "usage.txt", binary=False)
    cache.put(sass, "sass.txt", binary=False)
    return usage, sass


def _run(*command: object) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AotError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise AotError(f"{command[0]} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
