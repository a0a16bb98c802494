"""POST /router/explain: which worker a request would go to, and why. Nothing is generated, booked or remembered."""

from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta, Struct

from dynamo.router.decision import CandidateCost, Decision
from dynamo.serve.engine.request import GenerationRequest, RoutingHints
from dynamo.serve.reply import ReplyPlan

__all__ = ["EXPLAIN_PATH", "Candidate", "Explanation", "ExplanationList", "Routed", "explain", "is_chat"]

EXPLAIN_PATH = "/router/explain"


class Routed(Protocol):
    """What the front's own endpoints need of an engine that has workers behind it."""

    @property
    def has_workers(self) -> bool:
        """Whether any worker is there now."""
        ...

    async def explain(self, request: GenerationRequest) -> Decision:
        """See `dynamo.serve.migration.RoutedEngine.explain`."""
        ...

    async def worker_metrics(self) -> Mapping[str, bytes | None]:
        """See `dynamo.serve.migration.RoutedEngine.worker_metrics`."""
        ...


class Blocks(Struct):
    """How long a run of the prompt's leading blocks a worker holds: in the tier itself or a faster one."""

    device: int
    host: int
    disk: int
    remote: int


class Candidate(Struct, kw_only=True):
    """What the request would cost at one worker."""

    worker_id: str
    cost_s: Annotated[float, Meta(description="The parts, weighted; the lowest is chosen.")]
    queue_s: Annotated[float, Meta(description="Until the requests ahead let it begin.")]
    load_s: Annotated[float, Meta(description="To get blocks back from slower tiers.")]
    compute_s: Annotated[float, Meta(description="To compute the rest of the prompt.")]
    balance_s: Annotated[
        float, Meta(description="Added to that where much was computed lately; taken off where little.")
    ]
    decode_s: Annotated[float, Meta(description="What running requests slow it down, weighted.")]
    cached_tokens: Annotated[int, Meta(description="Prompt tokens that need not be computed there.")]
    blocks: Blocks
    refused: Annotated[str | None, Meta(description="Why it may not take the request; null if it may.")]


class Explanation(Struct, kw_only=True):
    """The router's answer for one prompt."""

    worker_id: str
    mode: str
    reason: Annotated[
        str, Meta(description="What settled it, such as cost, tie, session or pin; busy: it would wait, since all are.")
    ]
    prompt_tokens: int
    cached_tokens: int
    best_cached_tokens: Annotated[int, Meta(description="The most that any worker that may take it holds.")]
    overhead_us: Annotated[float, Meta(description="How long the router thought.")]
    candidates: Annotated[list[Candidate], Meta(description="All workers, cheapest first; last those that may not.")]


class ExplanationList(Struct):
    """Answer of POST /router/explain: one entry for each prompt."""

    object: Literal["list"]
    data: list[Explanation]


class _Kind(Struct):
    messages: msgspec.Raw = msgspec.Raw()


def is_chat(body: bytes) -> bool:
    """Whether a body is one of a chat; what is no JSON object is not."""
    try:
        return bytes(msgspec.json.decode(body, type=_Kind).messages) != b""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


async def explain(plan: ReplyPlan, routing: RoutingHints, routed: Routed) -> ExplanationList:
    """Asks the router about every prompt of a checked request.

    Raises:
        RequestError, NoWorkerError: no worker would take it now; as for the request itself.
    """
    data = []
    for number, prompt in enumerate(plan.prompts):
        request = GenerationRequest(
            request_id=f"explain-{number}",
            prompt_token_ids=prompt,
            sampling=plan.sampling,
            cache_salt=plan.cache_salt,
            routing=routing,
        )
        data.append(_explanation(await routed.explain(request)))
    return ExplanationList("list", data)


def _explanation(decision: Decision) -> Explanation:
    return Explanation(
        worker_id=decision.worker_id,
        mode=decision.mode,
        reason=decision.reason,
        prompt_tokens=decision.num_tokens,
        cached_tokens=decision.cached_tokens,
        best_cached_tokens=decision.best_cached_tokens,
        overhead_us=round(decision.overhead.total_s * 1e6, 1),
        candidates=[_candidate(cost) for cost in decision.candidates],
    )


def _candidate(cost: CandidateCost) -> Candidate:
    reach = cost.reach
    return Candidate(
        worker_id=cost.worker_id,
        cost_s=cost.cost_s,
        queue_s=cost.queue_s,
        load_s=cost.load_s,
        compute_s=cost.compute_s,
        balance_s=cost.balance_s,
        decode_s=cost.decode_s,
        cached_tokens=cost.cached_tokens,
        blocks=Blocks(reach.device, reach.host, reach.disk, reach.remote),
        refused=cost.refused,
    )
