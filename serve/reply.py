"""What both generating endpoints share: a checked request becomes sequences, and their deltas become one HTTP answer."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from starlette.types import Receive, Send

from dynamo.serve.engine.request import (
    DeltaSink,
    Engine,
    FinishReason,
    GenerationRequest,
    Journey,
    OutputDelta,
    SamplingParams,
    TokenLogprob,
)
from dynamo.serve.envelope import refusal_of, unforeseen
from dynamo.serve.exchange import Exchange, send_body
from dynamo.serve.interruption import ClientDisconnectedError, Interruption, run_interruptible
from dynamo.serve.merging import Batch, generate_all
from dynamo.serve.metrics import GenerationMetrics, ServerMetrics
from dynamo.serve.openai import DynamoFields, PromptTokensDetails, RouteTiming, Usage
from dynamo.serve.outlet import Outlet
from dynamo.serve.parameters import with_seed
from dynamo.serve.routing_hints import routing_hints
from dynamo.serve.stream import DONE, SSE_HEADERS, ChunkStream, error_event

__all__ = ["ChoiceOutput", "Reply", "ReplyPlan"]

logger = logging.getLogger(__name__)

_LAST_EVENT_TIMEOUT_S = 1.0
_WHOLE_HOLD_S = 0.05  # nobody sees the tokens of an answer in one piece before its end: they may come together


@dataclass(slots=True)
class ChoiceOutput:
    """What one choice has gained so far; text, logprobs and token ids only where it is not streamed.

    Attributes:
        first_token_s: `time.perf_counter()` when its first token came.
    """

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason = "length"
    stop_reason: str | int | None = None
    first_token_s: float | None = None
    journey: Journey = field(default_factory=Journey)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyPlan:
    """A checked request: what to generate, and how its answer is written.

    Attributes:
        prompts: token ids of each prompt; every prompt gets `num_choices` choices, prompt by prompt.
        open_stream: the chunk renderer for a response id and its creation time; None for an answer in one piece.
        render_body: the body of an answer in one piece.
    """

    prompts: Sequence[list[int]]
    num_choices: int
    sampling: SamplingParams
    cache_salt: str
    id_prefix: str
    include_usage: bool
    open_stream: Callable[[str, int], ChunkStream] | None
    render_body: Callable[[str, int, Sequence[ChoiceOutput], Usage, RouteTiming | None], bytes]


class Reply:
    """Runs one plan and writes its answer to one client.

    Args:
        fields: what the client said of where it wants to be served.
        stream_interval_s: tokens that come faster than this are written together. Several events may leave in one write;
            none are merged.
    """

    def __init__(
        self,
        plan: ReplyPlan,
        fields: DynamoFields,
        engine: Engine,
        metrics: ServerMetrics,
        exchange: Exchange,
        stream_interval_s: float,
    ) -> None:
        self._plan = plan
        self._routing = routing_hints(fields)
        self._wants_timing = bool(fields.timing)
        self._engine = engine
        self._exchange = exchange
        self._hold_s = _WHOLE_HOLD_S if plan.open_stream is None else stream_interval_s
        self._id = plan.id_prefix + uuid.uuid4().hex
        self._created = int(time.time())
        self._outputs = [ChoiceOutput() for _ in range(len(plan.prompts) * plan.num_choices)]
        self._metrics = GenerationMetrics(metrics, len(self._outputs), exchange.started_s)

    async def respond(self, receive: Receive, outlet: Outlet, interruption: Interruption) -> None:
        """Generates and answers; aborts the generation when the client leaves. Closes `outlet`.

        Raises:
            ClientDisconnectedError: the client left.
            Exception: a failure before the first byte; later ones are told in the stream.
        """
        work = (
            self._whole(outlet.send)
            if self._plan.open_stream is None
            else self._streamed(outlet, self._plan.open_stream)
        )
        try:
            await run_interruptible(work, receive, interruption)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            if not self._exchange.response_started:
                raise
            refusal = refusal_of(error)
            if refusal is None:
                logger.exception("request %s failed in its stream", self._exchange.request_id)
                refusal = unforeseen()
            self._exchange.stream_error = refusal.code or refusal.type
            await self._end_stream(outlet, error_event(refusal))
        finally:
            await outlet.close()
            self._metrics.finish(self._usage())

    async def _end_stream(self, outlet: Outlet, event: bytes) -> None:
        try:
            async with asyncio.timeout(_LAST_EVENT_TIMEOUT_S):
                await outlet.send({"type": "http.response.body", "body": event, "more_body": False})
        except TimeoutError:
            # It has long stopped reading, so it learns of the end from the connection's.
            raise ClientDisconnectedError("the client does not read") from None

    async def _whole(self, send: Send) -> None:
        def collect(batch: Batch) -> None:
            self._count(batch)
            for index, delta in batch:
                output = self._outputs[index]
                output.texts.append(delta.text)
                output.logprobs += delta.logprobs or ()
                output.token_ids += delta.token_ids

        async def take(batch: Batch) -> None:
            collect(batch)

        def take_at_once(deltas: list[OutputDelta]) -> bool:
            collect([(0, delta) for delta in deltas])
            return True

        await generate_all(self._engine, self._requests(take_at_once), take)
        body = self._plan.render_body(self._id, self._created, self._outputs, self._usage(), self._timing())
        await send_body(send, self._exchange, 200, body, self._worker_headers(0))

    async def _streamed(self, outlet: Outlet, open_stream: Callable[[str, int], ChunkStream]) -> None:
        stream = open_stream(self._id, self._created)
        failure: Exception | None = None

        def write_at_once(deltas: list[OutputDelta]) -> bool:
            nonlocal failure
            if failure is not None or not outlet.is_free:
                return False
            batch = [(0, delta) for delta in deltas]
            try:
                self._count(batch)
                if body := stream.render(batch):
                    outlet.write(body)
            except Exception as error:  # noqa: BLE001  # the engine's task must not see it; the request's own raises it
                failure = error
            return True

        async def write(batch: Batch) -> None:
            if failure is not None:
                raise failure
            self._count(batch)
            body = stream.render(batch)
            if not self._exchange.response_started:
                # Until here a failure still gets a status of its own, such as 429.
                await self._exchange.start(outlet.send, 200, (*SSE_HEADERS, *self._worker_headers(batch[0][0])))
            if body:
                await outlet.send({"type": "http.response.body", "body": body, "more_body": True})

        await generate_all(self._engine, self._requests(write_at_once), write)
        usage, timing = self._usage() if self._plan.include_usage else None, self._timing()
        last = DONE if usage is None and timing is None else stream.last_chunk(usage, timing) + DONE
        await outlet.send({"type": "http.response.body", "body": last, "more_body": False})

    def _requests(self, sink: DeltaSink) -> list[GenerationRequest]:
        """The sequences to generate; one that is alone may have its deltas written where they arrive."""
        plan = self._plan
        return [
            GenerationRequest(
                request_id=f"{self._id}-{prompt_index * plan.num_choices + choice}",
                prompt_token_ids=prompt,
                sampling=with_seed(plan.sampling, choice),
                cache_salt=plan.cache_salt,
                hold_s=self._hold_s,
                routing=self._routing,
                journey=self._outputs[prompt_index * plan.num_choices + choice].journey,
                sink=sink if len(self._outputs) == 1 else None,
            )
            for prompt_index, prompt in enumerate(plan.prompts)
            for choice in range(plan.num_choices)
        ]

    def _count(self, batch: Batch) -> None:
        now = time.perf_counter()
        self._metrics.observe(batch, now)
        for index, delta in batch:
            output = self._outputs[index]
            if output.first_token_s is None and delta.token_ids:
                output.first_token_s = now
            output.num_tokens += len(delta.token_ids)
            output.num_cached_tokens = delta.num_cached_tokens
            if delta.finish_reason is not None:
                output.finish_reason = delta.finish_reason
                output.stop_reason = delta.stop_reason

    def _usage(self) -> Usage:
        """Each prompt counts once; what it found in the cache is what its first choice found."""
        plan = self._plan
        prompt_tokens = sum(map(len, plan.prompts))
        completion_tokens = sum(output.num_tokens for output in self._outputs)
        cached_tokens = sum(output.num_cached_tokens for output in self._outputs[:: plan.num_choices])
        return Usage(
            prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached_tokens)
        )

    def _worker_headers(self, index: int) -> list[tuple[bytes, bytes]]:
        """Which worker serves a choice, where there are workers."""
        journey = self._outputs[index].journey
        if journey.worker_id is None:
            return []
        return [
            (b"x-dynamo-worker-id", journey.worker_id.encode("latin-1", "replace")),
            (b"x-dynamo-overlap-blocks", b"%d" % journey.overlap_blocks),
        ]

    def _timing(self) -> RouteTiming | None:
        """Told to whom asked for it, once everything is generated."""
        if not self._wants_timing:
            return None
        choices = [self._timing_of(output) for output in self._outputs]
        return msgspec.structs.replace(choices[0], choices=choices) if len(choices) > 1 else choices[0]

    def _timing_of(self, output: ChoiceOutput) -> RouteTiming:
        started_s, journey = self._exchange.started_s, output.journey
        is_routed = journey.worker_id is not None
        return RouteTiming(
            worker_id=journey.worker_id,
            attempts=journey.num_attempts if is_routed else None,
            cached_tokens=output.num_cached_tokens,
            predicted_cached_tokens=journey.predicted_cached_tokens if is_routed else None,
            queue_ms=round(journey.queue_s * 1e3, 3) if is_routed else None,
            route_us=round(journey.route_s * 1e6, 1) if is_routed else None,
            ttft_ms=None if output.first_token_s is None else round((output.first_token_s - started_s) * 1e3, 3),
            total_ms=round((time.perf_counter() - started_s) * 1e3, 3),
        )
