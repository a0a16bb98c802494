"""The estimator of hazards: what it makes of little evidence."""

import math
import random
from statistics import mean

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.eviction import Use
from dynamo.kvcache.hazards import HazardEstimator, group_of

GROUP = group_of(Use(1, 0.0, num_new_tokens=1000, num_output_tokens=100))
AGES_S = np.array([3.0, 10.0, 20.0, 40.0, 80.0, 120.0, 160.0, 200.0, 250.0])


def learned_ranks(num_uses: int, seed: int) -> npt.NDArray[np.float64]:
    """One use a second, of which half come back after a minute or so; what is learned when the last one has begun."""
    rng = random.Random(seed)
    moments = []
    for number in range(num_uses):
        moments.append((float(number), number, False))
        if rng.random() < 0.5:
            moments.append((number + rng.lognormvariate(math.log(60), 1), number, True))
    estimator, items = HazardEstimator(), {}
    for now_s, number, is_back in sorted(moments):
        if now_s > num_uses:
            break
        if is_back:
            estimator.reused(items[number], now_s)
        else:
            items[number] = estimator.begin(GROUP, now_s)
    return estimator.tables(float(num_uses)).ranks(np.full(len(AGES_S), GROUP), AGES_S)


def test_a_hundred_uses_tell_roughly_what_thousands_tell():
    """Also of ages at which hardly one of them was still waiting."""
    truth = learned_ranks(20_000, 0)
    errors = [np.abs(np.log(learned_ranks(100, seed) / truth)) for seed in range(1, 21)]
    assert mean(float(error.mean()) for error in errors) < 0.45
    assert max(np.mean(errors, axis=0)) < 0.8


def test_without_evidence_the_oldest_of_a_group_goes_first():
    ranks = HazardEstimator().tables(0.0).ranks(np.full(len(AGES_S), GROUP), AGES_S)
    assert (np.diff(ranks) < 0).all()
