"""Digests of blocks as they lie in slots, of either kind, and whether bytes still have theirs.

Both kinds are 64 bits, cover a block's payload without the padding behind it, and are seeded by the block's name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import Rows, SlotIds
from dynamo.kernels.digest import digest_rows
from dynamo.tiers.tier import Outcomes

if TYPE_CHECKING:  # loaded only where there are digests that need it
    import torch

__all__ = ["DigestKind", "DigestKinds", "Digests", "digest_slots", "match_digests", "stored_kinds"]

_LINE_BYTES = 1024  # of `DigestKind.LINES`; part of the format
_UNKNOWN = 255

Digests = npt.NDArray[np.uint64]

DigestKinds = npt.NDArray[np.uint8]
"""A `DigestKind` each; others where a later version has written them."""


class DigestKind(IntEnum):
    """How a digest is made. The numbers are part of the index's format."""

    XXH3 = 0
    """XXH3-64, by `dynamo.kernels.digest`: on CPUs only, and the fastest there."""
    LINES = 1
    """By `dynamo.kernels.digest_blocks`, of the payload as so many lines of as many bytes as divide both it and 1,024: CPUs
    and GPUs find the same."""


def stored_kinds(numbers: npt.NDArray[np.uint16]) -> DigestKinds:
    """Kinds as they stand in an index; those that are not known here stay so."""
    kinds: DigestKinds = np.minimum(numbers, _UNKNOWN).astype(np.uint8)
    return kinds


def digest_slots(slots: torch.Tensor, slot_ids: SlotIds, seeds: Digests, num_bytes: int) -> torch.Tensor:
    """Digests of kind LINES, made where the slots lie: on the CPU before it returns, on a GPU in its current stream.

    Args:
        slots: uint8 [num_slots, slot_bytes], contiguous, on any device.
        slot_ids: int64 [n], numbers in [0, num_slots).
        seeds: uint64 [n].
        num_bytes: payload at the start of each slot, which is not empty.

    Returns:
        uint64 [n], on the slots' device.

    Raises:
        KernelArgumentError: a slot lies outside, or the seeds do not fit.
    """
    from dynamo.kernels.digest_blocks import digest_blocks_new
    from dynamo.kernels.layouts import from_paged

    line_bytes = math.gcd(num_bytes, _LINE_BYTES)
    first = from_paged(slots[:1, :num_bytes].view(1, -1, line_bytes), "BTD")
    view = replace(first, block_offsets=slot_ids * slots.shape[1])
    return digest_blocks_new(view, np.arange(len(slot_ids)), seeds)


def match_digests(
    rows: Rows, row_ids: SlotIds, seeds: Digests, num_bytes: int, digests: Digests, kinds: DigestKinds
) -> Outcomes:
    """bool [n]: whether the first `num_bytes` of each row have the digest, of that kind. Blocks until done.

    Args:
        rows: uint8 [num_rows, row_bytes], C-contiguous, in host memory.
        row_ids: int64 [n].
        seeds: uint64 [n], as are `digests`.
        kinds: of the digests; one that is not known is matched by nothing.
    """
    matching: Outcomes = np.zeros(len(row_ids), dtype=np.bool_)
    is_xxh3 = kinds == DigestKind.XXH3
    matching[is_xxh3] = digest_rows(rows, row_ids[is_xxh3], seeds[is_xxh3], num_bytes) == digests[is_xxh3]
    is_lines = kinds == DigestKind.LINES
    if is_lines.any():
        import torch

        found = digest_slots(torch.from_numpy(rows), row_ids[is_lines], seeds[is_lines], num_bytes)
        matching[is_lines] = found.numpy() == digests[is_lines]
    return matching
