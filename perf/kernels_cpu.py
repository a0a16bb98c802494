"""Kernel benchmark without a GPU: copies between CPU tensors against memmove, and what planning costs the host."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.host_threads import num_threads_for
from dynamo.perf.kernels_layouts import LayoutCase, Peer, conversions, host_bytes_new, rows
from dynamo.perf.kernels_measure import busy_core, paired_cpu, speed_results
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = ["ROW_SIZES", "cpu_copies"]

ROW_SIZES = (2 << 20, 64 << 10, 32 << 10)
"""Bytes of the rows gathered and scattered: a long run, and the blocks of one layer of usual models."""

_HEAD_ROW_BYTES = 256


def cpu_copies(workload: Workload) -> Findings:
    """Gathers, scatters and layout changes on CPU tensors, alone and with another core computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a neighbour makes torch's intra-op threads wait for each other
    try:
        for is_busy in (False, True):
            with busy_core() if is_busy else nullcontext():
                for case in _cases(workload):
                    yield from _measure(case, workload, "busy core" if is_busy else "idle")
    finally:
        torch.set_num_threads(threads)
    yield (
        f"CPU copies: payload by elapsed time, copy_blocks with up to {num_threads_for(workload.num_bytes)} threads, "
        "memmove and the others with one; threads at work is processor time by elapsed time. Each repeat is paired with a "
        "memmove of as many bytes, and shares are medians of the repeats' ratios. All memory is mapped alike, with huge pages "
        "where the system has them"
    )


def _cases(workload: Workload) -> Iterator[LayoutCase]:
    device = torch.device("cpu")
    for row_bytes in ROW_SIZES:
        yield from rows(row_bytes, workload.num_bytes, device)
    yield from conversions(_HEAD_ROW_BYTES, workload.num_bytes, device)


def _measure(case: LayoutCase, workload: Workload, neighbour: str) -> Findings:
    source, target = host_bytes_new(case.num_bytes), host_bytes_new(case.num_bytes)
    ours = Peer("dynamo-kv copy_blocks", partial(copy_blocks, case.src, case.src_ids, case.dst, case.dst_ids))
    where, repeats = f"{case.name}, {neighbour}", workload.repeats
    for way in (ours, *case.others):
        wall, cpu = paired_cpu(way.run, lambda: np.copyto(target, source), case.num_bytes, repeats)
        yield from speed_results(where, way.name, wall, repeats)
        at_work = wall.gb_s / cpu.gb_s
        yield Result(case=where, subject=way.name, metric="threads at work", value=at_work, unit="", samples=repeats)
