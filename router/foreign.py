"""Block hashes of other engines, translated into keys that a router can compute from tokens.

vLLM and SGLang name a block by a hash of their own: an integer or bytes, perhaps seeded anew in each process. The tokens
that come with a stored block and the key of the block before it are enough to compute the key that `PrefixChain` gives for a
request's tokens. What an engine removes later it names by its hash alone, so the hashes of what it holds are remembered.

Each engine has a translation of its own. Two engines that name the same tokens differently, or different tokens alike, do not
disturb each other, and which of them stored first makes no difference.
"""

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from struct import iter_unpack
from typing import Any, Final, NamedTuple

import msgspec
import xxhash

from dynamo.kvcache.event_wire import BlockHash, BlockRemoved, BlockStored, tier_of
from dynamo.kvcache.hashing import chain_root

__all__ = ["ForeignKeys", "ForeignStats", "Run"]

_log = logging.getLogger(__name__)
_MAX_ROOTS: Final = 1024
_ROOTS_FORGOTTEN: Final = 256
_SOME_PARENT: Final = 0  # of a block that does not start a sequence: no key, but for one in 2**64, so nobody holds it


class Run(NamedTuple):
    """Keys that follow one another in a chain; `parent` is the key of the block before them, None at a chain's start."""

    keys: list[int]
    parent: int | None


@dataclass(frozen=True, slots=True)
class ForeignStats:
    """What was translated and what could not be, in blocks, since the start.

    Attributes:
        num_held: hashes the engine holds in any tier, once for each tier.
        num_retired: hashes it no longer holds, remembered since others may continue them.
        unknown_parents: stored after a block that was never told of. They cannot be found for any request.
        unknown_removals: removed without having been stored.
        unusable: stored with tokens that are not `block_size` a block, or with none and a hash never seen.
        other_groups: of KV cache groups that are not followed.
        refused: beyond `max_hashes`.
    """

    num_held: int
    num_retired: int
    unknown_parents: int
    unknown_removals: int
    unusable: int
    other_groups: int
    refused: int


class ForeignKeys:
    """Translation for one engine (worker and data-parallel rank). Not thread-safe.

    Args:
        name: of the worker, for log lines.
        fingerprint: of the model, as in the `WorkerCard`.
        block_size: tokens in a block of that engine.
        group: KV cache group that is followed, for models with several; the others' blocks are counted and passed over.
        max_hashes: held at most; what is stored beyond is refused, so it is never claimed.
        max_retired: hashes remembered after their removal at most, the oldest forgotten first.
    """

    def __init__(
        self,
        name: str,
        fingerprint: bytes,
        block_size: int,
        *,
        group: int = 0,
        max_hashes: int = 1 << 22,
        max_retired: int = 1 << 17,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size of {name} is {block_size}; it must be at least 1")
        self._name = name
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._group = group
        self._max_hashes = max_hashes
        self._max_retired = max_retired
        self._roots: dict[tuple[str, str], int] = {}
        self._held: dict[str, dict[BlockHash, int]] = {}
        self._retired: dict[BlockHash, int] = {}
        self._unknown_parents = 0
        self._unknown_removals = 0
        self._unusable = 0
        self._other_groups = 0
        self._refused = 0
        self._told: set[str] = set()

    def stored(self, event: BlockStored) -> list[Run]:
        """Keys of the blocks stored, in runs; empty where they cannot be translated."""
        hashes = event.block_hashes
        if not self._is_followed(event.group_idx):
            self._other_groups += len(hashes)
            return []
        held = self._held.setdefault(tier_of(event), {})
        if sum(map(len, self._held.values())) + len(hashes) > self._max_hashes:
            self._refused += len(hashes)
            self._tell_once("refused", f"it holds more than {self._max_hashes} blocks; more are not followed")
            return []
        if not event.token_ids:
            return self._stored_without_tokens(event, held)
        run = self._translated(event)
        if run is None:
            return []
        held.update(zip(hashes, run.keys, strict=True))
        return [run]

    def removed(self, event: BlockRemoved) -> list[int]:
        """Keys of the blocks removed from their tier."""
        if not self._is_followed(event.group_idx):
            self._other_groups += len(event.block_hashes)
            return []
        held = self._held.get(tier_of(event), {})
        keys = []
        for block_hash in event.block_hashes:
            key = held.pop(block_hash, None)
            if key is None:
                self._unknown_removals += 1
            else:
                keys.append(key)
                self._retire(block_hash, key)
        return keys

    def cleared(self, tier: str | None = None) -> None:
        """The engine may hold nothing in `tier` any more; in any tier if None. Names stay known, as far as remembered."""
        for name in list(self._held) if tier is None else [tier]:
            for block_hash, key in self._held.pop(name, {}).items():
                self._retire(block_hash, key)

    def forget(self) -> None:
        """The engine started anew: a hash may now mean something else."""
        self._held.clear()
        self._retired.clear()

    def stats(self) -> ForeignStats:
        """Counters since the start."""
        return ForeignStats(
            num_held=sum(map(len, self._held.values())),
            num_retired=len(self._retired),
            unknown_parents=self._unknown_parents,
            unknown_removals=self._unknown_removals,
            unusable=self._unusable,
            other_groups=self._other_groups,
            refused=self._refused,
        )

    def _is_followed(self, group: int | None) -> bool:
        return group is None or group == self._group

    def _known(self, block_hash: BlockHash) -> int | None:
        for held in self._held.values():
            if (key := held.get(block_hash)) is not None:
                return key
        return self._retired.get(block_hash)

    def _retire(self, block_hash: BlockHash, key: int) -> None:
        self._retired.pop(block_hash, None)  # to the end: the oldest is forgotten first
        self._retired[block_hash] = key
        if len(self._retired) > self._max_retired:
            del self._retired[next(iter(self._retired))]

    def _stored_without_tokens(self, event: BlockStored, held: dict[BlockHash, int]) -> list[Run]:
        """A placeholder, as vLLM sends for some blocks that it copies to another tier: their hashes were told before."""
        runs = []
        for block_hash in event.block_hashes:
            if (key := self._known(block_hash)) is None:
                self._unusable += 1
            else:
                held[block_hash] = key
                runs.append(Run([key], _SOME_PARENT))
        return runs

    def _translated(self, event: BlockStored) -> Run | None:
        """The blocks of an event with tokens; None where it cannot be used."""
        num_blocks, size = len(event.block_hashes), self._block_size
        if event.block_size != size or len(event.token_ids) != num_blocks * size or not num_blocks:
            self._unusable += num_blocks
            self._tell_once(
                "size",
                f"it stored {num_blocks} blocks of {event.block_size} with {len(event.token_ids)} tokens, where its blocks "
                f"should have {size}; give the worker's real block size, or its cache will not be found",
            )
            return None
        extras = (
            [_extras_of(event, position) for position in range(num_blocks)] if event.extra_keys else [[]] * num_blocks
        )
        if event.parent_block_hash is None:
            seed, parent = self._root(_take_salt(extras[0]), _lora_of(event)), None
        else:
            known = self._known(event.parent_block_hash)
            if known is None and self._known(event.block_hashes[0]) is not None:
                known = _SOME_PARENT
            if known is None:
                self._unknown_parents += num_blocks
                self._tell_once(
                    "parent",
                    f"it stored blocks after {event.parent_block_hash!r:.40}, of which it never told; events were lost, or it "
                    "was warm already when they were first read. Such blocks are not found until their prefix is stored anew",
                )
                return None
            seed = parent = known
        try:
            return Run(self._keys(event, extras, seed), parent)
        except (OverflowError, RecursionError, TypeError) as error:
            self._unusable += num_blocks
            self._tell_once("tokens", f"it stored blocks whose tokens or extra keys cannot be hashed: {error}")
            return None

    def _keys(self, event: BlockStored, extras: Sequence[list[Any]], seed: int) -> list[int]:
        """Keys of the event's blocks, the first one seeded with `seed`. A hash that is known keeps its key."""
        digest = xxhash.xxh3_64_intdigest
        names = [names for names in (*self._held.values(), self._retired) if names]
        blocks = iter_unpack(f"{4 * self._block_size}s", array("I", event.token_ids))
        keys = []
        for block_hash, (block,), extra in zip(event.block_hashes, blocks, extras, strict=True):
            for known in names:
                if block_hash in known:
                    seed = known[block_hash]
                    break
            else:
                seed = digest(block, seed)
                if extra:
                    # More than text, such as images: a key that no text alone can have.
                    seed = digest(msgspec.msgpack.encode(extra), seed)
            keys.append(seed)
        return keys

    def _root(self, salt: str, lora: str) -> int:
        root = self._roots.get((salt, lora))
        if root is None:
            if len(self._roots) >= _MAX_ROOTS:
                for old in list(islice(self._roots, _ROOTS_FORGOTTEN)):
                    del self._roots[old]
            root = chain_root(self._fingerprint, self._block_size, salt=salt, lora=lora).lo
            self._roots[salt, lora] = root
        return root

    def _tell_once(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.error("KV events of %s: %s (told once; see the metrics for how often)", self._name, message)


def _lora_of(event: BlockStored) -> str:
    """The adapter's name. Old releases send a number alone: that makes a root which no request asks for."""
    if event.lora_name is not None:
        return event.lora_name
    return "" if event.lora_id is None else f"\0{event.lora_id}"


def _extras_of(event: BlockStored, position: int) -> list[Any]:
    """What a block's content depends on besides tokens and adapter. vLLM puts the adapter's name first, and the salt into the
    first block of a sequence, as the only text."""
    per_block = event.extra_keys or []
    extras = per_block[position] if position < len(per_block) else None
    found = list(extras) if isinstance(extras, list) else []
    return found[1:] if event.lora_name and found[:1] == [event.lora_name] else found


def _take_salt(extras: list[Any]) -> str:
    """The salt, which the chain's root has; it is taken out of the first block's extra keys."""
    for position, extra in enumerate(extras):
        if isinstance(extra, str):
            del extras[position]
            return extra
    return ""
