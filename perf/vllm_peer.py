"""Times vLLM's KVCacheManager on the workload of `dynamo.perf blocks`. Runs in vLLM's own environment, as a script.

It shares nothing with `dynamo` but this protocol on standard input and output, one JSON value per line:

    ← {"vllm": version, "hash": name}                           once, when it is ready
    → {"case": "cold" | "evicting" | "cached", "repeats": n}    any number of times
    ← [{"hash": ns, "match": ns, "allocate": ns, "free": ns}, …]    thread CPU nanoseconds, one object per repeat

Standard output carries nothing else: whatever vLLM prints goes to standard error.
"""

import argparse
import gc
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

__all__ = ["Peer"]


class Peer:
    """One KVCacheManager and the requests that are put through it."""

    def __init__(self, num_blocks: int, num_tokens: int, block_size: int, hash_name: str) -> None:
        interface = importlib.import_module("vllm.v1.kv_cache_interface")
        manager = importlib.import_module("vllm.v1.core.kv_cache_manager")
        keys = importlib.import_module("vllm.v1.core.kv_cache_utils")
        torch = importlib.import_module("torch")
        self._requests = importlib.import_module("vllm.v1.request")
        self._sampling = importlib.import_module("vllm.sampling_params").SamplingParams(max_tokens=1)
        hash_function = getattr(importlib.import_module("vllm.utils.hashing"), hash_name)
        keys.init_none_hash(hash_function)
        self._hasher = keys.get_request_block_hasher(block_size, hash_function)
        spec = interface.FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=None
        )
        config = interface.KVCacheConfig(
            num_blocks=num_blocks + 1,  # vLLM keeps one block to itself as the null block
            kv_cache_tensors=[],
            kv_cache_groups=[interface.KVCacheGroupSpec(["layer"], spec)],
        )
        self._manager = manager.KVCacheManager(
            config, max_model_len=num_tokens, scheduler_block_size=block_size, hash_block_size=block_size
        )
        self._num_blocks = num_blocks
        self._num_tokens = num_tokens
        self._block_size = block_size
        self._random = random.Random(1)
        self._last_id = 0

    def run(self, case: str, repeats: int) -> Iterator[dict[str, int]]:
        """Yields the nanoseconds of each repeat. The first run of each case only warms up."""
        tokens = self._new_tokens()
        self._start(case, tokens)
        for i in range(repeats + 1):
            if case == "cold":
                self._manager.reset_prefix_cache()
            if case != "cached":
                tokens = self._new_tokens()
            sample = self._one(tokens, case)
            if i:
                yield sample

    def _start(self, case: str, tokens: list[int]) -> None:
        self._manager.reset_prefix_cache()
        if case == "cached":
            self._one(tokens, "cold")
        if case == "evicting":
            for _ in range(-(-self._num_blocks * self._block_size // self._num_tokens)):
                self._one(self._new_tokens(), "cold")

    def _new_tokens(self) -> list[int]:
        return [self._random.randrange(1 << 17) for _ in range(self._num_tokens)]

    def _one(self, tokens: list[int], case: str) -> dict[str, int]:
        self._last_id += 1
        request = self._requests.Request(str(self._last_id), tokens, self._sampling, None)
        clock = time.thread_time_ns
        t0 = clock()
        request.block_hashes.extend(self._hasher(request))
        t1 = clock()
        blocks, num_cached, _ = self._manager.get_computed_blocks(request)
        t2 = clock()
        allocated = self._manager.allocate_slots(request, request.num_tokens - num_cached, num_cached, blocks)
        t3 = clock()
        self._manager.free(request)
        t4 = clock()
        expected = (self._num_tokens - 1) // self._block_size * self._block_size if case == "cached" else 0
        if allocated is None or num_cached != expected:
            raise RuntimeError(f"{case}: {num_cached} tokens cached where {expected} were expected")
        return {"hash": t1 - t0, "match": t2 - t1, "allocate": t3 - t2, "free": t4 - t3}


def _main(replies: TextIO) -> None:
    parser = argparse.ArgumentParser()
    for name in ("blocks", "tokens", "block-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--hash", required=True)
    options = parser.parse_args()
    peer = Peer(options.blocks, options.tokens, options.block_size, options.hash)
    gc.collect()
    gc.freeze()

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply({"vllm": importlib.import_module("importlib.metadata").version("vllm"), "hash": options.hash})
    for line in sys.stdin:
        order = json.loads(line)
        reply(list(peer.run(order["case"], order["repeats"])))


if __name__ == "__main__":
    _replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _main(_replies)
