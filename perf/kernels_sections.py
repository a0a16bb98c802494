"""The parts of the kernel benchmark. Each runs in a process of its own: a bad address that ends one spares the others.

`python -m dynamo.perf.kernels_sections MODULE:FUNCTION WORKLOAD` is how `run_section` starts one; it prints every finding as
a line of JSON as soon as it has it, so that what was measured before a failure is kept.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = ["SECTIONS", "Section", "main", "run_section"]


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
    """Runs one section in a process of its own and yields what it found. A failure becomes a note; details go to `console`."""
    command = [sys.executable, "-P", "-m", "dynamo.perf.kernels_sections", section.place, workload.to_json()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=section.limit_s, check=False)
    except subprocess.TimeoutExpired as late:
        printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        yield from _parse(printed)
        yield f"{section.name}: FAILED, not done after {section.limit_s:.0f} s"
        return
    yield from _parse(done.stdout)
    if done.returncode:
        console.print(done.stderr, markup=False, highlight=False)
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        yield f"{section.name}: FAILED with status {done.returncode}: {said[-1]}"


def main(arguments: Sequence[str]) -> int:
    """Runs the function named by the first argument with the workload in the second."""
    place, workload = arguments
    module, _, name = place.partition(":")
    body: Callable[[Workload], Findings] = getattr(importlib.import_module(module), name)
    for finding in body(Workload.from_json(workload)):
        record = finding if isinstance(finding, str) else dataclasses.asdict(finding)
        print(json.dumps({"finding": record}), flush=True)
    return 0


def _parse(printed: str) -> Iterator[Result | str]:
    """Findings among whatever else was printed; a last line cut short is left out."""
    for line in printed.splitlines():
        if line.startswith('{"finding": ') and line.endswith("}"):
            record = json.loads(line)["finding"]
            yield record if isinstance(record, str) else Result(**record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
