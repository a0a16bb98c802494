"""What a request is expected to cost at a worker, in seconds.

    cost = queue_weight · queue + load + price · compute + decode_weight · decode

    queue    until the worker has computed the prompts ahead, or something that runs there ends and makes room
    load     to get back what lies on host, disk or remote, tier by tier, and never more than computing it
    compute  the rest of the prompt at the worker's speed; the price is about 1, and higher at workers that were given much to
             compute lately (`balance`)
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
        self,
        members: Sequence[Member],
        reaches: Mapping[int, Reach],
        num_tokens: int,
        price: tuple[float, float, float],
        now_s: float,
    ) -> list[float]:
        """Cost at each member.

        This is the router's innermost loop: everything that does not depend on the request was added up when it changed.

        Args:
            reaches: by slot.
            price: of computing, as of `RecentWork.price`.
        """
        queue_weight = self._queue_weight
        least_price, slope, most_price = price
        find = reaches.get if reaches else None
        costs: list[float] = []
        append = costs.append
        for member in members:
            asked = least_price + slope * member.recent
            if asked > most_price:
                asked = most_price
            cost_s = member.base_s + num_tokens * member.token_s * asked
            oldest_s = member.oldest_s
            if oldest_s:
                done_s = now_s - member.anchor_s
                cost_s -= queue_weight * (done_s if done_s < oldest_s else oldest_s)
            if find is not None:
                reach = find(member.slot)
                if reach is not None:
                    load_s, cached_tokens = _loading(member.load, reach, num_tokens)
                    cost_s -= self._saved_s(cached_tokens * member.token_s * asked, load_s)
            append(cost_s)
        return costs

    def candidate(
        self,
        member: Member,
        reach: Reach | None,
        num_tokens: int,
        price: tuple[float, float, float],
        now_s: float,
        refused: str | None = None,
    ) -> CandidateCost:
        """Cost at one member, part by part."""
        load = member.load
        asked = min(price[0] + price[1] * member.recent, price[2])
        done_s = min(now_s - load.anchor_s, load.oldest_s)
        load_s, cached_tokens = (0.0, 0) if reach is None else _loading(load, reach, num_tokens)
        compute_s = (num_tokens - cached_tokens) * load.token_s
        saved_s = self._saved_s(cached_tokens * load.token_s * asked, load_s)
        return CandidateCost(
            worker_id=member.worker_id,
            reach=reach or NO_REACH,
            cached_tokens=cached_tokens,
            cost_s=member.base_s - self._queue_weight * done_s + num_tokens * load.token_s * asked - saved_s,
            queue_s=max(0.0, load.queue_s - done_s),
            load_s=load_s,
            compute_s=compute_s,
            balance_s=(asked - 1.0) * compute_s,
            decode_s=self._decode_weight * load.held_blocks * load.block_size * load.token_s,
            refused=refused,
        )

    def _saved_s(self, computing_s: float, load_s: float) -> float:
        """What not computing a prefix is worth. Nothing, at worst: a cheap worker may compute for less than loading takes."""
        return self._prefix_weight * (computing_s - load_s) if computing_s > load_s else 0.0


def _loading(load: WorkerLoad, reach: Reach, num_tokens: int) -> tuple[float, int]:
    """Seconds to get the prefix back from slower tiers, and tokens that need not be computed then.

    What loads slower than it computes counts as computed, although a worker that computes has a part of it loaded meanwhile. At
    least one token is computed, since
    its result begins the answer, and with it the block that it ends.
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
    if cached_tokens >= num_tokens:
        cached_tokens = max(0, (num_tokens - 1) // load.block_size * load.block_size)
    return load_s, cached_tokens
