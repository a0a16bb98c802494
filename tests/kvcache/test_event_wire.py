"""Our bytes against structs that have the shape of vLLM's, in both directions, and against bytes that are nobody's."""

import os
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.event_wire import (
    MAX_BATCH_BYTES,
    MAX_BATCH_EVENTS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventWireError,
    UnknownEvent,
    decode_batch,
    decode_snapshot,
    encode_batch,
    encode_snapshot,
    tier_of,
)
from dynamo.kvcache.events import Cleared, Removed, Snapshot, Stored
from dynamo.kvcache.hashing import BlockKey

KEYS = [BlockKey(os.urandom(16)) for _ in range(8)]
LOS = [int.from_bytes(key[:8], "little") for key in KEYS]

# --- equal in shape to what vLLM 0.33 declares


class TheirStored(msgspec.Struct, omit_defaults=True, gc=False, tag="BlockStored"):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[list[int]] | None = None


class TheirRemoved(msgspec.Struct, omit_defaults=True, gc=False, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class TheirCleared(msgspec.Struct, omit_defaults=True, gc=False, tag="AllBlocksCleared"):
    pass


class TheirBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[TheirStored | TheirRemoved | TheirCleared]
    data_parallel_rank: int | None = None


# --- and what releases of 2025 declared, as SGLang does to this day


class OldStored(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None


class OldRemoved(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockRemoved"):
    block_hashes: list[int]


class OldCleared(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="AllBlocksCleared"):
    pass


class OldBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[OldStored | OldRemoved | OldCleared]


OURS = [
    Stored(5, "device", tuple(KEYS[:3]), None),
    Stored(6, "host", tuple(KEYS[3:5]), KEYS[2]),
    Removed(7, "disk", tuple(KEYS[5:])),
    Cleared(8, "host"),
]


def test_ours_come_back_as_they_were() -> None:
    batch = decode_batch(encode_batch(OURS, epoch=9, log_number=8, ts=1.5))
    assert (batch.ts, batch.data_parallel_rank, batch.epoch, batch.log_number) == (1.5, 0, 9, 8)
    first, second, third, fourth = batch.events
    assert isinstance(first, BlockStored) and isinstance(second, BlockStored) and isinstance(third, BlockRemoved)
    assert (list(first.block_hashes), first.parent_block_hash, tier_of(first)) == (LOS[:3], None, "device")
    assert (list(second.block_hashes), second.parent_block_hash, tier_of(second)) == (LOS[3:5], LOS[2], "host")
    assert (list(third.block_hashes), tier_of(third)) == (LOS[5:], "disk")
    assert fourth == AllBlocksCleared("host")


def test_a_consumer_of_vllms_format_reads_ours() -> None:
    batch = msgspec.msgpack.decode(encode_batch(OURS, epoch=9, log_number=8), type=TheirBatch)
    assert batch.data_parallel_rank == 0
    assert batch.events[0] == TheirStored(LOS[:3], None, [], 0, None, "GPU", None)
    assert batch.events[1] == TheirStored(LOS[3:5], LOS[2], [], 0, None, "CPU", None)
    assert batch.events[2] == TheirRemoved(LOS[5:], "STORAGE")
    assert batch.events[3] == TheirCleared()


@pytest.mark.parametrize(
    "hashes", [[1, 2**64 - 1], [b"\x01" * 32, b"\x02" * 32], [-5, 7]], ids=["ints", "bytes", "signed"]
)
def test_vllms_batches_are_read(hashes: list[Any]) -> None:
    extra = [("lora-a", ("image", 3), "salt", b"embedding"), None]
    stored = TheirStored(
        hashes, hashes[0], [1, 2, 3, 4], 2, 1, "GPU", "lora-a", extra_keys=extra, group_idx=1, session_id="unknown here",
        kv_cache_spec_kind="full_attention", lookahead_token_ids=[[1], [2]],
    )  # fmt: skip
    theirs = TheirBatch(2.0, [stored, TheirRemoved(hashes, "STORAGE", group_idx=1, ownership="x"), TheirCleared()], 3)
    batch = decode_batch(msgspec.msgpack.encode(theirs))
    assert (batch.ts, batch.data_parallel_rank, batch.epoch, batch.log_number) == (2.0, 3, None, None)
    first, second, third = batch.events
    assert isinstance(first, BlockStored) and isinstance(second, BlockRemoved)
    assert (list(first.block_hashes), first.parent_block_hash) == (hashes, hashes[0])
    assert (list(first.token_ids), first.block_size, first.lora_name, first.group_idx) == ([1, 2, 3, 4], 2, "lora-a", 1)
    assert first.extra_keys == [["lora-a", ["image", 3], "salt", b"embedding"], None]
    assert (list(second.block_hashes), tier_of(second)) == (hashes, "disk")
    assert third == AllBlocksCleared()


def test_array_events_of_older_releases_are_read() -> None:
    theirs = OldBatch(2.0, [OldStored([1, 2], 7, [1, 2, 3, 4], 2, None), OldRemoved([2]), OldCleared()])
    batch = decode_batch(msgspec.msgpack.encode(theirs))
    assert batch.events == [BlockStored([1, 2], 7, [1, 2, 3, 4], 2), BlockRemoved([2]), AllBlocksCleared()]
    assert batch.data_parallel_rank is None


def test_an_array_event_of_a_release_between_has_medium_and_adapter() -> None:
    payload = msgspec.msgpack.encode([1.0, [["BlockStored", [1], None, [5], 1, 2, "CPU", "name", None, "later"]], 0])
    (event,) = decode_batch(payload).events
    assert event == BlockStored([1], None, [5], 1, 2, "CPU", "name")


def test_an_event_of_a_kind_unknown_here_keeps_its_place() -> None:
    payload = msgspec.msgpack.encode([1.0, [{"type": "BlockMoved", "x": 1}, {"type": "AllBlocksCleared"}], 0, 5, 8])
    batch = decode_batch(payload)
    assert batch.events == [UnknownEvent("BlockMoved"), AllBlocksCleared()]
    assert (batch.epoch, batch.log_number) == (5, 8)


def test_an_unknown_medium_is_far_away() -> None:
    assert tier_of(BlockRemoved([1], medium="TAPE")) == "remote"
    assert tier_of(BlockRemoved([1])) == "device"


NO_BATCHES = {
    "nothing": b"",
    "text": b"hello",
    "a map": msgspec.msgpack.encode({"ts": 1}),
    "too short": msgspec.msgpack.encode([1.0]),
    "cut off": encode_batch(OURS, epoch=9, log_number=8)[:-9],
    "events that are numbers": msgspec.msgpack.encode([1.0, [1, 2]]),
    "text as hashes": msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": ["a"], "medium": None}]]),
    "no hashes": msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "medium": None}]]),
    "a length beyond the end": b"\x92\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff",
    "a length within limits": b"\x92\xcb" + bytes(8) + b"\xdd\x00\x00\xff\xff",
    "too many events": msgspec.msgpack.encode([1.0, [{"type": "AllBlocksCleared"}] * (MAX_BATCH_EVENTS + 1)]),
    "too many hashes": msgspec.msgpack.encode(
        [1.0, [{"type": "BlockRemoved", "block_hashes": [1] * (1 << 19), "medium": None}] * 3]
    ),
    "too many bytes": bytes(MAX_BATCH_BYTES + 1),
    "nested without end": b"\x92\xcb" + bytes(8) + b"\x91\x81\xaaextra_keys" + b"\x91" * 100_000,
    "a key that cannot be hashed": b"\x92\xcb" + bytes(8) + b"\x91\x81\xaaextra_keys\x91\x81\x81\x01\x02\x03",
    "text that is no UTF-8": msgspec.msgpack.encode([1.0, [["BlockStored"]]]).replace(
        b"Block", b"\xff\xff\xff\xff\xff"
    ),
    "ours with bytes": msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [b"1"]}], 0, 1, 1]),
    "ours with negative keys": msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [-1]}], 0, 1, 1]),
    "ours with a parent of bytes": msgspec.msgpack.encode(
        [1.0, [TheirStored([1], b"1", [], 0, None, None, None)], 0, 1, 1]
    ),
    "a negative epoch": msgspec.msgpack.encode([1.0, [], 0, -1, 1]),
}


@pytest.mark.parametrize("payload", NO_BATCHES.values(), ids=NO_BATCHES.keys())
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(EventWireError):
        decode_batch(payload)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_batches_are_refused_or_read_and_nothing_else(data: st.DataObject) -> None:
    payload = bytearray(encode_batch(OURS, epoch=9, log_number=8))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    for decode in (decode_batch, decode_snapshot):
        try:
            decode(bytes(payload))
        except EventWireError:
            continue


def test_a_snapshot_comes_back_as_it_was() -> None:
    snapshot = Snapshot(
        12, {"device": KEYS[:5], "disk": [], "host": KEYS}, {"device": [(0, None), (2, KEYS[7])], "disk": []}
    )
    read = decode_snapshot(encode_snapshot(snapshot, epoch=3))
    assert (read.epoch, read.log_number) == (3, 12)
    assert read.held == {"device": LOS[:5], "disk": [], "host": LOS}
    assert read.starts == {"device": [(0, None), (2, LOS[7])], "disk": []}


def test_a_snapshot_of_another_hash_version_is_refused() -> None:
    with pytest.raises(EventWireError, match="hash version 99"):
        decode_snapshot(msgspec.msgpack.encode([99, 1, 1, {}, {}]))


@pytest.mark.parametrize(
    ("held", "starts"),
    [
        ({"device": b"1234567"}, {}),
        ({"device": bytes(16)}, {"device": ([0, 2], [None, None])}),
        ({"device": bytes(16)}, {"device": ([1], [None])}),
        ({"device": bytes(16)}, {"device": ([0, 0], [None, None])}),
        ({"device": bytes(16)}, {"device": ([0, 1], [None])}),
        ({}, {"device": ([0], [None])}),
        ({str(i): b"" for i in range(20)}, {}),
    ],
)
def test_a_snapshot_that_does_not_fit_together_is_refused(held: dict[str, bytes], starts: dict[str, Any]) -> None:
    with pytest.raises(EventWireError):
        decode_snapshot(msgspec.msgpack.encode([1, 1, 1, held, starts]))
