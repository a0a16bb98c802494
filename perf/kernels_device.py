"""Kernel benchmark, within one GPU: every conversion beside the device's own copy, torch, and other projects' kernels."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.runs import find_runs
from dynamo.perf.kernels_layouts import LayoutCase, conversions, rows, universal_pack
from dynamo.perf.kernels_measure import choose_timer, paired, speed_results
from dynamo.perf.kernels_peers import PointerList
from dynamo.perf.kernels_workload import Findings, Workload

__all__ = ["device_copies"]

_ROW_SIZES = (64, 128, 256, 1152)
_GATHERED_ROWS = (4 << 10, 64 << 10, 2 << 20)
_MOST_PIECES = 1 << 20  # a list of pointers for smaller pieces would itself be a good part of the traffic

Way = tuple[str, Callable[[], object]]


def device_copies(workload: Workload) -> Findings:
    """Gathers, scatters and conversions in GPU memory. Payload counts each byte once; it is read and written."""
    device = torch.device(workload.device)
    timer = choose_timer(device)
    for case in _cases(workload, device):
        plain = [torch.ones(case.num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        for name, action in _ways(case, device):
            speed = paired(timer, action, partial(plain[0].copy_, plain[1]), case.num_bytes, workload.repeats)
            yield from speed_results(case.name, name, speed, workload.repeats)
    yield "within the GPU: the ceiling is one contiguous device copy of as many bytes; the memory moves twice the payload"


def _cases(workload: Workload, device: torch.device) -> Iterator[LayoutCase]:
    for row_bytes in _GATHERED_ROWS:
        yield from rows(row_bytes, workload.num_bytes, device)
    for row_bytes in _ROW_SIZES:
        yield from conversions(row_bytes, workload.num_bytes, device)
    yield universal_pack(256, workload.num_bytes, device)


def _ways(case: LayoutCase, device: torch.device) -> Iterator[Way]:
    yield "dynamo-kv copy_blocks", lambda: copy_blocks(case.src, case.src_ids, case.dst, case.dst_ids)
    for other in case.others:
        yield other.name, other.run
    runs = find_runs(case.src, case.src_ids, case.dst, case.dst_ids)
    if runs.num_pieces <= _MOST_PIECES:
        pieces = runs.expand()
        listed = PointerList(pieces.src, pieces.dst, pieces.sizes, device)
        yield "vLLM's way: pointer list, 8 B accesses, all SMs", lambda: listed.run(programs=_all_sms(device))


def _all_sms(device: torch.device) -> int:
    """Programs that fill the GPU; one where there is none, as in tests."""
    if device.type != "cuda":
        return 1
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
