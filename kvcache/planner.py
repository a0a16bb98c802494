"""Load or compute: how much of a cached prefix is worth loading, and when waiting for it has cost enough.

Blocks of a prefix that lie in lower tiers can be loaded or computed again. There are two ways to do some of both:

    one after the other   [first ... first + k)  loaded, by each tier's lane beside the others
                          [first + k ..... end)  computed when the loads have ended
    from both ends        [first ...... meeting) computed, from the start on
                          [meeting ........ end) loaded meanwhile, from the end on, where computing is dearest

One after the other is for callers who wait for what they load: `LoadPlanner.plan` takes the k with the least expected time to
the first token. The prediction may be wrong, as a disk gets slow; then a `LoadWatch` lets the load go on for as long as it
would have taken to compute what has arrived, and a little patience more. Time waited <= time saved + patience.

From both ends is for callers who compute in pieces: blocks that are loaded stay good whoever computes what precedes them, so
nobody needs to choose. Here `LoadPlanner.plan_overlapped` only says how long a load is so fast that computing meanwhile would
be a waste of the device; see `overlap`. The idea is Cake's (https://arxiv.org/abs/2410.03065).
"""

import logging
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.lane_meter import LaneMeter, LaneSpeed
from dynamo.kvcache.load_decision import LoadDecision, LoadKind, LoadQuestion
from dynamo.kvcache.load_watch import LoadWatch
from dynamo.kvcache.prefill_model import PrefillCost, PrefillModel
from dynamo.tiers.tier import Outcomes
from dynamo.tiers.transfer import Transfer

__all__ = ["FAST_SHARE", "LoadPlanner", "PlannerStats", "growing_parts"]

logger = logging.getLogger(__name__)

FAST_SHARE = 0.25
"""Of the time that computing takes: loads in less are waited for where computing meanwhile would be possible."""

_GUESSED_COST = PrefillCost(step_s=0.0, token_s=2e-4, pair_s=0.0, step_tokens=512, sure=1.0)
_GUESSED_PATIENCE_S = 0.025  # for the first loads of an engine, from a tier of which nothing is known either
_COLD_START_S = 0.005  # for those from one that is known: they pay for cold threads
_MIN_PATIENCE_S = 0.002  # what a wait for a thread costs anyway
_SHORT_SHARE = 0.2  # of what a short prompt saves, it may lose when a disk gets slow all of a sudden
_TRUSTING_PATIENCE_S = 0.010  # likewise on a busy machine; only where the tier's last load came in time,
_TRUSTING_PATIENCE = 0.04  # and no more than this share of the time to compute
_FIRST_PART = 0.01  # of a load: two parts run at once, so the first has come when the patience ends
_PART_GROWTH = 0.25  # of what precedes it: a part has come before what precedes it is used up
_MAX_UNSETTLED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerStats:
    """Decisions since the cache was made, and what they are based on now.

    Attributes:
        decisions: number by kind: "loaded" all that there was, "split" into loaded and computed, "computed" although it
            could have been loaded, and "gave_up" a load that was too slow, with what had come until then.
        regret_s: time to first token lost by decisions, as far as is known afterwards, by the tier they were about.
        declined_blocks: blocks that a tier held and that were computed because that was faster, or sooner.
        lane_bytes_per_s: measured speed of each tier's loads.
        prefill_tokens_per_s: measured speed of computing a step of a new prompt; None before it is known.
    """

    decisions: Mapping[LoadKind, int]
    regret_s: Mapping[str, float]
    declined_blocks: int
    lane_bytes_per_s: Mapping[str, float]
    prefill_tokens_per_s: float | None


class LoadPlanner:
    """Learns what loading and computing cost, and decides between them. Thread-safe.

    Args:
        block_size: tokens of a block.
        block_bytes: bytes of a block, for what `stats` tells.
        patience: share of the time to compute a prompt that a load may cost without having brought anything; None: all
            that can be is loaded, however long it takes.
        clock: seconds that only go up.
    """

    def __init__(
        self,
        *,
        block_size: int,
        block_bytes: int,
        patience: float | None = 0.03,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._block_size = block_size
        self._patience = patience
        self._block_bytes = block_bytes
        self._clock = clock
        self._lock = threading.Lock()  # guards all below
        self._prefill = PrefillModel()
        self._lanes: dict[str, LaneMeter] = {}
        self._decisions: Counter[LoadKind] = Counter()
        self._regret_s: defaultdict[str, float] = defaultdict(float)
        self._declined_blocks = 0
        # When it was decided, about what, and how many of its blocks were loaded.
        self._unsettled: deque[tuple[float, LoadQuestion, int]] = deque(maxlen=_MAX_UNSETTLED)

    def observe_compute(self, num_tokens: int, context_tokens: float, seconds: float) -> None:
        """See `KVCache.observe_compute`."""
        with self._lock:
            self._prefill.observe(num_tokens, context_tokens, seconds)

    def expect(self, tier: str, load: int, num_blocks: int) -> None:
        """Says that the load of that number is about to bring blocks of `tier`."""
        with self._lock:
            self._lane(tier).expect(load, num_blocks)

    def begin_trial(self, tier: str) -> None:
        """Says that a first measurement of a tier begins; until `end_trial`, nobody waits for the tier's blocks."""
        with self._lock:
            self._lane(tier).begin_trial()

    def observe_trial(self, tier: str, num_blocks: int, seconds: float, latency_s: float) -> None:
        """Says what the measurement found: so many blocks take `seconds`, behind `latency_s` until the first bytes."""
        with self._lock:
            self._lane(tier).observe_trial(self._clock(), num_blocks, seconds, latency_s)

    def end_trial(self, tier: str) -> None:
        """Says that the measurement is over, whether it found something or not."""
        with self._lock:
            self._lane(tier).end_trial()

    def begin_part(self, tier: str) -> None:
        """Says that a part of a load starts; `end_part` follows."""
        with self._lock:
            self._lane(tier).begin_part(self._clock())

    def end_part(self, tier: str, load: int, num_blocks: int, num_moved: int) -> None:
        """Says that a part ended: `num_blocks` blocks are no longer expected, and `num_moved` of them were moved."""
        with self._lock:
            self._lane(tier).end_part(self._clock(), load, num_blocks, num_moved)

    def forget(self, load: int) -> None:
        """Says that nothing more comes of a load."""
        with self._lock:
            for lane in self._lanes.values():
                lane.forget(load)

    def plan(self, question: LoadQuestion) -> LoadDecision:
        """Decides how many of the loadable blocks are loaded."""
        with self._lock:
            decision = self._decide(question)
        logger.debug(
            "%d of %d blocks are loaded: %s", decision.num_blocks_to_load, question.num_blocks, decision.reason
        )
        return decision

    def plan_overlapped(self, question: LoadQuestion) -> LoadDecision:
        """Decides how long a load of all there is may be waited for, before computing begins beside it.

        Returns:
            `patience_s` is 0 where the load is known not to be much faster than computing.
        """
        num_blocks = question.num_blocks
        with self._lock:
            now = self._clock()
            if self._patience is None:
                return LoadDecision(question, now, num_blocks, None, None, None, "loads are always waited for")
            cost = self._prefill.cost() or _GUESSED_COST
            starts = (question.first + np.array([0, num_blocks])) * self._block_size
            compute_s, left_s = (cost.sure * cost.seconds(starts, question.num_tokens)).tolist()
            speeds = {run.tier: self._lane(run.tier).last_speed() for run in question.runs}
            known = {tier: speed for tier, speed in speeds.items() if speed is not None}
            load_s = float(self._expected(question, cost, known)[1][-1])
            lanes = [self._lane(run.tier) for run in question.runs]
            is_trusted, is_on_trial = all(lane.is_trusted for lane in lanes), any(lane.is_on_trial for lane in lanes)
        saved_s = compute_s - left_s
        patience_s = self._patience * compute_s
        if cost is _GUESSED_COST:
            in_time_s = 2 * load_s + _COLD_START_S if len(known) == len(speeds) else math.inf
            patience_s = max(patience_s, min(_GUESSED_PATIENCE_S, in_time_s))
        elif is_trusted:
            patience_s = max(patience_s, min(_MIN_PATIENCE_S, _SHORT_SHARE * saved_s))
        reason = (
            f"loading takes {1e3 * load_s:.1f} ms, as far as is known, and computing the same {1e3 * saved_s:.1f} ms"
        )
        if is_on_trial or load_s > patience_s + FAST_SHARE * saved_s:
            patience_s = 0.0
        logger.debug("%d blocks are loaded, and waited for %.1f ms first: %s", num_blocks, 1e3 * patience_s, reason)
        return LoadDecision(question, now, num_blocks, load_s, saved_s, patience_s, reason)

    def block_savings(self, question: LoadQuestion) -> npt.NDArray[np.float64]:
        """float64 [num_blocks]: seconds of computing that each of the loadable blocks saves, nearly for sure."""
        with self._lock:
            cost = self._prefill.cost() or _GUESSED_COST
        starts = (question.first + np.arange(question.num_blocks + 1)) * self._block_size
        return -cost.sure * np.diff(cost.seconds(starts, question.num_tokens))

    def end_waiting(self, decision: LoadDecision, elapsed_s: float, arrived: Outcomes, *, ended: bool) -> None:
        """Learns from an overlapped load that has `ended`, or has not been worth waiting for any longer."""
        question = decision.question
        with self._lock:
            if arrived.all():
                for tier in question.tiers(len(arrived)):
                    self._lane(tier).load_ended()
            elif not ended and decision.patience_s:
                tiers = question.tier_of_each
                for tier in set(tiers[~arrived].tolist()):
                    wanted = tiers == tier
                    num_arrived = int(np.count_nonzero(arrived & wanted))
                    self._lane(tier).give_up(self._clock(), int(np.count_nonzero(wanted)), num_arrived, elapsed_s)

    def settle_overlapped(self, decision: LoadDecision, waited_s: float, used: Outcomes) -> None:
        """Books an overlapped load that is over: `used` says which of its blocks were not computed."""
        saved_s = float(self.block_savings(decision.question)[used].sum())
        num_used = int(np.count_nonzero(used))
        kind: LoadKind = "loaded" if num_used == len(used) else "split"
        if not num_used:
            kind = "gave_up" if decision.patience_s else "computed"
        with self._lock:
            self._decisions[kind] += 1
            self._declined_blocks += len(used) - num_used
            self._regret_s[decision.question.tier_at(len(used))] += max(0.0, waited_s - saved_s)

    def watch(self, decision: LoadDecision, transfer: Transfer, timeout_s: float) -> "LoadWatch":
        """Watches over a load that was decided for: its deadline grows with what arrives, up to `timeout_s` in all."""
        with self._lock:
            cost = self._prefill.cost()
        savings_s = None
        if cost is not None and decision.patience_s is not None:
            question = decision.question
            starts = (question.first + np.arange(transfer.num_blocks + 1)) * self._block_size
            left_s = cost.seconds(starts, question.num_tokens)
            savings_s = cost.sure * (left_s[0] - left_s)
        return LoadWatch(self.settle, decision, transfer, timeout_s, savings_s, self._clock)

    def settle(self, decision: LoadDecision, waited_s: float, num_arrived: int, *, gave_up: bool) -> None:
        """Books a load that has ended. Called by its `LoadWatch`."""
        question = decision.question
        num_blocks, num_loaded = question.num_blocks, decision.num_blocks_to_load
        with self._lock:
            now = self._clock()
            self._decisions["gave_up" if gave_up else "loaded" if num_loaded == num_blocks else "split"] += 1
            self._declined_blocks += num_blocks - num_loaded
            if gave_up:
                self._lane(question.tier_at(num_arrived)).give_up(now, num_loaded, num_arrived, waited_s)
            else:
                for tier in question.tiers(num_loaded):
                    self._lane(tier).load_ended()
            cost = self._prefill.cost()
            if cost is None:
                return
            start, end = question.first * self._block_size, question.num_tokens
            saved_s = cost.seconds_between(start, end) - cost.seconds_between(
                start + num_arrived * self._block_size, end
            )
            self._regret_s[question.tier_at(num_arrived)] += max(0.0, waited_s - saved_s)
            if num_arrived < num_blocks:  # what the rest would have taken is seen when it, or something else, has come
                self._unsettled.append((decision.decided_s, question, num_arrived))

    def stats(self) -> PlannerStats:
        """Counters, and the speeds that are known."""
        with self._lock:
            self._look_back()
            cost = self._prefill.cost()
            rates = {tier: lane.bandwidth_blocks_per_s for tier, lane in self._lanes.items()}
            return PlannerStats(
                decisions=dict(self._decisions),
                regret_s=dict(self._regret_s),
                declined_blocks=self._declined_blocks,
                lane_bytes_per_s={tier: rate * self._block_bytes for tier, rate in rates.items() if rate is not None},
                prefill_tokens_per_s=cost.tokens_per_s if cost is not None else None,
            )

    def _decide(self, question: LoadQuestion) -> LoadDecision:
        num_blocks = question.num_blocks
        now = self._clock()
        cost = self._prefill.cost()
        if not num_blocks:
            return LoadDecision(question, now, 0, 0.0, 0.0, None, "no tier holds what follows")
        if cost is None or self._patience is None:
            reason = "the speed of computing is not known yet" if cost is None else "loads are always waited for"
            return LoadDecision(question, now, num_blocks, None, None, None, reason)
        return self._plan(question, cost, self._patience, now)

    def _plan(self, question: LoadQuestion, cost: PrefillCost, patience: float, now: float) -> LoadDecision:
        num_blocks = question.num_blocks
        starts = (question.first + np.arange(num_blocks + 1)) * self._block_size
        left_s = cost.seconds(starts, question.num_tokens)
        compute_s = float(left_s[0])
        speeds = {run.tier: self._lane(run.tier).speed(now) for run in question.runs}
        known = {tier: speed for tier, speed in speeds.items() if speed is not None}
        total_s, load_s = self._expected(question, cost, known)
        count = num_blocks - int(np.argmin(total_s[::-1]))  # of equals the most: the device has others to compute for
        saved_s = compute_s - float(left_s[count])
        patience_s = max(patience * cost.sure * compute_s, min(_MIN_PATIENCE_S, _SHORT_SHARE * saved_s))
        if all(self._lane(run.tier).is_trusted for run in question.runs):
            patience_s = max(patience_s, min(_TRUSTING_PATIENCE_S, _TRUSTING_PATIENCE * compute_s))
        untried = {tier for tier in question.tiers(count) if speeds[tier] is None}
        if untried:
            for tier in untried:
                self._lane(tier).probe(now)
            reason = f"{' and '.join(sorted(untried))} is to show how fast it is"
            return LoadDecision(question, now, count, None, saved_s, patience_s, reason)
        if not count:
            self._decisions["computed"] += 1
            self._declined_blocks += num_blocks
            self._look_back()
            self._unsettled.append((now, question, 0))
        reason = (
            f"with {count} of {num_blocks} blocks loaded the first token takes {1e3 * total_s[count]:.1f} ms, with all "
            f"computed {1e3 * compute_s:.1f} ms"
        )
        return LoadDecision(question, now, count, float(load_s[count]), saved_s, patience_s, reason)

    def _expected(
        self, question: LoadQuestion, cost: PrefillCost, speeds: Mapping[str, LaneSpeed]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """float64 [num_blocks + 1] each: time to first token when k blocks are loaded, and until these have come.

        Tiers whose speed is not known count as fast.
        """
        lengths = [run.num_blocks for run in question.runs]
        counts = np.arange(question.num_blocks + 1)
        load_s = np.zeros(question.num_blocks + 1)
        for tier, speed in speeds.items():
            is_here = np.repeat([run.tier == tier for run in question.runs], lengths)
            own = np.concatenate(([0], np.cumsum(is_here)))
            # Loads take turns: until a load has all its k blocks, each other one gets no more than k.
            others = sum((np.minimum(own, waiting) for waiting in speed.num_waiting), np.zeros_like(own))
            lane_s = np.where(own > 0, speed.latency_s + speed.block_s * (own + others), 0.0)
            load_s = np.maximum(load_s, lane_s)
        starts = (question.first + counts) * self._block_size
        return load_s + cost.seconds(starts, question.num_tokens), load_s

    def _look_back(self) -> None:
        """Books what it cost to compute blocks, once their tiers' speeds have been measured since."""
        cost = self._prefill.cost()
        if cost is None:
            return
        unsettled = list(self._unsettled)
        self._unsettled.clear()
        for decided_s, question, num_loaded in unsettled:
            speeds = {run.tier: self._lane(run.tier).speed_since(decided_s) for run in question.runs}
            known = {tier: speed for tier, speed in speeds.items() if speed is not None}
            if len(known) < len(speeds):
                self._unsettled.append((decided_s, question, num_loaded))
                continue
            total_s, _ = self._expected(question, cost, known)
            lost_s = float(total_s[num_loaded] - total_s[num_loaded:].min())
            self._regret_s[question.tier_at(num_loaded)] += lost_s

    def _lane(self, tier: str) -> LaneMeter:
        lane = self._lanes.get(tier)
        if lane is None:
            lane = self._lanes[tier] = LaneMeter()
        return lane


def growing_parts(num_blocks: int, first: int, most: int) -> list[int]:
    """Cuts a load into parts that start small, so that a slow tier is noticed early, and grow up to `most` blocks.

    Args:
        first: least blocks of a part.

    Returns:
        Blocks of each part, in order; their sum is `num_blocks`.
    """
    parts = []
    done = 0
    while done < num_blocks:
        wanted = int(_FIRST_PART * num_blocks + _PART_GROWTH * done)
        size = min(max(first, wanted, 1), most, num_blocks - done)
        parts.append(size)
        done += size
    return parts
