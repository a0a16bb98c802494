"""Times the RadixTree of NVIDIA's ai-dynamo on the workload of `dynamo.perf router`. Runs in its own environment, as a script.

That package installs a `dynamo` of its own, so nothing of ours may be on this interpreter's path; the workload comes as a file.
One JSON value per line on standard input and output:

    ← {"version": version}                                                   once, when it is ready
    → {"do": "store"}                  ← {"cpu_ns": n, "grown_bytes": n}     a new tree, and every event applied
    → {"do": "hold"}                   ← {}                                  the prompts' holders
    → {"do": "match", "prompt": i, "calls": n, "repeats": n}
                                       ← {"hash": [ns], "look_up": [ns], "both": [ns], "scores": {worker: blocks}}
    → {"do": "clear", "worker": w}     ← {"cpu_ns": n}
    → {"do": "remove"}                 ← {"cpu_ns": n}                       every chain again, last block first

All times are processor time of the process, since the tree works in a thread of its own.
"""

import argparse
import gc
import importlib
import json
import os
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["Peer"]

_BATCH_EVENTS = 64  # their JSON is made outside of what is timed


class Peer:
    """One tree, and the workload."""

    def __init__(self, path: str) -> None:
        core = importlib.import_module("dynamo._core")
        self._make_tree = core.RadixTree
        self._hash = core.compute_block_hash_for_seq
        with open(path, "rb") as file:
            self._head: dict[str, Any] = json.loads(file.readline())
            self._chains = array("Q")
            self._chains.fromfile(file, self._head["num_keys"])
            self._prompts = []
            for prompt in self._head["prompts"]:
                tokens = array("I")
                tokens.fromfile(file, prompt["num_blocks"] * self._head["block_size"])
                self._prompts.append(tokens.tolist())
        self._num_events = 0
        self._tree: Any = None

    def store(self) -> dict[str, Any]:
        """A new tree with all events."""
        self._tree = None
        gc.collect()
        before = _resident_bytes()
        self._tree = self._make_tree()
        return {"cpu_ns": self._apply(self._stored), "grown_bytes": _resident_bytes() - before}

    def remove(self) -> dict[str, Any]:
        """All events' blocks, last to first."""
        return {"cpu_ns": self._apply(self._removed)}

    def hold(self) -> dict[str, Any]:
        """Stores what the prompts' holders hold."""
        for tokens, prompt in zip(self._prompts, self._head["prompts"], strict=True):
            hashes = self._hash(tokens, self._head["block_size"])
            for worker, depth in prompt["depths"]:
                self._tree.apply_event(worker, self._stored(hashes[:depth]))
        self._tree.find_matches([1])
        return {}

    def match(self, prompt: int, calls: int, repeats: int) -> dict[str, Any]:
        """Times hashing, look-up, and both."""
        tokens, block_size = self._prompts[prompt], self._head["block_size"]
        hashes = self._hash(tokens, block_size)
        tree, hash_tokens = self._tree, self._hash
        scores = tree.find_matches(hashes).scores
        return {
            "hash": _time(lambda: hash_tokens(tokens, block_size), calls, repeats),
            "look_up": _time(lambda: tree.find_matches(hashes).scores, calls, repeats),
            "both": _time(lambda: tree.find_matches(hash_tokens(tokens, block_size)).scores, calls, repeats),
            "scores": {worker: score for (worker, _), score in scores.items()},
        }

    def clear(self, worker: int) -> dict[str, Any]:
        """Times how long it takes to forget a worker's blocks."""
        start = time.process_time_ns()
        self._tree.clear_all_blocks(worker)
        self._tree.find_matches([1])
        return {"cpu_ns": time.process_time_ns() - start}

    def _apply(self, encode: Callable[[list[int]], bytes]) -> int:
        """Nanoseconds to apply one event for each chain of each worker."""
        total, size = 0, self._head["chain_blocks"]
        events = self._head["events"]
        for start in range(0, len(events), _BATCH_EVENTS):
            batch = [
                (worker, encode(self._chains[size * chain : size * (chain + 1)].tolist()))
                for worker, chain in events[start : start + _BATCH_EVENTS]
            ]
            begun = time.process_time_ns()
            for worker, event in batch:
                self._tree.apply_event(worker, event)
            self._tree.find_matches([1])  # has gone through what came before it
            total += time.process_time_ns() - begun
        return total

    def _stored(self, keys: list[int]) -> bytes:
        blocks = [{"block_hash": key, "tokens_hash": key} for key in keys]
        return self._event({"stored": {"parent_hash": None, "blocks": blocks}})

    def _removed(self, keys: list[int]) -> bytes:
        return self._event({"removed": {"block_hashes": keys[::-1]}})

    def _event(self, data: dict[str, Any]) -> bytes:
        self._num_events += 1
        return json.dumps({"event_id": self._num_events, "data": data, "dp_rank": 0}, separators=(",", ":")).encode()


def _time(action: Callable[[], object], calls: int, repeats: int) -> list[float]:
    """Nanoseconds of one call, `repeats` times the mean of `calls`."""
    action()
    samples = []
    for _ in range(repeats):
        start = time.process_time_ns()
        for _ in range(calls):
            action()
        samples.append((time.process_time_ns() - start) / calls)
    return samples


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _main(replies: TextIO) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True)
    peer = Peer(parser.parse_args().workload)
    gc.collect()
    gc.freeze()

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply({"version": importlib.import_module("importlib.metadata").version("ai-dynamo-runtime")})
    for line in sys.stdin:
        order = json.loads(line)
        reply(getattr(peer, order.pop("do"))(**order))


if __name__ == "__main__":
    _replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _main(_replies)
