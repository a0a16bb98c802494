"""The process that `crash` kills: checks what survived, then loads and saves until it dies."""

import random
import signal
import time
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kvcache import KVCache, KVSpec, OutOfBlocksError
from dynamo.kvcache.events import Cleared, Stored
from dynamo.kvcache.hashing import BlockKey, block_keys, chain_root

__all__ = ["Message", "Recovered", "Step", "Workload", "conversation_tokens", "work"]

_BLOCK_SIZE = 16
_NUM_CONVERSATIONS = 64
_NUM_FAMILIES = 4
_FAMILY_BLOCKS = 2  # that conversations of one family share
_MAX_BLOCKS = 24
_DEVICE_BLOCKS = 96
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FINITE = np.uint64(0x3FFFFFFF3FFFFFFF)  # as two float32: no NaN and no infinity


@dataclass(frozen=True, slots=True)
class Workload:
    """What workers do: conversations of up to 24 blocks, some with a common beginning, over one folder."""

    folder: Path
    num_disk_blocks: int
    block_kib: int
    seed: int

    @property
    def spec(self) -> KVSpec:
        """Blocks of `block_kib` KiB: 8 KiB for each layer."""
        return KVSpec(
            model="crash",
            num_layers=self.block_kib // 8,
            num_kv_heads=1,
            head_dim=64,
            dtype=torch.float32,
            block_size=_BLOCK_SIZE,
        )


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a worker found at its start: blocks the disk tier had, those that loaded with right bytes, and wrong ones.

    Attributes:
        is_refused: the folder could not be used, and the worker goes on without a disk tier.
    """

    open_s: float
    num_found: int
    usable: frozenset[BlockKey]
    num_wrong: int
    is_refused: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What happened since the last message: disk events, and blocks compared."""

    stored: frozenset[BlockKey]
    removed: frozenset[BlockKey]
    num_checked: int
    num_wrong: int


Message = Recovered | Step


def work(workload: Workload, number: int, connection: Connection) -> None:
    """Runs until killed. Sends one `Recovered`, then `Step`s."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair, which then kills this process
    torch.set_num_threads(1)
    spec = workload.spec
    slot_bytes = spec.layout.slot_bytes
    started_s = time.perf_counter()
    cache = KVCache(
        spec,
        device="cpu",
        device_blocks=_DEVICE_BLOCKS,
        host=workload.num_disk_blocks // 4 * slot_bytes,
        disk=f"{workload.folder}:{workload.num_disk_blocks * slot_bytes}",
    )
    open_s = time.perf_counter() - started_s
    found = cache.stats().tier("disk")
    usable: set[BlockKey] = set()
    num_wrong = 0
    for conversation in range(_NUM_CONVERSATIONS):
        tokens = conversation_tokens(workload.seed, conversation)
        keys, wrong = _use(cache, tokens, _MAX_BLOCKS, is_read_only=True)
        usable.update(keys)
        num_wrong += wrong
    connection.send(
        Recovered(open_s, found.num_cached_blocks, frozenset(usable), num_wrong, is_refused=not found.num_slots)
    )
    chance = random.Random(f"{workload.seed} {number}")
    last = max((event.sequence_number for event in cache.events()), default=-1)
    while True:
        tokens = conversation_tokens(workload.seed, chance.randrange(_NUM_CONVERSATIONS))
        keys, wrong = _use(cache, tokens, chance.randint(1, _MAX_BLOCKS), is_read_only=False)
        if chance.random() < 0.2:
            cache.flush(timeout_s=5.0)
        stored: set[BlockKey] = set()
        removed: set[BlockKey] = set()
        for event in cache.events(after=last):
            last = event.sequence_number
            if event.tier != "disk" or isinstance(event, Cleared):
                continue
            gained, lost = (stored, removed) if isinstance(event, Stored) else (removed, stored)
            gained.update(event.keys)
            lost.difference_update(event.keys)
        connection.send(Step(frozenset(stored), frozenset(removed), len(keys), wrong))


def _use(
    cache: KVCache, tokens: npt.NDArray[np.uint32], num_blocks: int, *, is_read_only: bool
) -> tuple[list[BlockKey], int]:
    """Opens a conversation, compares what the cache has of it and, unless `is_read_only`, writes and commits the rest.

    Returns:
        Keys of the blocks that were compared, and how many of them were wrong.
    """
    size = _BLOCK_SIZE
    num_held = min(num_blocks, cache.lookup(tokens).cached_tokens // size)
    if is_read_only:
        num_blocks = num_held
    if not num_blocks:
        return [], 0
    wanted = tokens[: num_blocks * size + 1]  # one more, since the last token is never taken from the cache
    keys = block_keys(wanted, size, chain_root(cache.spec.fingerprint, size))
    try:
        sequence = cache.open(wanted)
    except OutOfBlocksError:  # offloads still hold most of the small pool
        cache.flush(timeout_s=5.0)
        return [], 0
    with sequence as seq:
        seq.wait()
        num_cached = seq.num_cached_tokens // size
        slots = torch.from_numpy(seq.block_table.astype(np.int64))
        num_wrong = _compare(cache, keys[:num_cached], slots[:num_cached])
        if not is_read_only:
            _write(cache, keys[num_cached:], slots[num_cached:num_blocks])
            seq.commit(num_blocks * size)
    return keys[:num_cached], num_wrong


def _compare(cache: KVCache, keys: list[BlockKey], slots: torch.Tensor) -> int:
    """How many of the blocks in `slots` have other bytes than their keys say."""
    if not keys:
        return 0
    content = _content(cache.spec, keys)
    is_wrong = np.zeros(len(keys), dtype=np.bool_)
    for layer in range(cache.spec.num_layers):
        for plane, tensor in enumerate(cache.layer(layer)):
            found = tensor[slots].numpy().view(np.uint32)
            is_wrong |= (found != content[:, layer, plane]).reshape(len(keys), -1).any(axis=1)
    return int(np.count_nonzero(is_wrong))


def _write(cache: KVCache, keys: list[BlockKey], slots: torch.Tensor) -> None:
    if not keys:
        return
    content = _content(cache.spec, keys)
    for layer in range(cache.spec.num_layers):
        for plane, tensor in enumerate(cache.layer(layer)):
            tensor[slots] = torch.from_numpy(content[:, layer, plane].view(np.float32))


def _content(spec: KVSpec, keys: list[BlockKey]) -> npt.NDArray[np.uint32]:
    """What the blocks of `keys` hold, uint32 [n, num_layers, 2, block_size, num_kv_heads, head_dim]."""
    shape = (spec.num_layers, 2, spec.block_size, spec.num_kv_heads, spec.head_dim)
    seeds = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
    steps = np.arange(1, int(np.prod(shape)) // 2 + 1, dtype=np.uint64) * _MULTIPLIER
    words = (steps[None] ^ seeds[:, :1]) * _MULTIPLIER + seeds[:, 1:]
    content: npt.NDArray[np.uint32] = (words & _FINITE).view(np.uint32).reshape(len(keys), *shape)
    return content


@lru_cache(maxsize=_NUM_CONVERSATIONS)
def conversation_tokens(seed: int, conversation: int) -> npt.NDArray[np.uint32]:
    """All tokens of a conversation, one more than its blocks hold."""
    num_shared = _FAMILY_BLOCKS * _BLOCK_SIZE
    family = np.random.default_rng([seed, 0, conversation % _NUM_FAMILIES])
    own = np.random.default_rng([seed, 1, conversation])
    parts = (
        family.integers(0, 2**32, num_shared, dtype=np.uint32),
        own.integers(0, 2**32, _MAX_BLOCKS * _BLOCK_SIZE + 1 - num_shared, dtype=np.uint32),
    )
    return np.concatenate(parts)
