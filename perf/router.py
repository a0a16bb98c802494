"""What the router's index costs: to hash a prompt and find out who holds it, to apply events, to forget a worker; and memory.

NVIDIA's ai-dynamo keeps a RadixTree in Rust behind Python; where its interpreter is given, it does the same work in its own
process, in turn with ours, and must find the same scores.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from dynamo.perf.harness import BenchmarkError, median, quiet_collector
from dynamo.perf.machine import machine_record
from dynamo.perf.peer_process import PeerProcess
from dynamo.perf.report import Report, Result
from dynamo.perf.router_timer import LookUp, RouterTimer, memory_bytes, route_times_ns
from dynamo.perf.router_workload import BLOCK_SIZE, CASES, CHAIN_BLOCKS, RouterWorkload

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "CPU time and memory of the router's index, against the RadixTree of ai-dynamo"

_OURS = "dynamo-kv"
_HOLE_CASE = "hit, one with a hole"
_CALLS = 20
_ROUTE_CALLS = 50
_ROUTE_WORKERS = (8, 64, 512)
_NOTES = (
    "medians of processor time of the whole process; hit: 8 workers at 8 depths, one at the end; partial: the same "
    "over the first quarter; worst: every worker at a depth of its own; miss: nobody",
    f"events: chains of {CHAIN_BLOCKS} blocks, half of them at one worker and half at 8; ours from lists of keys, or "
    "from the bytes that workers send (msgpack, one event a message); ai-dynamo from JSON",
    "ours takes tokens as a buffer of u32, ai-dynamo as a list; its hash column makes block hashes only",
    "memory: what a fresh process grows by, for each (worker, block) pair",
    "route: new prompts, half of each held by a tenth of the workers; predicted, booked, and freed again",
)


@dataclass(slots=True)
class _Samples:
    """What was measured of one side, in nanoseconds and bytes.

    Attributes:
        store, remove: of all events.
        wire: of all events, from the bytes that workers send.
        clear: of one worker.
        look_ups: by prompt; one entry for each round.
        memory: by number of (worker, block) pairs, what the process grew by.
    """

    store: list[float] = field(default_factory=list)
    wire: list[float] = field(default_factory=list)
    remove: list[float] = field(default_factory=list)
    clear: list[float] = field(default_factory=list)
    look_ups: dict[tuple[str, int], list[LookUp]] = field(default_factory=dict)
    memory: dict[int, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    workload = parser.add_argument_group("workload")
    workload.add_argument("--workers", type=int, default=64, help="workers")
    workload.add_argument("--blocks", type=int, default=1_000_000, help="(worker, block) pairs in the index")
    workload.add_argument(
        "--prompts", metavar="BLOCKS", type=int, nargs="+", default=[512, 2048], help="lengths of the prompts looked up"
    )
    workload.add_argument("--repeats", type=int, default=5, help="runs of each kind; medians are printed")
    peer = parser.add_argument_group("peer")
    peer.add_argument(
        "--dynamo-python", metavar="PATH", type=Path, help="interpreter that has ai-dynamo-runtime; measured in turn"
    )


def run(options: argparse.Namespace, console: Console) -> Report:
    """Measures everything.

    Raises:
        BenchmarkError: the sizes do not fit together, the peer does not run, or it finds other scores.
    """
    _check(options)
    machine = machine_record()
    workload = RouterWorkload.make(options.workers, options.blocks, options.prompts)
    ours, theirs = _Samples(), _Samples()
    with tempfile.TemporaryDirectory(prefix="dynamo-perf-router-") as folder, quiet_collector():
        name, extra = _measure_index(options, workload, Path(folder), ours, theirs, console)
        extra += _measure_memory(options, Path(folder), ours, theirs, console)
    extra += _measure_routing(options.prompts, options.repeats, console)
    return Report(
        benchmark="router",
        title=f"A router's index: {options.workers} workers, {workload.num_blocks:,} (worker, block) pairs, "
        f"{workload.num_different:,} different blocks of {BLOCK_SIZE} tokens",
        machine=machine,
        parameters={
            "workers": options.workers,
            "blocks": options.blocks,
            "prompts": " ".join(map(str, options.prompts)),
            "repeats": options.repeats,
        },
        results=[*_results(workload, ours, theirs, name), *extra],
        notes=_NOTES,
    )


def _check(options: argparse.Namespace) -> None:
    least = CHAIN_BLOCKS * options.workers
    if options.workers < 2 or options.blocks < least or min(options.prompts) < 8 or options.repeats < 1:
        raise BenchmarkError(
            f"--workers {options.workers}, --blocks {options.blocks}, --prompts {min(options.prompts)}, --repeats "
            f"{options.repeats}: give at least 2 workers, {CHAIN_BLOCKS} blocks for each, 8 blocks a prompt and 1 repeat"
        )


def _measure_index(
    options: argparse.Namespace,
    workload: RouterWorkload,
    folder: Path,
    ours: _Samples,
    theirs: _Samples,
    console: Console,
) -> tuple[str | None, list[Result]]:
    """Measures one index of the whole workload, in turn with the peer's; the peer's name, and what is of ours alone."""
    timer, repeats = RouterTimer(workload), options.repeats
    name = peer = None
    try:
        if options.dynamo_python is not None:
            peer = _peer(options.dynamo_python, workload, folder / "workload")
            name = f"ai-dynamo {peer.hello['version']}"
        _measure_events(timer, peer, ours, theirs, repeats, console)
        _measure_look_ups(workload, timer, peer, ours, theirs, repeats, console)
        return name, _measure_forgetting(workload, timer, peer, ours, theirs, repeats, console)
    finally:
        if peer is not None:
            peer.close()


def _peer(python: Path, workload: RouterWorkload, path: Path) -> PeerProcess:
    workload.write(path)
    script = Path(__file__).with_name("dynamo_peer.py")
    return PeerProcess(
        "ai-dynamo", "dynamo._core", "--dynamo-python", [python, "-P", script, "--workload", path], timeout_s=600.0
    )


def _measure_events(
    timer: RouterTimer, peer: PeerProcess | None, ours: _Samples, theirs: _Samples, repeats: int, console: Console
) -> None:
    for turn in range(repeats):
        console.print(f"events, round {turn + 1} of {repeats} ...", style="dim")
        ours.wire.append(timer.store_from_wire())
        ours.remove.append(timer.remove())
        ours.store.append(timer.store())
        if peer is not None:
            if turn:
                theirs.remove.append(peer.ask({"do": "remove"})["cpu_ns"])
            answer = peer.ask({"do": "store"})
            theirs.store.append(answer["cpu_ns"])
    timer.hold()
    if peer is not None:
        peer.ask({"do": "hold"})


def _measure_look_ups(
    workload: RouterWorkload,
    timer: RouterTimer,
    peer: PeerProcess | None,
    ours: _Samples,
    theirs: _Samples,
    repeats: int,
    console: Console,
) -> None:
    for turn in range(repeats):
        console.print(f"look-ups, round {turn + 1} of {repeats} ...", style="dim")
        for number, prompt in enumerate(workload.prompts):
            case = (prompt.case, prompt.num_blocks)
            found = timer.match(prompt, _CALLS, repeats)
            ours.look_ups.setdefault(case, []).append(found)
            if found.scores != prompt.depths:
                raise RuntimeError(f"{case}: the index found {found.scores}, not {prompt.depths}")
            if peer is not None:
                answer = peer.ask({"do": "match", "prompt": number, "calls": _CALLS, "repeats": repeats})
                scores = {int(worker): score for worker, score in answer.pop("scores").items()}
                if scores != found.scores:
                    raise BenchmarkError(f"{case}: ai-dynamo found {scores}, and our index {found.scores}")
                theirs.look_ups.setdefault(case, []).append(LookUp(**answer, scores=scores))


def _measure_forgetting(
    workload: RouterWorkload,
    timer: RouterTimer,
    peer: PeerProcess | None,
    ours: _Samples,
    theirs: _Samples,
    repeats: int,
    console: Console,
) -> list[Result]:
    """Clears and replaces workers; measures look-ups with a hole before that. The indexes are of no use afterwards."""
    console.print("holes, clearing, snapshots ...", style="dim")
    for prompt in workload.prompts:
        if prompt.case == "hit":
            timer.make_hole(prompt)
            case = (_HOLE_CASE, prompt.num_blocks)
            ours.look_ups[case] = [timer.match(prompt, _CALLS, repeats) for _ in range(repeats)]
    snapshots, sweeps = [], []
    for turn in range(repeats):
        worker = 1 + turn % (workload.num_workers - 1)
        ours.clear.append(timer.clear(worker))
        elapsed, entries = timer.sweep()
        sweeps.append(elapsed / max(1, entries))
        elapsed, blocks = timer.replace(worker)
        snapshots.append(elapsed / max(1, blocks))
        if peer is not None:
            theirs.clear.append(peer.ask({"do": "clear", "worker": worker})["cpu_ns"])
    return [
        Result(case=case, subject=_OURS, metric="CPU", value=median(values), unit="ns/block", samples=repeats)
        for case, values in (("sweep after a clear", sweeps), ("snapshot taken over", snapshots))
    ]


def _measure_memory(
    options: argparse.Namespace, folder: Path, ours: _Samples, theirs: _Samples, console: Console
) -> Iterator[Result]:
    for num_blocks in sorted({max(options.blocks // 10, CHAIN_BLOCKS * options.workers), options.blocks}):
        console.print(f"memory of {num_blocks:,} blocks ...", style="dim")
        grown, counted = memory_bytes(options.workers, num_blocks)
        workload = RouterWorkload.make(options.workers, num_blocks, [])
        ours.memory[workload.num_blocks] = grown / workload.num_blocks
        yield Result(
            case=f"memory, {workload.num_blocks:,} blocks",
            subject=f"{_OURS}, as it counts itself",
            metric="memory",
            value=counted / workload.num_blocks,
            unit="B/block",
        )
        if options.dynamo_python is not None:
            with _peer(options.dynamo_python, workload, folder / "workload") as peer:
                theirs.memory[workload.num_blocks] = peer.ask({"do": "store"})["grown_bytes"] / workload.num_blocks


def _measure_routing(prompt_blocks: Sequence[int], repeats: int, console: Console) -> Iterator[Result]:
    for num_workers in _ROUTE_WORKERS:
        console.print(f"routing among {num_workers} workers ...", style="dim")
        times = route_times_ns(num_workers, min(prompt_blocks), _ROUTE_CALLS, repeats)
        for metric, part in (
            ("hash", "hash"),
            ("look-up", "look_up"),
            ("choice", "choice"),
            ("tokens to answer", "all"),
        ):
            yield Result(
                case=f"route {min(prompt_blocks)} blocks, {num_workers} workers",
                subject=_OURS,
                metric=metric,
                value=median(times[part]) / 1000,
                unit="µs",
                samples=repeats,
            )


def _results(workload: RouterWorkload, ours: _Samples, theirs: _Samples, name: str | None) -> Iterator[Result]:
    both = [(_OURS, ours)] + ([(name, theirs)] if name is not None else [])
    for num_blocks in dict.fromkeys(prompt.num_blocks for prompt in workload.prompts):
        for case in (*CASES, _HOLE_CASE):
            for subject, samples in both:
                rounds = samples.look_ups.get((case, num_blocks))
                if rounds:
                    yield from _look_up_rows(
                        f"{case}, {num_blocks} blocks", subject, rounds, ours.look_ups[case, num_blocks]
                    )
    for case, attribute in (("store", "store"), ("store, from the wire", "wire"), ("remove", "remove")):
        for subject, samples in both:
            values: list[float] = getattr(samples, attribute if subject == _OURS or attribute != "wire" else "store")
            if values:
                yield Result(
                    case=case,
                    subject=subject,
                    metric="events",
                    value=1000 * workload.num_blocks / median(values),
                    unit="Mblocks/s",
                    samples=len(values),
                )
    for subject, samples in both:
        yield Result(
            case="clear a worker",
            subject=subject,
            metric="forget",
            value=median(samples.clear) / 1000,
            unit="µs",
            samples=len(samples.clear),
        )
        for num_blocks, value in samples.memory.items():
            yield Result(
                case=f"memory, {num_blocks:,} blocks", subject=subject, metric="memory", value=value, unit="B/block"
            )


def _look_up_rows(case: str, subject: str, rounds: Sequence[LookUp], our_rounds: Sequence[LookUp]) -> Iterator[Result]:
    our_total = median([median(one.both) for one in our_rounds])
    for metric, attribute in (("hash", "hash"), ("look-up", "look_up"), ("tokens to answer", "both")):
        value = median([median(getattr(one, attribute)) for one in rounds])
        yield Result(case=case, subject=subject, metric=metric, value=value / 1000, unit="µs", samples=len(rounds))
    total = median([median(one.both) for one in rounds])
    yield Result(
        case=case, subject=subject, metric="time", value=total / our_total, unit="of ours", samples=len(rounds)
    )
