"""Machine code of every listed kernel launch, as a table: registers, access widths, spills. Needs no GPU."""

from collections.abc import Iterator

from rich.console import Console

from dynamo.kernels.aot import (
    ARCHITECTURES,
    AotError,
    Compiled,
    Specialization,
    all_specializations,
    check,
    compile_specialization,
)
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.kernels_workload import Findings
from dynamo.perf.report import Result

__all__ = ["machine_code"]


def machine_code(console: Console) -> Findings:
    """Compiles everything for every architecture.

    Raises:
        BenchmarkError: Triton is not installed, or a kernel does not compile.
    """
    try:
        for specialization in all_specializations():
            console.print(f"{specialization.name} ...", style="dim", markup=False)
            for architecture in ARCHITECTURES:
                if architecture in specialization.architectures:
                    compiled = compile_specialization(specialization, architecture)
                    yield from _results(specialization, compiled)
                    for sentence in check(specialization, compiled):
                        yield f"{specialization.name}, sm_{architecture}: {sentence}"
    except ImportError as error:
        raise BenchmarkError(f"ahead-of-time compilation needs Triton: {error}") from error
    except AotError as error:
        raise BenchmarkError(str(error)) from error
    yield (
        "narrow: global accesses below 128 bits per thread, in instructions; address tables, scales and digests are read "
        "and written so, data is not"
    )


def _results(specialization: Specialization, compiled: Compiled) -> Iterator[Result]:
    numbers = (
        ("registers", compiled.registers, "per thread"),
        ("loads", compiled.widths(stores=False).get(128, 0), "128-bit"),
        ("narrow loads", compiled.narrow(stores=False), "instructions"),
        ("stores", compiled.widths(stores=True).get(128, 0), "128-bit"),
        ("narrow stores", compiled.narrow(stores=True), "instructions"),
        ("spills", compiled.spill_loads + compiled.spill_stores, "instructions"),
        ("shared", compiled.shared_bytes / 1024, "KiB"),
    )
    for metric, value, unit in numbers:
        yield Result(
            case=specialization.name,
            subject=f"sm_{compiled.architecture}",
            metric=metric,
            value=float(value),
            unit=unit,
        )
