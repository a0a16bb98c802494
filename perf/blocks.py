"""What the bookkeeping of one long sequence costs: processor time to hash, open, commit and close it. No bytes move.

The cache has a device pool only, of blocks of 128 bytes. Three cases: *cold*, a sequence nobody has seen, in a pool with
room; *evicting*, the same in a pool full of cached blocks, which is how a server runs; *cached*, the same tokens again.
vLLM's KVCacheManager does the same work, measured in turn with ours where its interpreter is given.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from rich.console import Console

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.hashing import block_keys, chain_root
from dynamo.perf.harness import BenchmarkError, median, quiet_collector
from dynamo.perf.machine import machine_record
from dynamo.perf.peer_process import PeerProcess
from dynamo.perf.report import MEASURED, Report, Result

__all__ = ["CASES", "SUMMARY", "CacheTimer", "VllmPeer", "add_arguments", "run"]

SUMMARY = "CPU time to hash, open, commit and close a long sequence, against vLLM's block manager"

CASES = ("cold", "evicting", "cached")

Sample = dict[str, float]
"""Microseconds of processor time by step."""

_STEPS = ("hash", "open", "commit", "close", "total")
_BLOCK_SIZE = 16
_ROUNDS = 3  # ours and the peer take turns, so that a busy moment of the machine does not hit one alone

_REFERENCE_SOURCE = (
    "reference: vLLM 0.33.0 KVCacheManager, 512 blocks of 16 tokens, 2-core AMD EPYC VM; not measured in this run"
)
_REFERENCE_US: dict[str, Sample] = {
    "cold": {"hash": 1020, "open": 578, "close": 71, "total": 1669},
    "cached": {"hash": 1020, "open": 463, "close": 71, "total": 1554},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    workload = parser.add_argument_group("workload")
    workload.add_argument("--tokens", type=int, default=8192, help="tokens of the sequence")
    workload.add_argument("--blocks", type=int, default=4096, help="blocks of the device pool")
    workload.add_argument("--repeats", type=int, default=50, help="runs of each case; medians are printed")
    peer = parser.add_argument_group("peer")
    peer.add_argument("--vllm-python", metavar="PATH", type=Path, help="interpreter that has vLLM; measured in turn")
    peer.add_argument(
        "--vllm-hash", choices=("sha256", "xxhash"), default="sha256", help="vLLM's block hash; sha256 is its default"
    )


def run(options: argparse.Namespace, console: Console) -> Report:
    """Measures all cases.

    Raises:
        BenchmarkError: the sizes do not fit together, or the peer does not run.
    """
    num_blocks = -(-options.tokens // _BLOCK_SIZE)
    if options.tokens < 2 or options.repeats < 1 or options.blocks < 2 * num_blocks:
        raise BenchmarkError(
            f"--tokens {options.tokens} are {num_blocks} blocks and --blocks is {options.blocks}: give at least 2 tokens, "
            f"1 repeat and {2 * num_blocks} blocks"
        )
    machine = machine_record()
    runs_per_round = -(-options.repeats // _ROUNDS)
    ours: dict[str, list[Sample]] = {case: [] for case in CASES}
    theirs: dict[str, list[Sample]] = {case: [] for case in CASES}
    peer_name = ""
    with CacheTimer(options.blocks, options.tokens) as timer, quiet_collector():
        if options.vllm_python is None:
            for case in CASES:
                console.print(f"{case} ...", style="dim")
                ours[case] += timer.run(case, options.repeats)
        else:
            with VllmPeer(options.vllm_python, options.blocks, options.tokens, options.vllm_hash) as peer:
                peer_name = peer.name
                for turn in range(_ROUNDS):
                    console.print(f"round {turn + 1} of {_ROUNDS} ...", style="dim")
                    for case in CASES:
                        ours[case] += timer.run(case, runs_per_round)
                        theirs[case] += peer.run(case, runs_per_round)
    return Report(
        benchmark="blocks",
        title=f"CPU time of one sequence of {options.tokens:,} tokens ({num_blocks} blocks of {_BLOCK_SIZE})",
        machine=machine,
        parameters={"tokens": options.tokens, "blocks": options.blocks, "repeats": len(ours["cold"])},
        results=_results(ours, theirs, peer_name, is_reference_size=options.tokens == 8192),
        notes=(
            "medians of thread CPU time; open hashes the tokens, and hash shows that part timed by itself",
            "vLLM: open is get_computed_blocks + allocate_slots, which also caches the blocks; close is free; "
            "making its Request is not counted",
        ),
    )


class CacheTimer:
    """Puts sequences through a device-only cache and times each step."""

    def __init__(self, num_blocks: int, num_tokens: int) -> None:
        spec = KVSpec(model="perf", num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float32)
        self._cache = KVCache(spec, device="cpu", device_blocks=num_blocks)
        self._root = chain_root(spec.fingerprint, spec.block_size)
        self._num_tokens = num_tokens
        self._random = random.Random(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.close()

    def run(self, case: str, repeats: int) -> list[Sample]:
        """Times `case` `repeats` times, after one run that only warms up."""
        tokens = self._new_tokens()
        self._cache.clear()
        if case == "cached":
            self._one(tokens, num_cached=0)
        elif case == "evicting":
            for _ in range(-(-self._cache.num_device_blocks * _BLOCK_SIZE // self._num_tokens)):
                self._one(self._new_tokens(), num_cached=0)
        samples = []
        for _ in range(repeats + 1):
            if case == "cold":
                self._cache.clear()
            if case != "cached":
                tokens = self._new_tokens()
            num_cached = (self._num_tokens - 1) // _BLOCK_SIZE * _BLOCK_SIZE if case == "cached" else 0
            samples.append(self._one(tokens, num_cached))
        return samples[1:]

    def _new_tokens(self) -> list[int]:
        return [self._random.randrange(1 << 17) for _ in range(self._num_tokens)]

    def _one(self, tokens: list[int], num_cached: int) -> Sample:
        clock: Callable[[], int] = time.thread_time_ns
        t0 = clock()
        block_keys(tokens, _BLOCK_SIZE, self._root)
        t1 = clock()
        sequence = self._cache.open(tokens)
        sequence.wait()
        t2 = clock()
        sequence.commit()
        t3 = clock()
        sequence.close()
        t4 = clock()
        if sequence.num_cached_tokens != num_cached:
            raise RuntimeError(f"{sequence.num_cached_tokens} tokens were cached where {num_cached} were expected")
        steps = {"hash": t1 - t0, "open": t2 - t1, "commit": t3 - t2, "close": t4 - t3, "total": t4 - t1}
        return {step: ns / 1000 for step, ns in steps.items()}


class VllmPeer:
    """vLLM's KVCacheManager in a process and environment of its own; see `vllm_peer.py` for the protocol."""

    def __init__(self, python: Path, num_blocks: int, num_tokens: int, hash_name: str) -> None:
        script = Path(__file__).with_name("vllm_peer.py")
        sizes = (f"--blocks={num_blocks}", f"--tokens={num_tokens}", f"--block-size={_BLOCK_SIZE}")
        self._process = PeerProcess(
            "vLLM",
            "vllm",
            "--vllm-python",
            [python, "-P", script, *sizes, f"--hash={hash_name}"],
            {"VLLM_LOGGING_LEVEL": "ERROR"},
        )
        self.name = f"vLLM {self._process.hello['vllm']} ({self._process.hello['hash']})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, case: str, repeats: int) -> list[Sample]:
        """Times `case` as `CacheTimer.run` does."""
        return [
            {
                "hash": sample["hash"] / 1000,
                "open": (sample["match"] + sample["allocate"]) / 1000,
                "close": sample["free"] / 1000,
                "total": sum(sample.values()) / 1000,
            }
            for sample in self._process.ask({"case": case, "repeats": repeats})
        ]

    def close(self) -> None:
        """Ends the process. Idempotent."""
        self._process.close()


def _results(
    ours: dict[str, list[Sample]], theirs: dict[str, list[Sample]], peer_name: str, *, is_reference_size: bool
) -> list[Result]:
    results: list[Result] = []
    for case in CASES:
        medians = _medians(ours[case])
        total_us = medians["total"]
        results += _rows(case, "dynamo-kv", medians, total_us, len(ours[case]))
        if theirs[case]:
            results += _rows(case, peer_name, _medians(theirs[case]), total_us, len(theirs[case]))
        if case in _REFERENCE_US and is_reference_size:
            results += _rows(case, "vLLM 0.33.0 (sha256)", _REFERENCE_US[case], total_us, None, _REFERENCE_SOURCE)
    return results


def _rows(
    case: str, subject: str, steps: Sample, our_total_us: float, samples: int | None, source: str = MEASURED
) -> Iterator[Result]:
    numbers = [(step, steps[step], "µs") for step in _STEPS if step in steps]
    numbers.append(("time", steps["total"] / our_total_us, "of ours"))
    for metric, value, unit in numbers:
        yield Result(case=case, subject=subject, metric=metric, value=value, unit=unit, samples=samples, source=source)


def _medians(samples: Sequence[Sample]) -> Sample:
    return {step: median([sample[step] for sample in samples]) for step in samples[0]}
