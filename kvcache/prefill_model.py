"""How long it takes to compute tokens of a prompt, learned from steps that were measured.

    seconds = step_s · steps + token_s · n + pair_s · n · (context + n / 2)

Computing n tokens behind `context` others costs something for each step, something for each token (the matrices) and
something for each pair of a token and one it attends to. The three are fitted so that relative errors are small in
absolute value, not squared: a step that was held up by something else does not move them.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PrefillCost", "PrefillModel"]

_Floats = npt.NDArray[np.float64]

_MIN_STEPS = 4  # fewer say too little; the first of an engine also pays for what is done once
_STEPS_PER_KIND = 8
_HALF_LIFE_STEPS = 256
_NUM_FITS = 6
_FIT_FLOOR = 0.02  # errors below 2 % are alike
# Where steps do not tell the three costs apart, e.g. because all were alike, the cost is one of tokens: what is cheap far
# from anything measured makes the caller wait less.
_PRIOR = np.array([0.03, 1e-4, 0.03])
_SURE_QUANTILE = 0.25
_SURE_RANGE = (0.5, 1.0)
_UNSURE = 0.8  # taken as sure before there are enough steps to see how much they differ
_ENOUGH_STEPS = 8


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """What computing costs, as of one moment.

    Attributes:
        step_s: of each step.
        token_s: of each token.
        pair_s: of each token and token it attends to.
        step_tokens: most tokens that a step computes.
        sure: share of the modelled time that nearly all steps really take.
    """

    step_s: float
    token_s: float
    pair_s: float
    step_tokens: int
    sure: float

    @property
    def tokens_per_s(self) -> float:
        """Of the first step of a long prompt."""
        return self.step_tokens / max(1e-9, self.seconds_between(0, self.step_tokens))

    def seconds(self, starts: npt.NDArray[np.int64], end: int) -> _Floats:
        """float64 [n]: time to compute tokens [starts[i], end) of one prompt."""
        tokens = np.maximum(0, end - starts).astype(np.float64)
        steps = np.ceil(tokens / self.step_tokens)
        return self.step_s * steps + self.token_s * tokens + self.pair_s * tokens * (end + starts) / 2

    def seconds_between(self, start: int, end: int) -> float:
        """Time to compute tokens [start, end)."""
        return float(self.seconds(np.array([start], dtype=np.int64), end)[0])


class PrefillModel:
    """Learns `PrefillCost`. Not thread-safe.

    Keeps the last few steps of each kind - by the magnitude of their tokens and of their context - so that many short
    prompts do not make it forget the long ones; old steps count less.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[int, int], deque[tuple[int, float, float, float]]] = {}
        self._num_observed = 0
        self._num_fitted = 0
        self._cost: PrefillCost | None = None

    def observe(self, num_tokens: int, context_tokens: float, seconds: float) -> None:
        """Takes note of a step that computed `num_tokens` tokens of prompts, each behind `context_tokens` others."""
        if num_tokens < 1 or not 0 < seconds < math.inf:
            return
        kind = num_tokens.bit_length(), int(context_tokens).bit_length()
        steps = self._steps.setdefault(kind, deque(maxlen=_STEPS_PER_KIND))
        steps.append((self._num_observed, float(num_tokens), context_tokens, seconds))
        self._num_observed += 1

    def cost(self) -> PrefillCost | None:
        """What is known; None before enough was observed."""
        if self._num_observed < _MIN_STEPS:
            return None
        if self._cost is None or self._num_observed - self._num_fitted >= max(1, self._num_fitted // 32):
            self._cost = self._fit()
            self._num_fitted = self._num_observed
        return self._cost

    def _fit(self) -> PrefillCost:
        numbers, tokens, contexts, seconds = np.array([step for kind in self._steps.values() for step in kind]).T
        terms = np.stack((np.ones_like(tokens), tokens, tokens * (contexts + tokens / 2)), axis=1) / seconds[:, None]
        scales = np.maximum(terms.max(axis=0), 1e-300)
        terms /= scales
        ages = 0.5 ** ((self._num_observed - numbers) / _HALF_LIFE_STEPS)
        weights = ages
        for _ in range(_NUM_FITS):
            costs = _non_negative_fit(terms, np.sqrt(weights))
            errors = np.abs(terms @ costs - 1.0)
            weights = ages / np.maximum(errors, _FIT_FLOOR)
        step_s, token_s, pair_s = (costs / scales).tolist()
        modelled = terms @ costs
        sure = _UNSURE
        ratios = 1.0 / np.maximum(modelled[tokens >= tokens.max() / 4], 1e-9)  # real over modelled, of what takes long
        if len(ratios) >= _ENOUGH_STEPS:
            sure = float(np.clip(np.quantile(ratios, _SURE_QUANTILE), *_SURE_RANGE))
        return PrefillCost(step_s, token_s, pair_s, int(tokens.max()), sure)


def _non_negative_fit(terms: _Floats, weights: _Floats) -> _Floats:
    """Least squares of `terms @ costs = 1` with no cost below 0: what would be is left out, the worst first."""
    prior = np.diag(_PRIOR * math.sqrt(float(np.square(weights).sum())))
    left = np.concatenate((terms * weights[:, None], prior))
    right = np.concatenate((weights, np.zeros(len(prior))))
    costs = np.zeros(terms.shape[1])
    kept = list(range(terms.shape[1]))
    while kept:
        found = np.linalg.lstsq(left[:, kept], right, rcond=None)[0]
        if found.min() >= 0.0:
            costs[kept] = found
            break
        del kept[int(found.argmin())]
    return costs
