"""How likely a chain is to be used again, by its age and by what kind of use left it: learned, never configured.

A *group* is a kind of use: which part of a chain, its turn, how many tokens were new, how long the answer was. For each group
the hazard of reuse (events per second) is estimated in bins of age, from all uses of the past, whether their blocks were
still cached or not: a use that ended in reuse is an event, a use that waits is exposure (the actuarial estimate of survival
analysis). Groups with little evidence are shrunk in three steps, each towards the one before:

    1. the shape over age, pooled over all groups of a part. Before anything was seen it falls like 1 / age, for which the best
       order is least recently used: what is not understood is treated as LRU treats it. Evidence bends it from coarse to
       fine: its height first, then over ages within about a factor of six, then within half as much again, then bin by bin;
    2. that shape times a factor for the turn and new tokens and one for the length of the answer (iterative proportional
       fitting), times what the group itself shows;
    3. the group's own shape, from coarse to fine too.

Coarse before fine matters most in the first few hundred uses. The index is a maximum over horizons and eviction looks for
its minimum over entries: both find the noise, if there is any, which a shape that is fitted bin by bin then is full of.

The value of keeping a block of a group at an age is its Gittins index: over all horizons, the best ratio of the chance of a
hit to the expected time until that hit or the horizon. That is least hit density (Beckmann, Chen, Cidon: LHD, NSDI 2018,
https://www.usenix.org/conference/nsdi18/presentation/beckmann), with the horizon chosen best.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.eviction import Part, Use

__all__ = ["NUM_GROUPS", "HazardEstimator", "ReuseTables", "group_of"]

Floats = npt.NDArray[np.float64]

_AGE_EDGES_S: Floats = np.concatenate(([0.0, 2.0, 5.0], 10.0 * 1.12 ** np.arange(82)))
"""Bins: finer than think times, as wide as 12 % of the age behind 10 s, the last one open beyond a day."""
_NUM_BINS = len(_AGE_EDGES_S) - 1
_WIDTHS_S: Floats = np.diff(_AGE_EDGES_S)
_MIDDLES_S: Floats = (_AGE_EDGES_S[1:] + _AGE_EDGES_S[:-1]) / 2

_NEW_TOKEN_LIMITS = (64, 256, 1024, 4096, 16384)
_OUTPUT_TOKEN_LIMITS = (64, 256)
_TURNS, _NEW, _OUTPUTS = 4, len(_NEW_TOKEN_LIMITS) + 1, len(_OUTPUT_TOKEN_LIMITS) + 1
_SHARERS = 8
_PROMPT_GROUPS = _TURNS * _NEW * _OUTPUTS
_ANSWER_GROUPS = 2 * _OUTPUTS
_FIRST_GROUP = (0, _PROMPT_GROUPS, 2 * _PROMPT_GROUPS, 2 * _PROMPT_GROUPS + _ANSWER_GROUPS)  # of each part
NUM_GROUPS = 2 * _PROMPT_GROUPS + _ANSWER_GROUPS + _SHARERS
_PART_GROUPS = tuple(slice(*ends) for ends in pairwise((*_FIRST_GROUP, NUM_GROUPS)))
_PROMPT_FACTORS = (np.arange(_PROMPT_GROUPS) // _OUTPUTS, np.arange(_PROMPT_GROUPS) % _OUTPUTS)

_FIRST_HAZARDS: Floats = 1 / (60 * (_MIDDLES_S + 10))  # per second, before anything was seen
_FACTOR_EVENTS = 4.0  # evidence, in events, that outweighs the prior of each step
_RATIO_EVENTS = 4.0
_TURNS_AHEAD = 8
_FIT_SWEEPS = 2
_HALF_LIFE = 65536  # uses after which evidence counts half, so that new habits are learned
_LEAST_SECONDS = 1e-6


def _kernel(num_bins: float) -> Floats:
    """Weights [bins, bins] that fall with the distance, to 1 / e after `num_bins`."""
    return np.asarray(np.exp(-np.abs(np.arange(_NUM_BINS)[:, None] - np.arange(_NUM_BINS)) / num_bins))


# Coarse to fine, and the evidence, in events, that outweighs the step before. Sixteen bins are a factor of six in age.
_POOLED_STEPS = ((_kernel(math.inf), 2.0), (_kernel(16), 6.0), (_kernel(4), 6.0), (np.eye(_NUM_BINS), 4.0))
_GROUP_STEPS = ((_kernel(6), 2.0), (_kernel(2), 2.0))


def group_of(use: Use) -> int:
    """Group of a use or of one of its parts."""
    first = _FIRST_GROUP[use.part]
    if use.part is Part.SHARED:
        return first + min(use.num_sharers.bit_length(), _SHARERS - 1)
    output = bisect_right(_OUTPUT_TOKEN_LIMITS, use.num_output_tokens)
    if use.part is Part.ANSWER:
        return first + min(use.turn, 1) * _OUTPUTS + output
    new = bisect_right(_NEW_TOKEN_LIMITS, use.num_new_tokens)
    return first + (min(use.turn, _TURNS - 1) * _NEW + new) * _OUTPUTS + output


@dataclass(frozen=True, slots=True)
class ReuseTables:
    """What was learned until some moment. Immutable; arrays [NUM_GROUPS, number of age bins].

    Attributes:
        index: hits per second and block for as long as keeping one is best (Gittins index).
        hits: chance of a hit before the *end* of a bin, from age 0.
        occupied_s: expected seconds until a hit or the end of a bin, from age 0.
        follows: [NUM_GROUPS, NUM_GROUPS], the chance that the use that makes the hit is of which group.
    """

    index: Floats
    hits: Floats
    occupied_s: Floats
    follows: Floats

    def ranks(self, groups: npt.NDArray[np.int64], ages_s: Floats) -> Floats:
        """Index of each entry at its age."""
        bins = np.searchsorted(_AGE_EDGES_S, ages_s, side="right") - 1
        return self.index[groups, np.clip(bins, 0, _NUM_BINS - 1)]

    def write_gain(self, price: float, write_cost: float) -> Floats:
        """What writing a block of each group now gains over leaving it to the next use of its chain, in hits.

        The value of a resident block and that of a block outside, each for the best that can be done from then on, follow
        from one another turn by turn. A resident block brings its hits, one after the other without being written again,
        less `price` hits for each second in its slot, until it goes. A block outside may be written at its next use.
        """
        resident: Floats = np.zeros(NUM_GROUPS)
        outside: Floats = np.zeros(NUM_GROUPS)
        later = outside
        place = price * self.occupied_s
        kept = np.empty_like(place)
        for _ in range(_TURNS_AHEAD):
            after_miss = self.follows @ outside
            after_hit = 1 + self.follows @ resident
            np.multiply(self.hits, (after_hit - after_miss)[:, None], out=kept)
            kept -= place
            later = self.hits[:, -1] * after_miss
            resident = np.maximum(0.0, kept.max(axis=1)) + later
            outside = np.maximum(resident - write_cost, later)
        return np.asarray(resident - write_cost - later)


class HazardEstimator:
    """Counts events and exposure. Not thread-safe. Memory is bounded: the oldest waiting uses are given up.

    A waiting use is an *item*: a number that grows, at `item % capacity` in a ring.
    """

    def __init__(self, capacity: int = 32768) -> None:
        self._capacity = capacity
        self._next = 0
        self._begun_s = np.zeros(capacity)
        self._group = np.full(capacity, -1, dtype=np.int64)  # -1: no longer waiting
        self._events = np.zeros((NUM_GROUPS, _NUM_BINS))
        self._exposure = np.zeros((NUM_GROUPS, _NUM_BINS))  # in uses that lived through the bin
        self._follows = np.zeros((NUM_GROUPS, NUM_GROUPS))  # how often a use of one was continued by one of another

    def begin(self, group: int, now_s: float) -> int:
        """A use begins to wait for its reuse."""
        item = self._next
        place = item % self._capacity
        if self._group[place] >= 0:
            self._end(place, now_s)
        self._begun_s[place] = now_s
        self._group[place] = group
        self._next = item + 1
        return item

    def regroup(self, item: int, group: int) -> None:
        """More is known about a waiting use."""
        if self._is_waiting(item):
            self._group[item % self._capacity] = group

    def reused(self, item: int, now_s: float) -> int | None:
        """The wait is over. Returns the group that waited, or None if the wait was over before."""
        if not self._is_waiting(item):
            return None
        group, age_bin = self._end(item % self._capacity, now_s)
        self._events[group, age_bin] += 1
        return group

    def followed(self, group: int, by: int) -> None:
        """Blocks that a use of one group left were used again by one of another."""
        self._follows[group, by] += 1

    def fade(self, num_uses: int) -> None:
        """Lets evidence lose weight because `num_uses` more were seen."""
        fade = 0.5 ** (num_uses / _HALF_LIFE)
        self._events *= fade
        self._exposure *= fade
        self._follows *= fade

    def tables(self, now_s: float) -> ReuseTables:
        """Estimates from all that was seen. A few milliseconds."""
        exposure_s = (self._exposure + self._waiting_exposure(now_s)) * _WIDTHS_S
        hazards = np.empty_like(exposure_s)
        for groups, factors in zip(_PART_GROUPS, (_PROMPT_FACTORS, _PROMPT_FACTORS, (), ()), strict=True):
            hazards[groups] = _hazards(self._events[groups], exposure_s[groups], factors)
        follows = self._follows / np.maximum(self._follows.sum(axis=1, keepdims=True), 1)
        return _tables(hazards, follows)

    def _is_waiting(self, item: int) -> bool:
        return item >= self._next - self._capacity and bool(self._group[item % self._capacity] >= 0)

    def _end(self, place: int, now_s: float) -> tuple[int, int]:
        group = int(self._group[place])
        age_bin = int(np.searchsorted(_AGE_EDGES_S, now_s - self._begun_s[place], side="right")) - 1
        age_bin = min(max(age_bin, 0), _NUM_BINS - 1)
        self._exposure[group, :age_bin] += 1
        self._exposure[group, age_bin] += 0.5
        self._group[place] = -1
        return group, age_bin

    def _waiting_exposure(self, now_s: float) -> Floats:
        waiting = np.flatnonzero(self._group >= 0)
        bins = np.searchsorted(_AGE_EDGES_S, now_s - self._begun_s[waiting], side="right") - 1
        places = self._group[waiting] * _NUM_BINS + np.clip(bins, 0, _NUM_BINS - 1)
        counts = np.bincount(places, minlength=NUM_GROUPS * _NUM_BINS).reshape(NUM_GROUPS, _NUM_BINS)
        return np.asarray(np.cumsum(counts[:, ::-1], axis=1)[:, ::-1] - 0.5 * counts)


def _hazards(events: Floats, exposure_s: Floats, factors: tuple[npt.NDArray[np.int64], ...]) -> Floats:
    """Hazards [groups, bins] of one part, per second, by the three steps of the module's docstring."""
    shape = _refined(_FIRST_HAZARDS, events.sum(axis=0), exposure_s.sum(axis=0), _POOLED_STEPS)
    expected = exposure_s * shape
    seen, foreseen = events.sum(axis=1), expected.sum(axis=1)
    ratio = np.ones(len(seen))
    for _ in range(_FIT_SWEEPS):
        for level in factors:
            seen_of = np.bincount(level, seen) + _FACTOR_EVENTS
            ratio *= (seen_of / (np.bincount(level, foreseen * ratio) + _FACTOR_EVENTS))[level]
    ratio *= (seen + _RATIO_EVENTS) / (foreseen * ratio + _RATIO_EVENTS)
    return _refined(ratio[:, None] * shape, events, exposure_s, _GROUP_STEPS)


def _refined(hazards: Floats, events: Floats, exposure_s: Floats, steps: Sequence[tuple[Floats, float]]) -> Floats:
    """Bends hazards [..., bins] to what was seen: gamma-Poisson shrinkage, once for each (kernel, events of the prior)."""
    for kernel, prior_events in steps:
        hazards = hazards * (events @ kernel + prior_events) / ((exposure_s * hazards) @ kernel + prior_events)
    return hazards


def _tables(hazards: Floats, follows: Floats) -> ReuseTables:
    steps = hazards * _WIDTHS_S
    chance = -np.expm1(-steps)
    time_s = chance / hazards
    survival = np.exp(-np.cumsum(steps, axis=1))
    begin = np.concatenate((np.ones((len(hazards), 1)), survival[:, :-1]), axis=1)
    hits = np.cumsum(begin * chance, axis=1)
    occupied_s = np.cumsum(begin * time_s, axis=1)
    index = hazards.copy()  # a horizon of one bin; of longer ones, those whose differences are more than rounding count
    for k in range(_NUM_BINS):
        past_hits = hits[:, k - 1 : k] if k else 0.0
        past_s = occupied_s[:, k - 1 : k] if k else 0.0
        seconds = occupied_s[:, k:] - past_s
        ratios = np.where(seconds > _LEAST_SECONDS, (hits[:, k:] - past_hits) / np.maximum(seconds, _LEAST_SECONDS), 0)
        np.maximum(index[:, k], ratios.max(axis=1), out=index[:, k])
    return ReuseTables(index, hits, occupied_s, follows)
