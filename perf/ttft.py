"""Time to first token of one long prompt: computed, and from every tier, through the real server with a real model.

Each tier is isolated by sending other prompts until the prompt is gone from the tiers above: from device memory straight
away, from host after the device pool was overwritten, from disk after a small host tier was overwritten too, and once more
from disk after `kill -9` and a restart. Texts are compared: what came from a tier must continue as what was computed.
"""

import argparse
import http.client
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from dynamo.perf.harness import BenchmarkError, median
from dynamo.perf.machine import MachineRecord, machine_record
from dynamo.perf.option_checks import check_above_0, check_folder
from dynamo.perf.report import Report, Result
from dynamo.perf.server_process import ServerProcess
from dynamo.perf.throttle import ThrottledTimes, measure_throttled, throttled_reads

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "time to first token of a long prompt: computed, and from device, host and disk"

_BLOCK_SIZE = 16
_ANSWER_TOKENS = 16
_TIMEOUT_S = 300.0
_WARM_UP = 9_999  # number of a prompt that is not measured


@dataclass(frozen=True, slots=True)
class _Answer:
    ttft_s: float
    text: str
    num_cached_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    workload = parser.add_argument_group("workload")
    workload.add_argument("--model", metavar="FOLDER", help="model folder; the demo model if left out")
    workload.add_argument("--prompt-tokens", type=int, default=4096, help="tokens of the prompt")
    workload.add_argument("--rounds", type=int, default=5, help="measurements of each case; the median is shown")
    workload.add_argument(
        "--path", metavar="DIR", help="where the disk tier's folder is made (default: here)", default="."
    )
    workload.add_argument("--device-cache", default="16MiB", help="size that holds one prompt, not several")
    workload.add_argument("--small-host-cache", default="1MiB", help="size that does not hold the prompt")
    workload.add_argument(
        "--throttle",
        metavar="MB/S",
        nargs="+",
        type=float,
        help="instead: cached beside computed with a disk that falls to these speeds, and one that does not",
    )


def run(options: argparse.Namespace, console: Console) -> Report:
    """Measures all cases.

    Raises:
        BenchmarkError: a server does not start, a text differs, or a prefix did not come from where it should.
    """
    if options.prompt_tokens < 2 * _BLOCK_SIZE or options.rounds < 1:
        raise BenchmarkError(f"--prompt-tokens must be at least {2 * _BLOCK_SIZE} and --rounds at least 1")
    check_folder(Path(options.path))
    for rate in options.throttle or ():
        check_above_0(throttle=rate)
    machine = machine_record()
    if options.throttle:
        return _run_throttled(options, machine, console)
    with tempfile.TemporaryDirectory(prefix="dynamo-ttft-", dir=options.path) as folder:
        cases = _measure(options, folder, console)
    computed_s = median([answer.ttft_s for answer in cases["computed"]])
    results: list[Result] = []
    for case, answers in cases.items():
        ttft_s = median([answer.ttft_s for answer in answers])
        for metric, value, unit in (
            ("TTFT", 1e3 * ttft_s, "ms"),
            ("of computing", 100 * ttft_s / computed_s, "%"),
            ("cached", answers[0].num_cached_tokens, "tokens"),
        ):
            results.append(Result(case=case, subject="dynamo-kv", metric=metric, value=value, unit=unit))
    return Report(
        benchmark="ttft",
        title=f"Time to first token of a prompt of {options.prompt_tokens} tokens",
        machine=machine,
        parameters={"prompt_tokens": options.prompt_tokens, "rounds": options.rounds, "model": options.model or "demo"},
        results=results,
        notes=("medians; every answer's text equals the computed one's",),
    )


def _run_throttled(options: argparse.Namespace, machine: MachineRecord, console: Console) -> Report:
    results: list[Result] = []
    engines = {
        "model": {"engine.threads": "1"} | ({"model.path": options.model} if options.model else {}),
        "mocker": {"engine.engine": "mocker", "engine.threads": "1"},
    }
    with throttled_reads() as throttle:
        for engine, flags in engines.items():
            for rate in (None, *sorted(options.throttle, reverse=True)):
                name = f"{engine}, full speed" if rate is None else f"{engine}, {rate:g} MB/s"
                console.print(f"{name} ...", style="dim")
                with tempfile.TemporaryDirectory(prefix="dynamo-ttft-", dir=options.path) as folder:
                    sudden, known = measure_throttled(
                        flags,
                        Path(folder),
                        throttle,
                        bytes_per_s=None if rate is None else 1e6 * rate,
                        prompt_tokens=options.prompt_tokens,
                        rounds=options.rounds,
                        prompts_after=2,
                    )
                results += _throttled_results(f"{name}, sudden", sudden)
                results += _throttled_results(f"{name}, known", known)
    return Report(
        benchmark="ttft",
        title=f"Time to first token of a prompt of {options.prompt_tokens} tokens on a slow disk",
        machine=machine,
        parameters={
            "prompt_tokens": options.prompt_tokens,
            "rounds": options.rounds,
            "model": options.model or "demo",
            "throttle": " ".join(f"{rate:g}" for rate in options.throttle),
        },
        results=results,
        notes=(
            "medians; sudden: the first prompt after the disk fell to that speed, known: the two after it",
            "of computing: cached over computed, pair by pair, in turns on the same engine",
            "regret: of a prompt on average, as the planner sees it afterwards",
        ),
    )


def _throttled_results(case: str, times: ThrottledTimes) -> list[Result]:
    computed_s, cached_s = median(times.computed_s), median(times.cached_s)
    ratios = [cached / computed for cached, computed in zip(times.cached_s, times.computed_s, strict=True)]
    values: list[tuple[str, float, str]] = [
        ("computed TTFT", 1e3 * computed_s, "ms"),
        ("cached TTFT", 1e3 * cached_s, "ms"),
        ("of computing", 100 * median(ratios), "%"),
        ("cached", median(times.num_cached_tokens), "tokens"),
        *((kind, count, "times") for kind, count in sorted(times.decisions.items())),
        ("regret", 1e3 * times.regret_s / len(times.cached_s), "ms"),
    ]
    return [Result(case=case, subject="dynamo-kv", metric=m, value=value, unit=unit) for m, value, unit in values]


def _measure(options: argparse.Namespace, folder: str, console: Console) -> dict[str, list[_Answer]]:
    cases: dict[str, list[_Answer]] = {"computed": [], "device": [], "host": []}
    common = [*([options.model] if options.model else []), "--device-cache", options.device_cache]
    common += ["--disk-cache", f"{folder}/kv:1GiB", "--load-patience", "off"]  # each tier is measured, not chosen
    console.print("computed, device, host ...", style="dim")
    with ServerProcess(*common, "--host-cache", "1GiB") as server:
        client = _Client(server.url, options.prompt_tokens)
        client.ask(_WARM_UP)  # the first request pays for what is done once
        for round_number in range(options.rounds):
            cases["computed"].append(client.ask(round_number))
            cases["device"].append(client.ask(round_number))
            client.displace()
            cases["host"].append(client.ask(round_number))
        client.settle()
    for case in ("disk", "disk, after kill -9"):
        console.print(f"{case} ...", style="dim")
        with ServerProcess(*common, "--host-cache", options.small_host_cache) as server:
            client = _Client(server.url, options.prompt_tokens)
            client.ask(_WARM_UP)
            cases[case] = [client.ask(round_number) for round_number in range(options.rounds)]
            client.settle()  # what waits for the disk is lost with the process
            server.kill()
    _check(cases, options.prompt_tokens)
    return cases


def _check(cases: dict[str, list[_Answer]], prompt_tokens: int) -> None:
    whole = (prompt_tokens - 1) // _BLOCK_SIZE * _BLOCK_SIZE
    for case, answers in cases.items():
        for answer, computed in zip(answers, cases["computed"], strict=True):
            if answer.text != computed.text:
                raise BenchmarkError(
                    f"{case}: the text differs from the computed one: {answer.text!r}, {computed.text!r}"
                )
            wanted = 0 if case == "computed" else whole
            if answer.num_cached_tokens != wanted:
                raise BenchmarkError(f"{case}: {answer.num_cached_tokens} tokens came from the cache, not {wanted}")


class _Client:
    """Asks one server, over one connection, for greedy continuations of random prompts."""

    def __init__(self, url: str, prompt_tokens: int) -> None:
        address = urlsplit(url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_TIMEOUT_S)
        self._prompt_tokens = prompt_tokens
        self._others = iter(range(10_000, 20_000))
        model = json.loads(self._send("GET", "/v1/models"))["data"][0]
        self._model, limit = model["id"], model["max_model_len"] - _ANSWER_TOKENS
        if prompt_tokens > limit:
            raise BenchmarkError(
                f"--prompt-tokens {prompt_tokens} does not fit into the {model['max_model_len']} tokens that the model and "
                f"--device-cache allow, with {_ANSWER_TOKENS} for the answer; give at most {limit}"
            )

    def ask(self, seed: int) -> _Answer:
        """Streams 16 tokens after the prompt that `seed` names."""
        prompt = random.Random(seed).choices(range(300, 2000), k=self._prompt_tokens)
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": _ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body)
        started_s = time.perf_counter()
        self._connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        if response.status != 200:
            raise BenchmarkError(
                f"the server answered {response.status}: {response.read(300).decode(errors='replace')}"
            )
        first = response.readline()
        ttft_s = time.perf_counter() - started_s
        events = [json.loads(line[6:]) for line in (first, *response) if line[:7] == b"data: {"]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        return _Answer(ttft_s, text, events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])

    def displace(self) -> None:
        """Fills the device pool with other prompts."""
        for _ in range(3):
            self.ask(next(self._others))

    def settle(self) -> None:
        """Waits until everything offered to the disk tier is there."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            pending = [line for line in self._metrics() if line.startswith("dynamo_kvcache_pending")]
            if all(line.endswith(" 0.0") for line in pending):
                return
            time.sleep(0.1)
        raise BenchmarkError(f"offloading did not end within {_TIMEOUT_S:g} s")

    def _metrics(self) -> Iterator[str]:
        yield from self._send("GET", "/metrics").decode().splitlines()

    def _send(self, method: str, path: str) -> bytes:
        self._connection.request(method, path)
        return self._connection.getresponse().read()
