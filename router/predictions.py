"""Blocks that workers will hold soon, since requests were sent there: believed for a while, then forgotten."""

import heapq
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from sys import getsizeof

__all__ = ["Prediction", "Predictions"]

_KEY_BYTES = 48 + 8  # the key, which no other table need have, and its place in the prediction
_PREDICTION_BYTES = 300


@dataclass(slots=True, order=True)
class Prediction:
    """One request's leading blocks at one worker.

    Attributes:
        expires_s: believed before this time only.
        number: in the order of making, from 0.
        slot: the worker.
        incarnation: of the worker when it was made; predictions of an earlier one are void.
        keys: leading blocks of the request, u64; shortened from the end once it is being forgotten.
    """

    expires_s: float
    number: int
    slot: int = field(compare=False)
    incarnation: int = field(compare=False)
    keys: "array[int]" = field(compare=False)

    __hash__ = object.__hash__


class Predictions:
    """Key → predictions of it, at most one for each worker: the one that expires last. Not thread-safe.

    Bounded: beyond `max_blocks`, those go first that would expire first. What is believed of a worker is therefore always a
    prefix of any sequence, as every prediction starts with a sequence's first block.

    Attributes:
        num_blocks: keys of all predictions, counted once for each.
        num_evicted: keys that the bound cost, in all.
    """

    __slots__ = ("_by_key", "_heap", "_incarnations", "_max_blocks", "_next_number", "num_blocks", "num_evicted")

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._by_key: dict[int, tuple[Prediction, ...]] = {}
        self._heap: list[Prediction] = []
        self._incarnations: dict[int, int] = {}
        self._next_number = 0
        self.num_blocks = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        """Predictions that are not forgotten yet."""
        return len(self._heap)

    def add(self, slot: int, keys: Sequence[int], expires_s: float) -> None:
        """Believes until `expires_s`, exclusive, that the worker holds `keys`, the leading blocks of a sequence."""
        if not keys:
            return
        new = Prediction(expires_s, self._next_number, slot, self._incarnations.get(slot, 0), array("Q", keys))
        self._next_number += 1
        old = list(map(self._by_key.get, keys))
        changed = {value: self._with(value, new) for value in set(old)}
        self._by_key.update(zip(keys, map(changed.__getitem__, old), strict=True))
        heapq.heappush(self._heap, new)
        self.num_blocks += len(keys)
        if self.num_blocks > self._max_blocks:
            self.num_evicted += self._shorten(self.num_blocks - self._max_blocks, float("inf"))

    def void(self, slot: int) -> None:
        """Believes nothing of the worker any more, at once; its traces are forgotten when they expire."""
        self._incarnations[slot] = self._incarnations.get(slot, 0) + 1

    def workers(self, key: int, now_s: float) -> int:
        """Bit `1 << slot` of every worker that is believed to hold `key`."""
        mask = 0
        for prediction in self._by_key.get(key, ()):
            if prediction.expires_s > now_s and prediction.incarnation == self._incarnations.get(prediction.slot, 0):
                mask |= 1 << prediction.slot
        return mask

    def forget(self, now_s: float, max_keys: int) -> int:
        """Frees the memory of up to `max_keys` keys of what expired. Returns how many it was."""
        return self._shorten(max_keys, now_s)

    def num_bytes(self) -> int:
        """Memory of keys, dict and predictions."""
        return getsizeof(self._by_key) + _KEY_BYTES * self.num_blocks + _PREDICTION_BYTES * len(self._heap)

    def _with(self, old: tuple[Prediction, ...] | None, new: Prediction) -> tuple[Prediction, ...]:
        """`old` with `new`; of two of one worker the later one, unless the worker was another then."""
        others = []
        for prediction in old or ():
            if prediction.slot != new.slot:
                others.append(prediction)
            elif prediction.incarnation == new.incarnation and prediction.expires_s > new.expires_s:
                return old or ()
        return (*others, new)

    def _shorten(self, num_keys: int, until_s: float) -> int:
        """Takes keys off the ends of what expires at `until_s` or before, soonest first."""
        left = num_keys
        while left > 0 and self._heap and self._heap[0].expires_s <= until_s:
            first = self._heap[0]
            keys = first.keys[-left:].tolist()
            del first.keys[-left:]
            if not first.keys:
                heapq.heappop(self._heap)
            self._drop(first, keys)
            left -= len(keys)
            self.num_blocks -= len(keys)
        return num_keys - left

    def _drop(self, prediction: Prediction, keys: list[int]) -> None:
        by_key = self._by_key
        for key in keys:
            rest = tuple(p for p in by_key.get(key, ()) if p is not prediction)
            if rest:
                by_key[key] = rest
            else:
                by_key.pop(key, None)

    def check_invariants(self) -> None:
        """Raises AssertionError if dict, heap and counters do not fit together."""
        assert self.num_blocks == sum(len(p.keys) for p in self._heap), "predicted blocks are miscounted"
        assert self.num_blocks <= self._max_blocks, f"{self.num_blocks} predicted blocks exceed {self._max_blocks}"
        listed: Mapping[int, set[int]] = {p.number: set(p.keys) for p in self._heap}
        for key, value in self._by_key.items():
            assert value, f"nobody is predicted to hold {key:#x}, which is kept"
            assert len({p.slot for p in value}) == len(value), f"{key:#x} is predicted twice for one worker"
            assert all(key in listed.get(p.number, ()) for p in value), (
                f"{key:#x} is in a prediction that was forgotten"
            )
