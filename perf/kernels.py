"""How fast blocks move: every path of `dynamo.kernels`, each beside a ceiling measured in the same run and beside its peers.

One command is the whole run: on a machine without CUDA it measures copies between CPU tensors and the host cost of
planning, and says what it left out; with CUDA it goes on to GPU copies and conversions, pinned memory both ways, the copy
engine, interference with a matmul, quantising and the other transforms, attention, and decoding.
"""

import argparse
import time
from collections.abc import Iterator
from datetime import datetime

import torch
from rich.console import Console

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.kernels_aot import machine_code
from dynamo.perf.kernels_plot import draw
from dynamo.perf.kernels_sections import SECTIONS, run_section
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.machine import machine_record
from dynamo.perf.report import Report, Result, write_report

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "GB/s of every copy path and layout, beside memmove, the device copy and other projects' ways"

_CPU_MIB, _GPU_MIB = 256, 1024
_KEPT_EVERY_S = 5.0
_TITLE = "Moving KV blocks: GB/s of payload, and share of the ceiling measured in the same run"
_AOT_TITLE = "Machine code of every kernel launch, compiled ahead of time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    names = tuple(section.name for section in SECTIONS)
    workload = parser.add_argument_group("workload")
    workload.add_argument("--mib", type=int, help=f"MiB of a copy; None: {_CPU_MIB} on the CPU, {_GPU_MIB} on a GPU")
    workload.add_argument("--repeats", type=int, default=9, help="runs of each case; medians are printed")
    workload.add_argument(
        "--only", metavar="SECTION", choices=names, action="append", help=f"a part: {', '.join(names)}; may be repeated"
    )
    workload.add_argument("--decode", action="store_true", help="only tokens per second of decoding; needs CUDA")
    workload.add_argument("--aot", action="store_true", help="only the machine code of every kernel; needs no GPU")


def run(options: argparse.Namespace, console: Console) -> Report:
    """Runs all sections that this machine can run, one process each.

    With `--out` the results are kept after every section and every few seconds within one, so that an interrupted run
    leaves what it had, and drawn.

    Raises:
        BenchmarkError: nonsensical sizes, or nothing could be measured.
    """
    if options.repeats < 1 or (options.mib is not None and options.mib < 1):
        raise BenchmarkError(f"--mib is {options.mib} and --repeats is {options.repeats}; both must be at least 1")
    machine = machine_record()
    results: list[Result] = []
    notes: list[str] = []

    def report() -> Report:
        return Report(
            benchmark="kernels-aot" if options.aot else "kernels",
            title=_AOT_TITLE if options.aot else _TITLE,
            machine=machine,
            parameters={} if options.aot else {"mib": options.mib or 0, "repeats": options.repeats},
            results=results,
            notes=notes,
        )

    def keep() -> float:
        if options.out is not None and results:
            write_report(report(), options.out)
        return time.monotonic()

    kept_at = time.monotonic()
    for findings in [machine_code(console)] if options.aot else _sections(options, console):
        for finding in findings:
            if isinstance(finding, str):
                notes.append(finding)
            else:
                results.append(finding)
            if time.monotonic() - kept_at > _KEPT_EVERY_S:
                kept_at = keep()
        kept_at = keep()
    if not results:
        raise BenchmarkError(f"nothing was measured: {'; '.join(notes)}")
    if options.out is not None and not options.aot:
        stamp = datetime.fromisoformat(machine.started).strftime("%Y%m%dT%H%M%SZ")
        picture = options.out / f"kernels-{stamp}.png"
        notes.append(draw(report(), picture) or f"plot: {picture.name}")
    return report()


def _sections(options: argparse.Namespace, console: Console) -> Iterator[Findings]:
    wanted = ["decode"] if options.decode else options.only
    chosen = [section for section in SECTIONS if wanted is None or section.name in wanted]
    has_cuda = torch.cuda.is_available()
    for section in chosen:
        if has_cuda or not section.needs_cuda:
            console.print(f"{section.name}: {section.summary} ...", style="dim", markup=False)
            mib = options.mib or (_GPU_MIB if section.needs_cuda else _CPU_MIB)
            yield run_section(section, Workload(mib, options.repeats, "cuda" if section.needs_cuda else "cpu"), console)
    skipped = [f"{section.name} ({section.summary})" for section in chosen if section.needs_cuda and not has_cuda]
    if skipped:
        yield iter([f"skipped, since torch sees no CUDA device: {', '.join(skipped)}"])
