"""The parts of the kernel benchmark. Each runs in a process of its own: a bad address that ends one spares the others.

`python -m dynamo.perf.kernels_sections MODULE:FUNCTION WORKLOAD` is how `run_section` starts one; it prints every finding as
a line of JSON as soon as it has it, so that what was measured before a failure is kept.
"""

import dataclasses
import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from dynamo.perf.interrupts import put_off
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = ["SECTIONS", "Section", "main", "run_section"]

_GRACE_S = 10.0  # for a killed process to be gone


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the benchmark.

    Attributes:
        place: "module:function", imported only where the section runs.
        needs_cuda: skipped, and said so, without a GPU.
        limit_s: seconds after which its process is ended.
    """

    name: str
    summary: str
    place: str
    needs_cuda: bool = True
    limit_s: float = 240.0


SECTIONS = (
    Section("cpu", "copies between CPU tensors", "dynamo.perf.kernels_cpu:cpu_copies", needs_cuda=False, limit_s=900.0),
    Section("planning", "host time of 65,536 pieces", "dynamo.perf.kernels_planning:planning", needs_cuda=False),
    Section("device", "copies and conversions within the GPU", "dynamo.perf.kernels_device:device_copies"),
    Section("pinned", "pinned host memory to the GPU and back", "dynamo.perf.kernels_pinned:pinned_copies"),
    Section("depth", "zero-copy by tile, pipeline stages and programs", "dynamo.perf.kernels_pinned:pipeline_depths"),
    Section("batch", "the copy engine by size and number of pieces", "dynamo.perf.kernels_pinned:batched_copies"),
    Section("pages", "pinned memory on 4 KiB and on 2 MiB pages", "dynamo.perf.kernels_pinned:page_sizes"),
    Section(
        "beside", "copies beside a running matmul, and what they cost it", "dynamo.perf.kernels_beside:beside_matmul"
    ),
    Section("transforms", "quantise, digest, RoPE shift, compact", "dynamo.perf.kernels_transforms:transforms"),
    Section("exactness", "fp8 and digests of the GPU against the CPU's", "dynamo.perf.kernels_transforms:exactness"),
    Section("attention", "paged decode and prefill", "dynamo.perf.kernels_attention:attention"),
    Section("decode", "tokens per second beside transformers", "dynamo.perf.kernels_decode:decode", limit_s=540.0),
    Section("cap", "copy engine lists longer than 4,096 pieces", "dynamo.perf.kernels_pinned:batch_cap", limit_s=60.0),
)
"""In the order they run; what has been seen to hang a driver comes last."""


def run_section(section: Section, workload: Workload, console: Console) -> Findings:
    """Runs one section in a process of its own and yields what it finds as it finds it, naming each case on `console`.

    A failure becomes a note; details go to `console`.
    """
    command = [sys.executable, "-P", "-m", "dynamo.perf.kernels_sections", section.place, workload.to_json()]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process: subprocess.Popen[bytes] | None = None
        try:
            with put_off():  # until there is what is ended below
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
            case, deadline = "", time.monotonic() + section.limit_s
            for finding in _parse(_lines(process, deadline)):
                if isinstance(finding, Result) and finding.case != case:
                    case = finding.case
                    console.print(f"  {case}", style="dim", markup=False, highlight=False)
                yield finding
            status = _status(process, deadline)
        finally:
            is_gone = process is None or _end(process)
        said.seek(0)
        details = said.read().strip()
    if status == 0:
        return
    console.print(details, markup=False, highlight=False)
    if status is None:
        stuck = "" if is_gone else "; its process cannot be ended"
        yield f"{section.name}: FAILED, not done after {section.limit_s:.0f} s{stuck}"
        return
    yield f"{section.name}: FAILED with status {status}: {(details.splitlines() or ['it said nothing'])[-1]}"


def _lines(process: "subprocess.Popen[bytes]", deadline: float) -> Iterator[str]:
    """Lines as the process prints them, until it prints no more or the time is over."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            printed = os.read(process.stdout.fileno(), 1 << 16)
            if not printed:
                return
            *lines, rest = (rest + printed).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")


def _status(process: "subprocess.Popen[bytes]", deadline: float) -> int | None:
    """The exit status; None for a process that still runs when the time is over."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _end(process: "subprocess.Popen[bytes]") -> bool:
    """Ends a process that still runs. False for one that does not even then, as where a driver hangs."""
    assert process.stdout is not None
    process.kill()
    process.stdout.close()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def main(arguments: Sequence[str]) -> int:
    """Runs the function named by the first argument with the workload in the second."""
    place, workload = arguments
    module, _, name = place.partition(":")
    body: Callable[[Workload], Findings] = getattr(importlib.import_module(module), name)
    for finding in body(Workload.from_json(workload)):
        record = finding if isinstance(finding, str) else dataclasses.asdict(finding)
        print(json.dumps({"finding": record}), flush=True)
    return 0


def _parse(printed: Iterator[str]) -> Findings:
    """Findings among whatever else was printed."""
    for line in printed:
        if line.startswith('{"finding": ') and line.endswith("}"):
            record = json.loads(line)["finding"]
            yield record if isinstance(record, str) else Result(**record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
