"""What both generating endpoints share: a checked request becomes sequences, and their deltas become one HTTP answer."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.types import Receive, Send

from dynamo.serve.engine.request import Engine, FinishReason, GenerationRequest, SamplingParams, TokenLogprob
from dynamo.serve.envelope import refusal_of, unforeseen
from dynamo.serve.exchange import Exchange, send_body
from dynamo.serve.interruption import ClientDisconnectedError, Interruption, run_interruptible
from dynamo.serve.merging import Batch, generate_all
from dynamo.serve.metrics import GenerationMetrics, ServerMetrics
from dynamo.serve.openai import PromptTokensDetails, Usage
from dynamo.serve.parameters import with_seed
from dynamo.serve.stream import DONE, SSE_HEADERS, ChunkStream, error_event

__all__ = ["ChoiceOutput", "Reply", "ReplyPlan"]

logger = logging.getLogger(__name__)

_LAST_EVENT_TIMEOUT_S = 1.0


@dataclass(slots=True)
class ChoiceOutput:
    """What one choice has gained so far; text and logprobs only where the answer is not streamed."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason = "length"
    stop_reason: str | int | None = None

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
    render_body: Callable[[str, int, Sequence[ChoiceOutput], Usage], bytes]


class Reply:
    """Runs one plan and writes its answer to one client."""

    def __init__(self, plan: ReplyPlan, engine: Engine, metrics: ServerMetrics, exchange: Exchange) -> None:
        self._plan = plan
        self._engine = engine
        self._exchange = exchange
        self._id = plan.id_prefix + uuid.uuid4().hex
        self._created = int(time.time())
        self._outputs = [ChoiceOutput() for _ in range(len(plan.prompts) * plan.num_choices)]
        self._metrics = GenerationMetrics(metrics, len(self._outputs), exchange.started_s)

    async def respond(self, receive: Receive, send: Send, interruption: Interruption) -> None:
        """Generates and answers; aborts the generation when the client leaves.

        Raises:
            ClientDisconnectedError: the client left.
            Exception: a failure before the first byte; later ones are told in the stream.
        """
        work = self._whole(send) if self._plan.open_stream is None else self._streamed(send, self._plan.open_stream)
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
            await self._end_stream(send, error_event(refusal))
        finally:
            self._metrics.finish(self._usage())

    async def _end_stream(self, send: Send, event: bytes) -> None:
        try:
            async with asyncio.timeout(_LAST_EVENT_TIMEOUT_S):
                await send({"type": "http.response.body", "body": event, "more_body": False})
        except TimeoutError:
            # It has long stopped reading, so it learns of the end from the connection's.
            raise ClientDisconnectedError("the client does not read") from None

    async def _whole(self, send: Send) -> None:
        async def collect(batch: Batch) -> None:
            self._count(batch)
            for index, delta in batch:
                output = self._outputs[index]
                output.texts.append(delta.text)
                output.logprobs += delta.logprobs or ()

        await generate_all(self._engine, self._requests(), collect)
        body = self._plan.render_body(self._id, self._created, self._outputs, self._usage())
        await send_body(send, self._exchange, 200, body)

    async def _streamed(self, send: Send, open_stream: Callable[[str, int], ChunkStream]) -> None:
        stream = open_stream(self._id, self._created)

        async def write(batch: Batch) -> None:
            self._count(batch)
            body = stream.render(batch)
            if not self._exchange.response_started:
                # Until here a failure still gets a status of its own, such as 429.
                await self._exchange.start(send, 200, SSE_HEADERS)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await generate_all(self._engine, self._requests(), write)
        last = stream.usage_chunk(self._usage()) + DONE if self._plan.include_usage else DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _requests(self) -> list[GenerationRequest]:
        plan = self._plan
        return [
            GenerationRequest(
                request_id=f"{self._id}-{prompt_index * plan.num_choices + choice}",
                prompt_token_ids=prompt,
                sampling=with_seed(plan.sampling, choice),
                cache_salt=plan.cache_salt,
            )
            for prompt_index, prompt in enumerate(plan.prompts)
            for choice in range(plan.num_choices)
        ]

    def _count(self, batch: Batch) -> None:
        self._metrics.observe(batch)
        for index, delta in batch:
            output = self._outputs[index]
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
