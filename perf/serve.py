"""How much processor time a streamed token costs the server, and how long its clients wait.

The server runs with the mocker, so what is measured is everything but the model: HTTP, validation, tokenizer, scheduler,
block accounting, detokenizer, SSE; with `--workers`, also the router and what lies between the front and its workers. Its
processor time is read from /proc; the client is another process, this one. Two paces: *unpaced*, where the mocker does not
wait and the server is always busy, and *paced*, where a step takes as long as that of an 8B model on a GPU. NVIDIA's frontend
and its mocker, where they are installed, run beside it and get the same requests in turn.
"""

import argparse
import http.client
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import uvloop
from rich.console import Console

from dynamo.perf.harness import BenchmarkError, percentile, process_cpu_s, process_tree_cpu_s, timed
from dynamo.perf.machine import machine_record
from dynamo.perf.nvidia_peer import NvidiaServing
from dynamo.perf.option_checks import check_above_0, check_at_least_1
from dynamo.perf.report import Report, Result
from dynamo.perf.server_process import ServerProcess
from dynamo.perf.sse_client import Load, StreamRecord, run_load

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "SSE tokens per CPU-second, time to first token and between tokens, with the mocker"

_PACES = ("unpaced", "paced")
_STREAMS = (1, 16, 64)
_TIMEOUT_S = 300.0
_PACED_TOKENS_PER_REQUEST_S = 0.01  # roughly what the mocker takes for a token at default timings

_REFERENCE_SOURCE = (
    "reference: NVIDIA Dynamo 1.6.1, frontend and mocker worker in two processes, same workload, 2-core AMD EPYC VM; "
    "middle of the ranges seen; not measured in this run"
)
# CPU µs a token by pace and number of streams: frontend alone, and frontend with worker.
_REFERENCE_US = {
    ("unpaced", 1): (18.0, 37.0),
    ("unpaced", 16): (11.0, 21.0),
    ("unpaced", 64): (10.0, 18.2),
    ("paced", 1): (185.0, 200.5),
    ("paced", 16): (34.0, 49.5),
    ("paced", 64): (27.5, 43.0),
}


@dataclass(frozen=True, slots=True)
class _Target:
    """A running server.

    Attributes:
        name: of whom it is.
        cpu_s: by what of it is meant, what reads its processor seconds; empty where they cannot be read.
    """

    name: str
    url: str
    model: str
    cpu_s: Mapping[str, Callable[[], float]] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--streams", type=int, action="append", metavar="N", help="concurrent streams, repeatable (default: 1, 16, 64)"
    )
    workload.add_argument("--pace", choices=_PACES, action="append", help="pace, repeatable (default: both)")
    workload.add_argument("--tokens", type=int, default=200, help="tokens of each request")
    workload.add_argument("--total-tokens", type=int, default=100_000, help="tokens of each unpaced case")
    workload.add_argument("--seconds", type=float, default=6.0, help="rough duration of each paced case")
    server = parser.add_argument_group("server")
    server.add_argument(
        "--workers", type=int, default=0, metavar="N", help="a front and N worker processes; 0: all in one process"
    )
    server.add_argument(
        "--dynamo-python",
        type=Path,
        metavar="PATH",
        help="interpreter that has NVIDIA's ai-dynamo; its frontend and mocker are measured in turn",
    )
    server.add_argument("--url", help="measure this server instead of starting one; pace is then its own affair")
    server.add_argument("--server-pid", type=int, metavar="PID", help="with --url: process whose CPU time counts")
    server.add_argument("--api-key", metavar="KEY", help="with --url: key to send")


def run(options: argparse.Namespace, console: Console) -> Report:
    """Measures all paces and numbers of streams.

    Raises:
        BenchmarkError: the server does not start or answer.
    """
    streams: Sequence[int] = options.streams or _STREAMS
    check_at_least_1(streams=min(streams), tokens=options.tokens, total_tokens=options.total_tokens)
    check_above_0(seconds=options.seconds)
    if options.workers < 0:
        raise BenchmarkError(f"--workers must be 0 or more, not {options.workers}")
    _check_url(options)
    machine = machine_record()
    paces = ("as served",) if options.url else options.pace or _PACES
    results: list[Result] = []
    for pace in paces:
        with ExitStack() as stack:
            targets = list(_targets(pace, options, console, stack))
            for target in targets:
                _measure(target, pace, max(streams), options, requests=1)  # connections, imports, first steps
            for num_streams in streams:
                console.print(f"{_case(pace, num_streams)} ...", style="dim")
                for target in targets:
                    results += _measure(target, pace, num_streams, options)
                if len(targets) == 1:
                    results += _reference(pace, num_streams)
    return Report(
        benchmark="serve",
        title=f"Streaming chat completions of {options.tokens} tokens",
        machine=machine,
        parameters={
            "tokens": options.tokens,
            "total_tokens": options.total_tokens,
            "seconds": options.seconds,
            "workers": options.workers,
        },
        results=results,
        notes=(
            "dynamo-kv: device tier only; "
            + (
                f"front: the process that clients talk to; all: with its {options.workers} workers"
                if options.workers
                else "one process, front and engine together"
            )
            + "; CPU time is user and system",
            "events/token: below 1 where tokens that queued up while a socket was busy left as one event",
            "unpaced: the mocker never waits; paced: 6 ms a step, about as an 8B model on a GPU",
            "client and server share the CPUs; ITL: gaps between arrivals of text on one stream",
        ),
    )


def _targets(pace: str, options: argparse.Namespace, console: Console, stack: ExitStack) -> Iterator[_Target]:
    """The servers to measure; `stack` ends those that were started."""
    if options.url:
        url = options.url.rstrip("/").removesuffix("/v1")
        pid = options.server_pid
        cpu_s: dict[str, Callable[[], float]] = {"dynamo-kv": partial(process_tree_cpu_s, pid)} if pid else {}
        yield _Target("dynamo-kv", url, _model_name(url, options.api_key), cpu_s)
        return
    console.print(f"starting the server ({pace}) ...", style="dim")
    speedup = "0" if pace == "unpaced" else "1"
    flags = ["--host-cache", "0", "--disk-cache", "off"]  # moving blocks is `perf store`'s subject
    # As NVIDIA's mocker, which runs as many at a time as come, and whose steps take the same time for all of them.
    flags += ["--mocker-token-time", "0", "--max-running", str(max(64, *(options.streams or _STREAMS)))]
    if options.workers:
        flags += ["--workers", str(options.workers)]
    server = stack.enter_context(ServerProcess("--engine", "mocker", "--speedup", speedup, *flags))
    cpu_s = {"dynamo-kv": partial(process_tree_cpu_s, server.pid)}
    if options.workers:
        cpu_s = {
            "dynamo-kv, front": partial(process_cpu_s, server.pid),
            "dynamo-kv, all": partial(process_tree_cpu_s, server.pid),
        }
    yield _Target("dynamo-kv", server.url, _model_name(server.url, None), cpu_s)
    if options.dynamo_python:
        peer = stack.enter_context(NvidiaServing(options.dynamo_python, "100000" if pace == "unpaced" else "1"))
        cpu_s = {
            "NVIDIA Dynamo, frontend": partial(process_cpu_s, peer.frontend_pid),
            "NVIDIA Dynamo, all": lambda: process_cpu_s(peer.frontend_pid) + process_cpu_s(peer.worker_pid),
        }
        yield _Target("NVIDIA Dynamo", peer.url, peer.model, cpu_s)


def _measure(
    target: _Target, pace: str, num_streams: int, options: argparse.Namespace, requests: int | None = None
) -> list[Result]:
    if requests is None:
        if pace == "unpaced" or options.url:
            requests = options.total_tokens // (options.tokens * num_streams)
        else:
            requests = round(options.seconds / (options.tokens * _PACED_TOKENS_PER_REQUEST_S))
    load = Load(
        url=target.url,
        model=target.model,
        num_streams=num_streams,
        num_requests=max(1, requests),
        num_tokens=options.tokens,
        api_key=options.api_key,
        timeout_s=_TIMEOUT_S,
    )
    records: list[StreamRecord] = []

    def send() -> None:
        records.extend(uvloop.run(run_load(load)))

    before = {subject: read() for subject, read in target.cpu_s.items()}
    wall_s = timed(send).wall_s
    cpu_s = {subject: read() - before[subject] for subject, read in target.cpu_s.items()}
    return list(_results(_case(pace, num_streams), target.name, records, wall_s, cpu_s))


def _results(
    case: str, name: str, records: Sequence[StreamRecord], wall_s: float, cpu_s: Mapping[str, float]
) -> Iterator[Result]:
    tokens = sum(record.num_tokens for record in records)
    events = sum(record.num_events for record in records)
    if not tokens:
        raise BenchmarkError("the server reported no completion tokens; it must support stream_options.include_usage")
    for subject, seconds in cpu_s.items():
        if seconds:
            yield Result(case=case, subject=subject, metric="tokens", value=tokens / seconds, unit="/CPU-s")
            yield Result(case=case, subject=subject, metric="CPU", value=1e6 * seconds / tokens, unit="µs/token")
    gaps = [gap for record in records for gap in record.gaps_s]
    waits = [record.ttft_s for record in records]
    numbers = [
        ("throughput", tokens / wall_s, "tokens/s"),
        ("requests", len(records) / wall_s, "/s"),
        ("events", events / tokens, "/token"),
    ]
    numbers += [(f"TTFT p{p}", 1e3 * percentile(waits, p), "ms") for p in (50, 99)]
    if gaps:
        numbers += [(f"ITL p{p}", 1e3 * percentile(gaps, p), "ms") for p in (50, 99)]
    subject = next(iter(cpu_s), name)
    for metric, value, unit in numbers:
        yield Result(case=case, subject=subject, metric=metric, value=value, unit=unit)


def _reference(pace: str, num_streams: int) -> Iterator[Result]:
    for subject, us in zip(
        ("Dynamo frontend", "Dynamo frontend+worker"), _REFERENCE_US.get((pace, num_streams), ()), strict=False
    ):
        for metric, value, unit in (("tokens", 1e6 / us, "/CPU-s"), ("CPU", us, "µs/token")):
            yield Result(
                case=_case(pace, num_streams),
                subject=subject,
                metric=metric,
                value=value,
                unit=unit,
                source=_REFERENCE_SOURCE,
            )


def _check_url(options: argparse.Namespace) -> None:
    if options.url is None:
        for flag, value in (("--server-pid", options.server_pid), ("--api-key", options.api_key)):
            if value is not None:
                raise BenchmarkError(f"{flag} is of the server that --url names; give --url, or leave it out")
        return
    try:
        address = urlsplit(options.url)
        is_usable = address.scheme == "http" and bool(address.hostname) and address.port != 0
    except ValueError:  # no port, or no address in brackets
        is_usable = False
    if not is_usable:
        raise BenchmarkError(f"--url {options.url} must be of the form http://HOST:PORT")
    if options.server_pid is not None:
        check_at_least_1(server_pid=options.server_pid)
        try:
            process_cpu_s(options.server_pid)
        except ProcessLookupError:
            raise BenchmarkError(f"--server-pid {options.server_pid} is no process of this machine") from None


def _case(pace: str, num_streams: int) -> str:
    return f"{pace}, {num_streams} stream{'s' if num_streams > 1 else ''}"


def _model_name(url: str, api_key: str | None) -> str:
    """The first model the server lists."""
    address = urlsplit(url)
    assert address.hostname is not None, "checked with the options"
    connection = http.client.HTTPConnection(address.hostname, address.port or 80, timeout=10)
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        connection.request("GET", "/v1/models", headers=headers)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:  # the latter from what is no HTTP server
        raise BenchmarkError(f"{url}/v1/models does not answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise BenchmarkError(f"{url}/v1/models answered {response.status}: {body[:200].decode(errors='replace')}")
    return str(json.loads(body)["data"][0]["id"])
