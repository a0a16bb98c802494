"""A hash table over an array of 16-byte names, built and asked for a million names at a time without a Python loop.

Each round lays the entries that are still undecided into a table of buckets with one scatter, in which the last entry of a
bucket stays; entries of the same name always share a bucket, so the one that stays is the last of its name. The entries of
other names that lost their bucket go into the next round, with another hash. A table four times as large as its entries
leaves about an eighth of them to the next round.
"""

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import SlotIds

__all__ = ["NameTable", "Names", "name_words"]

Names = npt.NDArray[np.uint8]
"""16-byte block names, C-contiguous, [n, 16]."""

Words = npt.NDArray[np.uint64]
"""The same names as two little-endian words each, [n, 2]."""

_ROUNDS = (
    (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)),
    (np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)),
    (np.uint64(0xE7037ED1A0B428DB), np.uint64(0x8EBC6AF09C88C6E3)),
    (np.uint64(0x589965CC75374CC3), np.uint64(0x1D8E4E27C47D124F)),
)
_FOLD = np.uint64(32)
_EMPTY = -1


class NameTable:
    """Index of the last position of each name; immutable and thread-safe."""

    def __init__(self, words: Words) -> None:
        """Indexes `words`, uint64 [n, 2], which must not change while the table is used."""
        self._words = words
        self._tables: list[npt.NDArray[np.int32]] = []
        self._rest: dict[bytes, int] = {}
        self._is_last = np.zeros(len(words), dtype=np.bool_)
        positions = np.arange(len(words))
        own = words
        for number in range(len(_ROUNDS)):
            buckets = _buckets(own, number, _num_bits(len(own)))
            table = np.full(1 << _num_bits(len(own)), _EMPTY, dtype=np.int32)
            table[buckets] = positions  # of equal buckets the last one stays
            self._tables.append(table)
            winners = table[buckets]
            is_winner = winners == positions
            self._is_last[positions[is_winner]] = True
            lost = np.flatnonzero(~is_winner)
            lost = lost[_differ(own[lost], words[winners[lost]])]
            positions = positions[lost]
            if not positions.size:
                return
            own = own[lost]
        for position in positions.tolist():  # a handful, or names made to collide
            self._rest[words[position].tobytes()] = position
        self._is_last[list(self._rest.values())] = True

    @property
    def is_last(self) -> npt.NDArray[np.bool_]:
        """Whether no later position has the same name, bool [n]."""
        return self._is_last

    def find(self, words: Words) -> SlotIds:
        """Last position of each of the names `words`, uint64 [m, 2]; -1 for names that are not there. int64 [m]."""
        found = np.full(len(words), -1, dtype=np.int64)
        open_ones = np.arange(len(words))
        for number, table in enumerate(self._tables):
            own = words[open_ones]
            at = table[_buckets(own, number, table.size.bit_length() - 1)]
            is_there = at != _EMPTY  # an empty bucket: not in a later round either
            open_ones, own, at = open_ones[is_there], own[is_there], at[is_there]
            differs = _differ(own, self._words[at])
            found[open_ones[~differs]] = at[~differs]
            open_ones = open_ones[differs]
            if not open_ones.size:
                return found
        for i in open_ones.tolist() if self._rest else ():
            found[i] = self._rest.get(words[i].tobytes(), -1)
        return found


def name_words(names: Names) -> Words:
    """Names as words; no copy."""
    words: Words = names.reshape(-1).view("<u8").reshape(-1, 2)
    return words


def _differ(left: Words, right: Words) -> npt.NDArray[np.bool_]:
    differ: npt.NDArray[np.bool_] = (left[:, 0] != right[:, 0]) | (left[:, 1] != right[:, 1])
    return differ


def _num_bits(num_entries: int) -> int:
    return (max(1, num_entries) * 4 - 1).bit_length()


def _buckets(words: Words, number: int, num_bits: int) -> SlotIds:
    low_factor, high_factor = _ROUNDS[number]
    state = words[:, 0] * low_factor
    state ^= state >> _FOLD
    state += words[:, 1]
    state *= high_factor
    state >>= np.uint64(64 - num_bits)
    return state.view(np.int64)
