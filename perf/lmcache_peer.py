"""Stores and loads blocks with LMCache's `fs_native` back-end and O_DIRECT. Runs in LMCache's own environment, as a script.

It shares nothing with `dynamo` but this protocol on standard input and output, one JSON value per line:

    ← {"lmcache": version}                                        once, when it is ready
    → {"fill": number of windows}     ← {"seconds": s}            stores windows 0, 1, … under new keys
    → {"store": window}               ← {"seconds": s}            stores a window again, under keys of its own
    → {"load": window}                ← {"seconds": s}            loads a window and compares every byte

A window is `--blocks` blocks of `--block-bytes` random bytes. One task moves it: the back-end's threads share its blocks.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import random
import select
import sys
import time
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Peer"]

_ALIGNMENT = 4096
_TIMEOUT_MS = 100_000


class Peer:
    """One adapter, its memory for one window to store and one to load, and the keys of what was stored."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int, workers: int) -> None:
        torch = importlib.import_module("torch")
        adapters = importlib.import_module("lmcache.v1.distributed.l2_adapters")
        native = importlib.import_module("lmcache.v1.distributed.l2_adapters.fs_native_l2_adapter")
        self._api = importlib.import_module("lmcache.v1.distributed.api")
        self._memory = importlib.import_module("lmcache.v1.memory_management")
        internal = importlib.import_module("lmcache.v1.distributed.internal_api")
        self._torch = torch
        self._folder = folder
        self._num_blocks, self._block_bytes = num_blocks, block_bytes
        backing = torch.empty(2 * num_blocks * block_bytes + _ALIGNMENT, dtype=torch.uint8)
        begin = -backing.data_ptr() % _ALIGNMENT
        self._buffer = backing[begin : begin + 2 * num_blocks * block_bytes]
        self._source, self._target = self._buffer.chunk(2)
        self._source.random_(0, 256, generator=torch.Generator().manual_seed(1))
        self._target.zero_()
        config = native.FSNativeL2AdapterConfig(str(folder), num_workers=workers, use_odirect=True)
        description = internal.L1MemoryDesc(
            ptr=self._buffer.data_ptr(), size=self._buffer.numel(), align_bytes=_ALIGNMENT
        )
        self._adapter = adapters.create_l2_adapter(config, l1_memory_desc=description)
        self._layout = self._api.MemoryLayoutDesc(shapes=[], dtypes=[])
        self._stores = self._objects(0)
        self._loads = self._objects(num_blocks * block_bytes)
        self._keys: dict[int, list[Any]] = {}
        self._last_key = 0
        self._random = random.Random(1)

    def store(self, window: int) -> float:
        """Seconds to store a window; the files it replaces are removed first, off the clock."""
        for key in self._keys.pop(window, []):
            self._adapter.delete([key])
        keys = []
        for _ in range(self._num_blocks):
            self._last_key += 1
            keys.append(self._api.ObjectKey(chunk_hash=self._last_key.to_bytes(16, "big"), model_name="m", kv_rank=0))
        self._keys[window] = keys
        started = time.perf_counter()
        task = self._adapter.submit_store_task(keys, self._stores)
        done: dict[Any, Any] = {}
        while task not in done:
            self._wait(self._adapter.get_store_event_fd())
            done.update(self._adapter.pop_completed_store_tasks())
        seconds = time.perf_counter() - started
        if not done[task].is_successful():
            raise RuntimeError("LMCache could not store all blocks")
        return seconds

    def load(self, window: int) -> float:
        """Seconds to load a window in shuffled order; its bytes are compared off the clock."""
        order = list(range(self._num_blocks))
        self._random.shuffle(order)
        keys = [self._keys[window][i] for i in order]
        self._target.zero_()
        self._lock(keys)
        started = time.perf_counter()
        task = self._adapter.submit_load_task(keys, [self._loads[i] for i in order])
        while (bitmap := self._adapter.query_load_result(task)) is None:
            self._wait(self._adapter.get_load_event_fd())
        seconds = time.perf_counter() - started
        self._adapter.submit_unlock(keys)
        if bitmap.popcount() != self._num_blocks or not self._torch.equal(self._source, self._target):
            raise RuntimeError(f"LMCache gave {bitmap.popcount()} of {self._num_blocks} blocks, or other bytes")
        return seconds

    def _lock(self, keys: list[Any]) -> None:
        task = self._adapter.submit_lookup_and_lock_task(keys, self._layout)
        while (bitmap := self._adapter.query_lookup_and_lock_result(task)) is None:
            self._wait(self._adapter.get_lookup_and_lock_event_fd())
        if bitmap.popcount() != self._num_blocks:
            raise RuntimeError(f"LMCache finds {bitmap.popcount()} of {self._num_blocks} blocks")

    def _objects(self, base: int) -> list[Any]:
        return [
            self._memory.TensorMemoryObj(
                raw_data=self._buffer[start : start + self._block_bytes],
                metadata=self._memory.MemoryObjMetadata(
                    shape=self._torch.Size([self._block_bytes]),
                    dtype=self._torch.uint8,
                    address=start,
                    phy_size=self._block_bytes,
                    fmt=self._memory.MemoryFormat.KV_2LTD,
                    ref_count=1,
                ),
                parent_allocator=None,
            )
            for start in range(base, base + self._num_blocks * self._block_bytes, self._block_bytes)
        ]

    def _wait(self, event_fd: int) -> None:
        poller = select.poll()
        poller.register(event_fd, select.POLLIN)
        if not poller.poll(_TIMEOUT_MS):
            raise TimeoutError("LMCache did not finish a task")
        os.eventfd_read(event_fd)


def _main(replies: TextIO) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("blocks", "block-bytes", "workers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    peer = Peer(options.folder, options.blocks, options.block_bytes, options.workers)

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply({"lmcache": importlib.metadata.version("lmcache")})
    for line in sys.stdin:
        ((order, number),) = json.loads(line).items()
        if order == "fill":
            reply({"seconds": sum(peer.store(window) for window in range(number))})
        else:
            reply({"seconds": peer.store(number) if order == "store" else peer.load(number)})


if __name__ == "__main__":
    _replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _main(_replies)
