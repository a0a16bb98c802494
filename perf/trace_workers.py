"""What-if: a trace over several simulated workers, with each way of choosing among them.

Every worker keeps blocks in a pool of its own and computes what it does not find there; see `simulated_fleet`. Arrivals are
moved closer together or apart until the workers have a given load, so that queues are as long as they would be.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console

from dynamo.perf.harness import BenchmarkError, percentile
from dynamo.perf.machine import machine_record
from dynamo.perf.report import Report, Result
from dynamo.perf.simulated_fleet import FleetSpeeds, FleetTrace, Outcome, SimulatedFleet, fleet_trace
from dynamo.perf.trace_log import TracedRequest
from dynamo.router.config import Mode, RouterConfig

__all__ = ["add_arguments", "check", "run"]

_MODES: Final[tuple[Mode, ...]] = ("kv", "round-robin", "random", "least-loaded")


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Declares the options."""
    parser.add_argument(
        "--workers",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="instead of policies, compare ways to route to N workers, each with --sizes of the blocks (default: off)",
    )
    parser.add_argument(
        "--load",
        type=float,
        default=0.75,
        metavar="SHARE",
        help="with --workers: of their time that computing all prompts would take if nothing were cached",
    )


def check(options: argparse.Namespace) -> None:
    """Checks the options.

    Raises:
        BenchmarkError: one makes no sense.
    """
    if not 1 <= options.workers <= 4096:
        raise BenchmarkError(f"--workers must be from 1 to 4096, not {options.workers}")
    if not 0 < options.load <= 10:
        raise BenchmarkError(f"--load must be above 0 and up to 10, not {options.load}")


def run(requests: Sequence[TracedRequest], options: argparse.Namespace, console: Console) -> Report:
    """Simulates every mode at every size and reports.

    Raises:
        BenchmarkError: no request has a block.
    """
    begun = time.perf_counter()
    num_tokens = sum(len(request.keys) for request in requests) * requests[0].block_tokens
    if not num_tokens:
        raise BenchmarkError("no request of the trace has a block")
    speeds = FleetSpeeds(prefill_tokens_per_s=options.prefill_tokens_per_s)
    duration_s = num_tokens / (options.workers * speeds.prefill_tokens_per_s * options.load)
    trace = fleet_trace(requests, duration_s=duration_s)
    results: list[Result] = []
    for size in options.sizes:
        num_blocks = _pool_blocks(trace, size)
        case = f"{size:g} % each, {num_blocks:,} blocks"
        for mode in _MODES:
            fleet = SimulatedFleet(trace, options.workers, num_blocks, RouterConfig(mode=mode), speeds)
            results += _results(case, mode, trace, fleet.run())
            console.print(f"{case}: {mode}, {time.perf_counter() - begun:.0f} s", markup=False, highlight=False)
    return Report(
        benchmark="trace-workers",
        title=f"{len(trace.arrivals):,} requests, {trace.num_blocks:,} blocks, {trace.num_unique:,} different ones, over "
        f"{options.workers} workers in {trace.duration_s:,.0f} s",
        machine=machine_record(),
        parameters={
            "workers": options.workers,
            "load": options.load,
            "sizes": " ".join(f"{size:g}" for size in options.sizes),
            "prefill_tokens_per_s": options.prefill_tokens_per_s,
        },
        results=results,
        notes=[
            "prefix hits: leading blocks found at the worker, of all blocks; predicted: what the router expected of them",
            "uneven: prompt tokens computed by the worker with the most, above the mean; likewise its busy time",
            "TTFT and time from token to token are simulated; routing was measured, elapsed time of hash, look-up and choice",
            "load given: what computing all prompts would take of the workers' time; busy: what was left of it by hits",
        ],
    )


def _pool_blocks(trace: FleetTrace, size: float) -> int:
    """Blocks of a worker's pool. Never fewer than the longest request has: it could not be served at all."""
    return max(int(trace.num_unique * size / 100), max(len(arrival.keys) for arrival in trace.arrivals))


def _results(case: str, mode: str, trace: FleetTrace, outcome: Outcome) -> Iterator[Result]:
    num_requests = len(trace.arrivals)
    first_token_s = outcome.first_token_s.tolist()
    num_tokens = trace.num_blocks * trace.block_tokens
    mean_busy_s = sum(outcome.busy_s) / len(outcome.busy_s)
    mean_tokens = sum(outcome.prefill_tokens) / len(outcome.prefill_tokens)
    for metric, value, unit in (
        ("prefix hits", 100 * float(outcome.found.sum()) / trace.num_blocks, "%"),
        ("predicted", 100 * outcome.predicted_tokens / num_tokens, "%"),
        ("uneven tokens", 100 * (max(outcome.prefill_tokens) / mean_tokens - 1), "%"),
        ("uneven time", 100 * (max(outcome.busy_s) / mean_busy_s - 1), "%"),
        ("busy", 100 * mean_busy_s / outcome.elapsed_s, "%"),
        ("TTFT mean", sum(first_token_s) / num_requests, "s"),
        ("TTFT p50", percentile(first_token_s, 50), "s"),
        ("TTFT p99", percentile(first_token_s, 99), "s"),
        ("token to token", float(outcome.step_s.mean()) * 1e3, "ms"),
        ("routing", outcome.route_s / num_requests * 1e6, "us"),
    ):
        yield Result(case=case, subject=mode, metric=metric, value=value, unit=unit)
