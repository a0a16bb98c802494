"""KV events and snapshots as bytes: vLLM's wire format, read and written. This module loads no torch.

A message is three ZMQ frames: topic, sequence number of the batch (8 bytes, big-endian, from 0), payload. The payload is
msgpack, as vLLM's `vllm/distributed/kv_events.py` writes it (https://docs.vllm.ai/en/latest/api/vllm/distributed/kv_events/),
so that either side can read the other's; what vLLM does not know is appended, and ignored by its decoder.

    batch              array   [ts, events, data_parallel_rank, epoch*, log_number*]
    BlockStored        map     type, block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name,
                               extra_keys, group_idx, kv_cache_spec_kind, locality, tier*
    BlockRemoved       map     type, block_hashes, medium, group_idx, locality, tier*
    AllBlocksCleared   map     type, tier*

    * ours only. `epoch` numbers the incarnation of the publisher. `log_number` is the `EventLog` number of the batch's last
      event: its first has `log_number - len(events) + 1`, so a reader sees from the payload alone whether anything lies
      between two batches. An empty batch is a heartbeat; one whose log_number went up marks events that nobody can have.

Our block_hashes are integers, the `lo` halves of block keys; token_ids is empty and block_size 0, as in vLLM's own
placeholders, since both sides compute the same keys. vLLM's hashes are integers or bytes and mean nothing outside the engine.
Older vLLM and SGLang releases write an event as an array, tag first, fields in the order above: these are read as well.

A snapshot is msgpack [hash version, epoch, log_number, keys, starts]: by tier its keys, as packed little-endian u64, and where
runs of them start, as an array of positions and one of the keys before them, nil for none; see `kvcache.events.Snapshot`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from struct import unpack
from typing import Annotated, Any, Final, cast

import msgspec
import numpy as np
from msgspec import Meta, Raw

from dynamo.kvcache.events import Cleared, Event, Removed, Snapshot, Stored
from dynamo.kvcache.hashing import HASH_VERSION, BlockKey

__all__ = [
    "KV_TOPIC",
    "LOAD_TOPIC",
    "MAX_BATCH_BYTES",
    "MAX_BATCH_EVENTS",
    "MAX_BATCH_HASHES",
    "MAX_SNAPSHOT_BYTES",
    "AllBlocksCleared",
    "BlockHash",
    "BlockRemoved",
    "BlockStored",
    "EventBatch",
    "EventWireError",
    "SnapshotMessage",
    "UnknownEvent",
    "WireEvent",
    "count_hashes",
    "decode_batch",
    "decode_snapshot",
    "encode_batch",
    "encode_snapshot",
    "tier_of",
]

KV_TOPIC: Final = b"kv"
LOAD_TOPIC: Final = b"load"

MAX_BATCH_BYTES: Final = 16 << 20
MAX_BATCH_EVENTS: Final = 1 << 16
MAX_BATCH_HASHES: Final = 1 << 20
MAX_SNAPSHOT_BYTES: Final = 1 << 30

_MEDIUM_BY_TIER: Final = {"device": "GPU", "host": "CPU", "disk": "STORAGE", "remote": "REMOTE"}
_TIER_BY_MEDIUM: Final = {medium: tier for tier, medium in _MEDIUM_BY_TIER.items()}

BlockHash = int | bytes
"""What an engine calls a block. Ours are integers from 0 to 2**64 - 1."""

_Hashes = Annotated[Sequence[BlockHash], Meta(max_length=MAX_BATCH_HASHES)]
_TokenIds = Annotated[Sequence[int], Meta(max_length=MAX_BATCH_BYTES)]
_Key = Annotated[int, Meta(ge=0)]
_Keys = Annotated[Sequence[_Key], Meta(max_length=MAX_BATCH_HASHES)]


class EventWireError(ValueError):
    """Bytes from the wire are no batch or snapshot. They were dropped whole: treat them as a message that was lost."""


def _none() -> None:
    """A default that is written all the same: vLLM's decoder demands these fields, older encoders leave them out."""


class BlockStored(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag=True):
    """Blocks that follow one another became available; `parent_block_hash` names the one before the first."""

    block_hashes: _Hashes
    parent_block_hash: BlockHash | None
    token_ids: _TokenIds
    block_size: int
    lora_id: int | None = msgspec.field(default_factory=_none)
    medium: str | None = msgspec.field(default_factory=_none)
    lora_name: str | None = msgspec.field(default_factory=_none)
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None
    tier: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag=True):
    """Blocks are no longer available in that medium."""

    block_hashes: _Hashes
    medium: str | None = msgspec.field(default_factory=_none)
    group_idx: int | None = None
    locality: str | None = None
    tier: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag=True):
    """A tier was emptied: all of them where none is named."""

    tier: str | None = None


class UnknownEvent(msgspec.Struct, frozen=True, gc=False):
    """An event of a kind that this release does not know; it keeps its place in the batch. Never written."""

    type: str


_NAMES_BLOCKS: Final = (BlockStored, BlockRemoved)  # a union would be made anew at each use
_KnownEvent = BlockStored | BlockRemoved | AllBlocksCleared
WireEvent = _KnownEvent | UnknownEvent


class EventBatch(msgspec.Struct, frozen=True, gc=False, array_like=True, omit_defaults=True):
    """Events that one publisher sent together, in the order in which they happened.

    Attributes:
        ts: seconds since 1970, on the publisher's clock.
        data_parallel_rank: of the engine that publishes; None is rank 0.
        epoch: incarnation of the publisher; None for engines that are not ours.
        log_number: see the top of this module; None for engines that are not ours.
    """

    ts: float
    events: Sequence[WireEvent]
    data_parallel_rank: int | None = None
    epoch: int | None = None
    log_number: int | None = None


# --- what the decoder reads: events whose hashes are all keys, as ours; events of any engine; and their older array form


class _KeysStored(BlockStored, frozen=True, gc=False, tag="BlockStored"):
    block_hashes: _Keys
    parent_block_hash: _Key | None


class _KeysRemoved(BlockRemoved, frozen=True, gc=False, tag="BlockRemoved"):
    block_hashes: _Keys


class _KeysBatch(msgspec.Struct, frozen=True, gc=False, array_like=True):
    ts: float
    events: Annotated[list[_KeysStored | _KeysRemoved | AllBlocksCleared], Meta(max_length=MAX_BATCH_EVENTS)]
    data_parallel_rank: int | None = None
    epoch: Annotated[int, Meta(ge=0)] | None = None
    log_number: Annotated[int, Meta(ge=-1)] | None = None


class _StoredArray(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="BlockStored"):
    block_hashes: _Hashes
    parent_block_hash: BlockHash | None
    token_ids: _TokenIds
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None


class _RemovedArray(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="BlockRemoved"):
    block_hashes: _Hashes
    medium: str | None = None


class _ClearedArray(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="AllBlocksCleared"):
    pass


class _KnownBatch(msgspec.Struct, frozen=True, gc=False, array_like=True):
    ts: float
    events: Annotated[list[_KnownEvent], Meta(max_length=MAX_BATCH_EVENTS)]
    data_parallel_rank: int | None = None
    epoch: Annotated[int, Meta(ge=0)] | None = None
    log_number: Annotated[int, Meta(ge=-1)] | None = None


class _RawBatch(msgspec.Struct, frozen=True, gc=False, array_like=True):
    ts: float
    events: Annotated[list[Raw], Meta(max_length=MAX_BATCH_EVENTS)]
    data_parallel_rank: int | None = None
    epoch: Annotated[int, Meta(ge=0)] | None = None
    log_number: Annotated[int, Meta(ge=-1)] | None = None


class _Tag(msgspec.Struct, frozen=True, gc=False):
    type: str


class _TagArray(msgspec.Struct, frozen=True, gc=False, array_like=True):
    type: str


class _WireSnapshot(msgspec.Struct, frozen=True, gc=False, array_like=True):
    hash_version: int
    epoch: Annotated[int, Meta(ge=0)]
    log_number: Annotated[int, Meta(ge=-1)]
    held: Annotated[dict[str, bytes], Meta(max_length=16)]
    starts: Annotated[dict[str, tuple[list[_Key], list[_Key | None]]], Meta(max_length=16)]


_encoder = msgspec.msgpack.Encoder()
_keys_batches = msgspec.msgpack.Decoder(_KeysBatch)
_known_batches = msgspec.msgpack.Decoder(_KnownBatch)
_raw_batches = msgspec.msgpack.Decoder(_RawBatch)
_maps = msgspec.msgpack.Decoder(_KnownEvent)
_arrays = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_map_tags = msgspec.msgpack.Decoder(_Tag)
_array_tags = msgspec.msgpack.Decoder(_TagArray)
_snapshots = msgspec.msgpack.Decoder(_WireSnapshot)

_KNOWN_TAGS: Final = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
# What msgspec raises on bytes that it cannot read: the last three for text that is no UTF-8, for nesting without end, and for
# maps whose keys cannot be hashed.
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError, TypeError)


def encode_batch(
    events: Sequence[Event], *, epoch: int, log_number: int, data_parallel_rank: int = 0, ts: float | None = None
) -> bytes:
    """A batch of our own events, which follow one another in their log.

    Args:
        log_number: number of the last event; of the last one before, where there are none.
        ts: seconds since 1970; now if None.
    """
    wire_events = [_wire_event(event) for event in events]
    return _encoder.encode(
        EventBatch(time.time() if ts is None else ts, wire_events, data_parallel_rank, epoch, log_number)
    )


def decode_batch(payload: bytes | memoryview) -> EventBatch:
    """Reads a batch of ours, of vLLM's, or of one of its older releases.

    Raises:
        EventWireError: the bytes are no batch, or a larger one than anybody sends.
    """
    if len(payload) > MAX_BATCH_BYTES:
        raise EventWireError(f"an event batch of {len(payload)} bytes exceeds the limit of {MAX_BATCH_BYTES}")
    batch = _decode_keys(payload) or _decode_known(payload) or _decode_one_by_one(payload)
    if len(payload) > MAX_BATCH_HASHES and (num_hashes := count_hashes(batch.events)) > MAX_BATCH_HASHES:
        raise EventWireError(f"an event batch names {num_hashes} blocks; the limit is {MAX_BATCH_HASHES}")
    return batch


def count_hashes(events: Sequence[WireEvent]) -> int:
    """Blocks that the events name, each as often as it is named."""
    return sum([len(event.block_hashes) for event in events if isinstance(event, _NAMES_BLOCKS)])


@dataclass(frozen=True, slots=True)
class SnapshotMessage:
    """What each tier of a worker holds.

    Attributes:
        epoch: the worker's incarnation.
        log_number: of the last event that is in it for certain, -1 for none; as in `kvcache.events.Snapshot`.
        held: by tier, the `lo` halves of the keys.
        starts: by tier, (position, parent) of the runs that they are in; for tiers where that is known.
    """

    epoch: int
    log_number: int
    held: Mapping[str, Sequence[int]]
    starts: Mapping[str, Sequence[tuple[int, int | None]]] = field(default_factory=dict)


def encode_snapshot(snapshot: Snapshot, *, epoch: int) -> bytes:
    """Bytes for `decode_snapshot`: 8 for each block of each tier, and some for each run."""
    held = {tier: b"".join(key[:8] for key in keys) for tier, keys in snapshot.keys.items()}
    starts = {
        tier: (
            [position for position, _ in runs],
            [None if parent is None else _los((parent,))[0] for _, parent in runs],
        )
        for tier, runs in snapshot.starts.items()
    }
    return _encoder.encode(_WireSnapshot(HASH_VERSION, epoch, snapshot.sequence_number, held, starts))


def decode_snapshot(payload: bytes | memoryview) -> SnapshotMessage:
    """Reads what `encode_snapshot` wrote.

    Raises:
        EventWireError: the bytes are no snapshot, a larger one than allowed, or of another hash version.
    """
    if len(payload) > MAX_SNAPSHOT_BYTES:
        raise EventWireError(f"a snapshot of {len(payload)} bytes exceeds the limit of {MAX_SNAPSHOT_BYTES}")
    try:
        read = _snapshots.decode(payload)
    except _UNREADABLE as error:
        raise EventWireError(f"a snapshot cannot be read: {error}") from None
    if read.hash_version != HASH_VERSION:
        raise EventWireError(
            f"a snapshot has keys of hash version {read.hash_version}, this side computes {HASH_VERSION}; "
            "run the same release on both sides"
        )
    for tier, packed in read.held.items():
        if len(packed) % 8:
            raise EventWireError(f"a snapshot's keys of tier {tier[:40]!r} have {len(packed)} bytes, no multiple of 8")
    for tier, (positions, parents) in read.starts.items():
        bounds = [*positions, len(read.held.get(tier, b"")) // 8]
        if len(positions) != len(parents) or bounds[0] or any(a >= b for a, b in pairwise(bounds)):
            raise EventWireError(f"a snapshot's runs of tier {tier[:40]!r} do not divide its {bounds[-1]} keys")
    held = {tier: cast("list[int]", np.frombuffer(packed, "<u8").tolist()) for tier, packed in read.held.items()}
    starts = {tier: list(zip(*runs, strict=True)) for tier, runs in read.starts.items()}
    return SnapshotMessage(read.epoch, read.log_number, held, starts)


def tier_of(event: BlockStored | BlockRemoved) -> str:
    """Our word for where the blocks lie: `tier` if the event says, else from what vLLM says. Unknown media are "remote"."""
    if event.tier is not None:
        return event.tier
    if event.locality == "REMOTE":
        return "remote"
    return "device" if event.medium is None else _TIER_BY_MEDIUM.get(event.medium, "remote")


def _los(keys: Sequence[BlockKey]) -> tuple[int, ...]:
    return cast("tuple[int, ...]", unpack(f"<{2 * len(keys)}Q", b"".join(keys))[::2])


def _wire_event(event: Event) -> _KnownEvent:
    match event:
        case Stored():
            parent = None if event.parent is None else _los((event.parent,))[0]
            # msgspec writes a tuple as it writes a list, so the copy is saved
            hashes = cast("list[BlockHash]", _los(event.keys))
            return BlockStored(hashes, parent, [], 0, medium=_MEDIUM_BY_TIER.get(event.tier), tier=event.tier)
        case Removed():
            hashes = cast("list[BlockHash]", _los(event.keys))
            return BlockRemoved(hashes, medium=_MEDIUM_BY_TIER.get(event.tier), tier=event.tier)
        case Cleared():
            return AllBlocksCleared(event.tier)


def _decode_keys(payload: bytes | memoryview) -> EventBatch | None:
    """The fast way, which knows on its return that all hashes are integers from 0; None if there is anything else."""
    try:
        read = _keys_batches.decode(payload)
    except _UNREADABLE:
        return None
    return EventBatch(read.ts, read.events, read.data_parallel_rank, read.epoch, read.log_number)


def _decode_known(payload: bytes | memoryview) -> EventBatch | None:
    """Reads a batch of today's vLLM with hashes of either kind; None if it is something else, or claims to be ours."""
    try:
        read = _known_batches.decode(payload)
    except _UNREADABLE:
        return None
    if read.epoch is not None:
        return None
    return EventBatch(read.ts, read.events, read.data_parallel_rank)


def _decode_one_by_one(payload: bytes | memoryview) -> EventBatch:
    """Reads a batch with events in their array form, or of kinds unknown here."""
    try:
        raw = _raw_batches.decode(payload)
        events = [_decode_event(event) for event in raw.events]
    except _UNREADABLE as error:
        raise EventWireError(f"an event batch cannot be read: {error}") from None
    if raw.epoch is not None:
        for event in events:
            parent = event.parent_block_hash if isinstance(event, BlockStored) else None
            hashes = event.block_hashes if isinstance(event, BlockStored | BlockRemoved) else ()
            if not all(map(_is_key, hashes)) or not (parent is None or _is_key(parent)):
                raise EventWireError("an event batch with an epoch has block hashes that are no keys (integers from 0)")
    return EventBatch(raw.ts, events, raw.data_parallel_rank, raw.epoch, raw.log_number)


def _is_key(block_hash: BlockHash) -> bool:
    return isinstance(block_hash, int) and block_hash >= 0


def _decode_event(raw: Raw) -> WireEvent:
    """The first byte of a msgpack array is 0x90 to 0x9f, 0xdc or 0xdd."""
    first = memoryview(raw)[0]
    is_array = 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)
    tag = (_array_tags if is_array else _map_tags).decode(raw).type
    if tag not in _KNOWN_TAGS:
        return UnknownEvent(tag)
    if not is_array:
        return cast("_KnownEvent", _maps.decode(raw))
    event = _arrays.decode(raw)
    if isinstance(event, _StoredArray):
        return BlockStored(*(getattr(event, name) for name in _StoredArray.__struct_fields__))
    if isinstance(event, _RemovedArray):
        return BlockRemoved(event.block_hashes, event.medium)
    return AllBlocksCleared()
