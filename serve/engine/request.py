"""What a front asks of an engine and what comes back: plain records, no tensors."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from dynamo.kvcache.hashing import BlockKey

__all__ = [
    "DeltaSink",
    "Engine",
    "EngineStats",
    "FinishReason",
    "FinishedRequest",
    "GenerationRequest",
    "Journey",
    "OutputDelta",
    "RoutingHints",
    "SamplingDefaults",
    "SamplingParams",
    "TokenLogprob",
]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Values are checked at the door, not here.

    Attributes:
        temperature: 0 is greedy.
        top_k: None keeps all tokens.
        seed: with one, the same request gives the same tokens whatever runs beside it.
        max_tokens: at most this many tokens are generated.
        min_tokens: neither end-of-sequence nor a stop ends the request before this many tokens.
        stop: strings that end the request and are not part of its text.
        stop_token_ids: token ids that end the request, beside the model's own end-of-sequence ids.
        num_logprobs: None: no logprobs; 0: the chosen token's alone; n: the n most likely tokens' too.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a request that says nothing gets; a model folder's generation_config.json may have set it.

    Attributes:
        max_tokens: most tokens of a chat reply without a limit of its own; None lets it fill the context.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one generated token, and of the most likely ones at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingHints:
    """What a client asks of the choice of a worker; an engine that has none takes no notice.

    Attributes:
        worker: the only worker that may serve the request; None lets the router choose.
        exclude: workers that may not.
        session: requests of one session go to the same worker while that is wise.
        priority: who goes first where requests wait for a worker; higher is earlier.
    """

    worker: str | None = None
    exclude: frozenset[str] = frozenset()
    session: str | None = None
    priority: int = 0


@dataclass(slots=True)
class Journey:
    """Which way one request went. An engine that has workers fills it in; whoever answers the client reads it.

    Attributes:
        worker_id: who serves it, or did last; None where there are no workers, and before one is chosen.
        num_attempts: how many workers began it.
        overlap_blocks: prompt blocks that the first to deliver held in any tier, as far as the router knew.
        predicted_cached_tokens: the tokens of those blocks.
        queue_s: how long it waited for a worker, all attempts together.
        route_s: how long the router itself thought, all attempts together.
    """

    worker_id: str | None = None
    num_attempts: int = 0
    overlap_blocks: int = 0
    predicted_cached_tokens: int = 0
    queue_s: float = 0.0
    route_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate. `n > 1` at the door becomes n of these.

    Attributes:
        request_id: unique among the engine's live requests.
        prompt_token_ids: at least one token.
        cache_salt: KV blocks are shared only between requests of equal salt.
        hold_s: after deltas were handed over, those of the next so many seconds are kept back and handed over together,
            unless the request ends before. The first ones are never kept back. 0: all at once as they come.
        output_token_ids: what was generated of it already, elsewhere. The engine goes on where they end, as if it had
            generated them itself: limits, penalties, random numbers, stop strings and half characters count them, and
            none of them is handed out again. None of them may have ended the request.
        routing: for a front that has workers; it goes no further than that.
        journey: where such a front notes what it did; None: nobody wants to know.
        sink: is offered deltas on the spot while whoever iterates over `Engine.generate` waits, see `DeltaSink`.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    hold_s: float = 0.0
    output_token_ids: list[int] = field(default_factory=list)
    routing: RoutingHints = RoutingHints()  # frozen, so one for all
    journey: Journey | None = None
    sink: "DeltaSink | None" = None


@dataclass(slots=True)
class OutputDelta:
    """What one request gained in a step; the last one carries `finish_reason`.

    Text never ends inside a UTF-8 character or inside what may still become a stop string, so it may lag behind
    `token_ids`; the last delta brings the rest. `logprobs`, if asked for, has one entry per token id.

    Attributes:
        num_cached_tokens: prompt tokens whose KV came from the cache; the same in every delta of a request.
        stop_reason: the stop string or stop token id that ended the request; None for end-of-sequence and length.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0


DeltaSink: TypeAlias = Callable[[list[OutputDelta]], bool]
"""Takes deltas where they arrive, so that no task has to wake for them; False: they go the usual way, by the generator.

An engine may call it, and need not, for any deltas but the first and the last of a request, and only while its consumer waits
for the generator: everything that came before has been dealt with then. It must neither raise nor wait.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """A request that held blocks and has ended, whatever ended it.

    Attributes:
        num_cached_tokens: prompt tokens whose KV came from the cache when it was first admitted.
        block_keys: of its full blocks in the end, first to last; nobody changes the list any more.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    block_keys: Sequence[BlockKey]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A moment of an engine: gauges now, counters since start."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_steps: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int


class Engine(Protocol):
    """The seam between the HTTP front and whatever generates tokens. All methods are called on one event loop."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    async def start(self) -> None:
        """Starts the engine's thread; all other methods belong to the event loop that runs this."""
        ...

    async def stop(self) -> None:
        """Aborts what still runs, joins the thread, closes the cache. Who wants requests to finish waits before."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        """Yields the deltas that queued while the consumer was busy, at least one; closing the generator aborts the request.

        A delta is one step's. Only for a consumer that has fallen far behind are several merged into one.

        Raises:
            EngineOverloadedError: the waiting queue is full.
            EngineDeadError: the engine's thread ended; no request can be served.
            RequestFailedError: this request alone failed.
        """
        ...

    def stats(self) -> EngineStats: ...

    def check_healthy(self) -> None:
        """Raises EngineDeadError when the engine's thread is not alive."""
        ...
