"""The file that says whose a disk tier's folder is, before anything in it is believed or overwritten.

    STRIPE   magic 8s, version u32, slot_bytes u32, block_bytes u32, index u32, count u32, zero u32, fingerprint 16s,
             set_id 16s, check u64

A tier over several directories keeps slot `s` in directory `s % count`, at place `s // count`. All of its folders carry the
same random set id, so that directories of different tiers are not mixed. A folder that was lost and comes back later, with
blocks of then, still fits: the index and the digests say which of its blocks are still good.
"""

import contextlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dynamo.tiers.errors import TierUnavailableError
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.plain_file import open_plain

__all__ = ["IDENTITY_NAME", "StripeIdentity", "StripeState", "judge_stripes", "read_identity", "write_identity"]

IDENTITY_NAME = "STRIPE"
_MAGIC = b"DYNKVSTR"
_VERSION = 1
_BODY = struct.Struct("<8sIIIIII16s16s")  # the check follows
_BYTES = _BODY.size + 8


@dataclass(frozen=True, slots=True)
class StripeIdentity:
    """What a folder is part of.

    Attributes:
        fingerprint: 16 bytes, the hash of what names model and layout.
        slot_bytes: width of the slots.
        block_bytes: how much of a slot its digest covers.
        set_id: 16 random bytes shared by all folders of one tier.
        index: which of the folders this is, from 0; the index of blocks lies in number 0.
        count: how many folders there are.
    """

    fingerprint: bytes
    slot_bytes: int
    block_bytes: int
    set_id: bytes
    index: int
    count: int

    @classmethod
    def new_set(cls, fingerprint: bytes, layout: BlockLayout, count: int) -> "list[StripeIdentity]":
        """Identities for `count` folders, with a set id never used before. `fingerprint` may have any length."""
        hashed, set_id = xxhash.xxh3_128_digest(fingerprint), os.urandom(16)
        return [cls(hashed, layout.slot_bytes, layout.block_bytes, set_id, index, count) for index in range(count)]

    def to_bytes(self) -> bytes:
        """The 72 bytes of the file."""
        sizes = (self.slot_bytes, self.block_bytes, self.index, self.count)
        body = _BODY.pack(_MAGIC, _VERSION, *sizes, 0, self.fingerprint, self.set_id)
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class StripeState:
    """A folder's file as found.

    Attributes:
        is_present: whether there is one.
        identity: what it says; None when it is absent, or ours and damaged.
    """

    is_present: bool
    identity: StripeIdentity | None


def read_identity(path: Path) -> StripeState:
    """Reads an identity file.

    Raises:
        TierUnavailableError: the file is none of ours, or a newer version's.
        OSError: it cannot be read.
    """
    try:
        fd = open_plain(path, os.O_RDONLY)
    except FileNotFoundError:
        return StripeState(False, None)
    try:
        data = os.pread(fd, 2 * _BYTES, 0)
    finally:
        os.close(fd)
    if data[:8] != _MAGIC:
        raise TierUnavailableError(
            f"{path.parent} belongs to another program: {path.name} begins with {data[:8]!r}; "
            "give the disk tier another directory",
            path=path,
        )
    version = int.from_bytes(data[8:12], "little")
    if len(data) >= 12 and version != _VERSION:
        raise TierUnavailableError(
            f"{path.parent} has format version {version}, this program reads {_VERSION}; "
            "delete the folder or give the disk tier another directory",
            path=path,
        )
    if len(data) != _BYTES or data[_BODY.size :] != xxhash.xxh3_64_intdigest(data[: _BODY.size]).to_bytes(8, "little"):
        return StripeState(True, None)
    _, _, slot_bytes, block_bytes, index, count, _, fingerprint, set_id = _BODY.unpack(data[: _BODY.size])
    return StripeState(True, StripeIdentity(fingerprint, slot_bytes, block_bytes, set_id, index, count))


def write_identity(path: Path, identity: StripeIdentity) -> None:
    """Puts an identity in place, whole or not at all, also over a power cut.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a crash
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, identity.to_bytes())
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(fd)
    temporary.rename(path)


def judge_stripes(
    folders: Sequence[Path], states: Sequence[StripeState], wanted: Sequence[StripeIdentity]
) -> list[bool] | None:
    """Compares what the folders say with what is wanted, but for the set id.

    Returns:
        Per folder, whether its blocks are lost: it is new, or its identity is damaged. None when all are, and the index too:
        the number of folders has changed, or the first, where the index lies, is the new one.

    Raises:
        TierUnavailableError: a folder belongs elsewhere; the message says how to go on.
    """
    for folder, state, want in zip(folders, states, wanted, strict=True):
        found = state.identity
        if found and _content(found) != _content(want):
            raise TierUnavailableError(
                f"{folder} holds blocks of another model or block layout under this model's name; delete it",
                path=folder,
            )
    first = states[0].identity
    if first and first.index:
        raise TierUnavailableError(
            f"{folders[0]} is directory {first.index + 1} of {first.count} of a disk tier, not the first; "
            "give the directories in their old order, or delete the folder",
            path=folders[0],
        )
    if first is None or first.count != len(folders):
        return None
    for number, (folder, state) in enumerate(zip(folders, states, strict=True)):
        found = state.identity
        if found and found.set_id != first.set_id:
            raise TierUnavailableError(
                f"{folder} holds directory {found.index + 1} of {found.count} of another disk tier, or of this one "
                f"before it went on without it; delete the folder to use it beside {folders[0]}",
                path=folder,
            )
        if found and found.index != number:
            raise TierUnavailableError(
                f"{folder} is directory {found.index + 1} of {found.count} of this disk tier but was given as number "
                f"{number + 1}; give the directories in their old order, or delete their folders",
                path=folder,
            )
    return [state.identity is None for state in states]


def _content(identity: StripeIdentity) -> tuple[bytes, int, int]:
    return identity.fingerprint, identity.slot_bytes, identity.block_bytes
