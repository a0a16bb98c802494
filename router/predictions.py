"""Blocks that workers will hold soon, since requests were sent there: believed for a while, then forgotten."""

import heapq
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from sys import getsizeof

__all__ = ["Prediction", "Predictions"]

_KEY_BYTES = 48 + 8  # the key, which no other table need have, and its place in the prediction
_PREDICTION_BYTES = 500


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


@dataclass(slots=True, eq=False)
class _Belief:
    """All predictions of a block; one object for all blocks that are in the same ones.

    Attributes:
        predictions: at most one for each worker.
        workers: bit `1 << slot` of those whose prediction holds, until `until_s` and while no further prediction is voided.
        until_s: when the first of these expires.
        num_voided: predictions had been voided so often when `workers` was made.
    """

    predictions: tuple[Prediction, ...]
    workers: int = 0
    until_s: float = float("-inf")
    num_voided: int = -1


class Predictions:
    """Key → predictions of it, for each worker the one that expires last. Not thread-safe.

    Bounded: beyond `max_blocks`, those go first that would expire first. What is believed of a worker is therefore always a
    prefix of any sequence, as every prediction starts with a sequence's first block.

    Attributes:
        num_blocks: keys of all predictions, counted once for each.
        num_evicted: keys that the bound cost, in all.
    """

    __slots__ = (
        "_beliefs",
        "_heap",
        "_incarnations",
        "_max_blocks",
        "_next_number",
        "_num_voided",
        "num_blocks",
        "num_evicted",
    )

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._beliefs: dict[int, _Belief] = {}
        self._heap: list[Prediction] = []
        self._incarnations: dict[int, int] = {}
        self._next_number = 0
        self._num_voided = 0
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
        num_known = bisect_left(keys, True, key=lambda key: key not in self._beliefs)  # what is believed is a prefix
        self._beliefs.update(dict.fromkeys(keys[num_known:], _Belief((new,))))
        old = list(map(self._beliefs.get, keys[:num_known]))
        self._change(keys, old, {belief: self._with(belief, new) for belief in set(old)})
        heapq.heappush(self._heap, new)
        self.num_blocks += len(keys)
        if self.num_blocks > self._max_blocks:
            self.num_evicted += self._shorten(self.num_blocks - self._max_blocks, float("inf"))

    def void(self, slot: int) -> None:
        """Believes nothing of the worker any more, at once; its traces are forgotten when they expire."""
        self._incarnations[slot] = self._incarnations.get(slot, 0) + 1
        self._num_voided += 1

    def workers(self, key: int, now_s: float) -> int:
        """Bit `1 << slot` of every worker that is believed to hold `key`."""
        belief = self._beliefs.get(key)
        if belief is None:
            return 0
        if belief.until_s <= now_s or belief.num_voided != self._num_voided:
            return self._workers(belief, now_s)
        return belief.workers

    def forget(self, now_s: float, max_keys: int) -> int:
        """Frees the memory of up to `max_keys` keys of what expired. Returns how many it was."""
        return self._shorten(max_keys, now_s)

    def num_bytes(self) -> int:
        """Memory of keys, dict and predictions."""
        return getsizeof(self._beliefs) + _KEY_BYTES * self.num_blocks + _PREDICTION_BYTES * len(self._heap)

    def _workers(self, belief: _Belief, now_s: float) -> int:
        """`workers` from scratch; remembered while nothing has expired, so that a look-up at an earlier time is right too."""
        mask, until_s = 0, float("inf")
        has_expired = False
        for prediction in belief.predictions:
            if prediction.incarnation != self._incarnations.get(prediction.slot, 0):
                continue
            if prediction.expires_s > now_s:
                mask |= 1 << prediction.slot
                until_s = min(until_s, prediction.expires_s)
            else:
                has_expired = True
        if not has_expired:
            belief.workers, belief.until_s, belief.num_voided = mask, until_s, self._num_voided
        return mask

    def _with(self, old: _Belief | None, new: Prediction) -> _Belief:
        """`old` with `new`; of two of one worker the later one, unless the worker was another then."""
        others = []
        for prediction in old.predictions if old is not None else ():
            if prediction.slot != new.slot:
                others.append(prediction)
            elif prediction.incarnation == new.incarnation and prediction.expires_s > new.expires_s:
                assert old is not None
                return old
        return _Belief((*others, new))

    def _change(
        self, keys: Sequence[int], old: list[_Belief | None], changed: Mapping[_Belief | None, _Belief | None]
    ) -> None:
        """Gives each key what its belief became; None forgets it. As a rule keys of one belief follow one another."""
        for belief, new in changed.items():
            if new is belief:
                continue
            count, first = old.count(belief), old.index(belief)
            if old[first : first + count].count(belief) == count:
                stretch = keys[first : first + count]
            else:
                stretch = [key for key, one in zip(keys, old, strict=True) if one is belief]
            if new is None:
                deque(map(self._beliefs.pop, stretch, repeat(None)), maxlen=0)
            else:
                self._beliefs.update(dict.fromkeys(stretch, new))

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
        """Forgets one prediction of each of the keys; where another took its place, nothing."""
        old = list(map(self._beliefs.get, keys))
        changed: dict[_Belief | None, _Belief | None] = {}
        for belief in set(old):
            predictions = belief.predictions if belief is not None else ()
            rest = tuple(one for one in predictions if one is not prediction)
            if len(rest) == len(predictions):
                changed[belief] = belief
            else:
                changed[belief] = _Belief(rest) if rest else None
        self._change(keys, old, changed)

    def check_invariants(self) -> None:
        """Raises AssertionError if dict, heap and counters do not fit together."""
        assert self.num_blocks == sum(len(p.keys) for p in self._heap), "predicted blocks are miscounted"
        assert self.num_blocks <= self._max_blocks, f"{self.num_blocks} predicted blocks exceed {self._max_blocks}"
        listed = {p.number: set(p.keys) for p in self._heap}
        for key, belief in self._beliefs.items():
            predictions = belief.predictions
            assert predictions, f"nobody is predicted to hold {key:#x}, which is kept"
            assert len({p.slot for p in predictions}) == len(predictions), f"{key:#x} is predicted twice for one worker"
            assert all(key in listed.get(p.number, ()) for p in predictions), f"{key:#x}: its prediction was forgotten"
