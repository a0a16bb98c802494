"""A question to the router, and its answer."""

from dataclasses import dataclass, field

from dynamo.router.reach import Reach

__all__ = ["NO_REACH", "CandidateCost", "Decision", "Overhead", "RouteQuery"]

NO_REACH = Reach(0, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteQuery:
    """What the router knows of a request.

    Attributes:
        tokens: of the prompt, and of what was generated already where a request is carried on: little-endian u32, as
            `kvcache.hashing.pack_tokens` gives it.
        request_id: for messages and logs.
        salt: of the tenant; prompts of different salts share no blocks.
        lora: adapter, likewise.
        expected_output_tokens: how long the answer will be, as far as is known; its blocks count as held from the start.
        pin: the one worker that may take it.
        exclude: workers that may not, such as those that failed it.
        allowed: workers that may; None for all.
        session: id of the conversation it belongs to.
    """

    tokens: memoryview
    request_id: str
    salt: str = ""
    lora: str = ""
    expected_output_tokens: int | None = None
    pin: str | None = None
    exclude: frozenset[str] = field(default_factory=frozenset)
    allowed: frozenset[str] | None = None
    session: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens to be present before the next one can be generated."""
        return self.tokens.nbytes // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateCost:
    """What a request is expected to cost at one worker.

    Attributes:
        reach: blocks of the prompt's leading run that it holds, by tier.
        cached_tokens: prompt tokens that need not be computed there.
        cost_s: the sum of the parts, weighted.
        queue_s: until the requests ahead let it begin.
        load_s: to get blocks back from slower tiers.
        compute_s: to compute the rest of the prompt.
        balance_s: what is added to that, or taken off, since the worker was given more than its share lately, or less.
        decode_s: what running requests slow it down, times the weight.
        refused: why it may not take the request; None if it may.
    """

    worker_id: str
    reach: Reach
    cached_tokens: int
    cost_s: float
    queue_s: float
    load_s: float
    compute_s: float
    balance_s: float
    decode_s: float
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Elapsed seconds that a decision took.

    Attributes:
        hash_s: hashing tokens into block keys.
        lookup_s: asking the index, and telling it what was predicted.
        choice_s: costs, the choice and its booking.
    """

    hash_s: float
    lookup_s: float
    choice_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.hash_s + self.lookup_s + self.choice_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Which worker, and why.

    Attributes:
        worker_id: the worker.
        mode: of the router.
        reason: what settled it: "cost", "tie" (of equal costs, at random), "sampled" (by temperature), "session", "pin",
            "turn", "random", "only" (no other may take it) or "busy" (explained only: it would wait, since all are).
        chosen: its expected cost.
        best_cached_tokens: the most that any worker has of the prompt, whether or not it may take it.
        num_tokens: of the prompt.
        num_candidates: workers that may take it.
        candidates: all workers, cheapest first, and those that may not take it; empty unless it was asked to explain.
    """

    worker_id: str
    mode: str
    reason: str
    chosen: CandidateCost
    best_cached_tokens: int
    num_tokens: int
    num_candidates: int
    overhead: Overhead
    candidates: tuple[CandidateCost, ...] = ()

    @property
    def reach(self) -> Reach:
        """Blocks of the prompt that the worker holds, by tier."""
        return self.chosen.reach

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that are expected not to be computed."""
        return self.chosen.cached_tokens

    @property
    def cost_s(self) -> float:
        """Expected cost."""
        return self.chosen.cost_s
