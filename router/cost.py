"""What a request is expected to cost at a worker, in seconds.

    cost = queue_weight · queue + load + compute + decode_weight · decode

    queue    until the worker has computed the prompts ahead, or something that runs there ends and makes room
    load     to get back what lies on host, disk or remote, tier by tier, and never more than computing it
    compute  the rest of the prompt at the worker's speed
    decode   computing as many tokens as running requests hold on the device: a stand-in for how much slower their decoding
             makes this request, and this request theirs

With prefix_weight below 1, load and compute are taken as if that much less of the prompt were there.

The two terms of Dynamo's router (prefill blocks not cached, decode blocks) are those of
https://docs.nvidia.com/dynamo/latest/user-guides/router; here both are seconds, so that workers of different speeds and tiers
of different bandwidths compare.
"""

from collections.abc import Mapping, Sequence

from dynamo.router.config import RouterConfig
from dynamo.router.decision import NO_REACH, CandidateCost
from dynamo.router.load import WorkerLoad
from dynamo.router.reach import Reach
from dynamo.router.roster import Member

__all__ = ["CostModel"]


class CostModel:
    """The formula with its weights. Changes nothing."""

    def __init__(self, config: RouterConfig) -> None:
        self._queue_weight = config.queue_weight
        self._prefix_weight = config.prefix_weight
        self._decode_weight = config.decode_weight

    def base_s(self, load: WorkerLoad) -> float:
        """The part of the cost that is the same for every request."""
        decode_s = load.held_blocks * load.block_size * load.token_s
        return self._queue_weight * load.queue_s + self._decode_weight * decode_s

    def costs(
        self, members: Sequence[Member], reaches: Mapping[int, Reach], num_tokens: int, now_s: float
    ) -> list[float]:
        """Cost at each member.

        This is the router's innermost loop: everything that does not depend on the request was added up when it changed.
        """
        queue_weight = self._queue_weight
        find = reaches.get if reaches else None
        costs: list[float] = []
        append = costs.append
        for member in members:
            cost_s = member.base_s + num_tokens * member.token_s
            oldest_s = member.oldest_s
            if oldest_s:
                done_s = now_s - member.anchor_s
                cost_s -= queue_weight * (done_s if done_s < oldest_s else oldest_s)
            if find is not None:
                reach = find(member.slot)
                if reach is not None:
                    cost_s -= self._saved_s(member.load, reach, num_tokens)
            append(cost_s)
        return costs

    def candidate(
        self, member: Member, reach: Reach | None, num_tokens: int, now_s: float, refused: str | None = None
    ) -> CandidateCost:
        """Cost at one member, part by part."""
        load = member.load
        done_s = min(now_s - load.anchor_s, load.oldest_s)
        load_s, cached_tokens = 0.0, 0
        if reach is not None:
            load_s, cached_tokens = _loading(load, reach, num_tokens)
        full_s = num_tokens * load.token_s
        saved_s = self._prefix_weight * (cached_tokens * load.token_s - load_s)
        return CandidateCost(
            worker_id=member.worker_id,
            reach=reach or NO_REACH,
            cached_tokens=cached_tokens,
            cost_s=member.base_s - self._queue_weight * done_s + full_s - saved_s,
            queue_s=max(0.0, load.queue_s - done_s),
            load_s=load_s,
            compute_s=(num_tokens - cached_tokens) * load.token_s,
            decode_s=self._decode_weight * load.held_blocks * load.block_size * load.token_s,
            refused=refused,
        )

    def _saved_s(self, load: WorkerLoad, reach: Reach, num_tokens: int) -> float:
        load_s, cached_tokens = _loading(load, reach, num_tokens)
        return self._prefix_weight * (cached_tokens * load.token_s - load_s)


def _loading(load: WorkerLoad, reach: Reach, num_tokens: int) -> tuple[float, int]:
    """Seconds to get the prefix back from slower tiers, and tokens that need not be computed then.

    What loads slower than it computes is computed, as the worker's own planner decides. At least one token is computed, since
    its result begins the answer.
    """
    num_blocks, load_s = reach.device, 0.0
    if reach.remote > num_blocks:
        compute_s = load.block_size * load.token_s
        above = num_blocks
        for below, block_s in zip((reach.host, reach.disk, reach.remote), load.block_load_s, strict=True):
            if below > above and block_s < compute_s:
                load_s += (below - above) * block_s
                num_blocks += below - above
            above = below
    cached_tokens = num_blocks * load.block_size
    return load_s, cached_tokens if cached_tokens < num_tokens else max(0, num_tokens - 1)
