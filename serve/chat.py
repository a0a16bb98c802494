"""POST /v1/chat/completions: from its body to a plan, and from its outputs to its answer."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from dynamo.serve.logprobs import chat_logprobs
from dynamo.serve.openai import ChatChoice, ChatCompletion, ChatCompletionRequest, ChatMessage, RouteTiming, Usage
from dynamo.serve.parameters import chat_sampling
from dynamo.serve.prompt import chat_prompt
from dynamo.serve.reply import ChoiceOutput, ReplyPlan
from dynamo.serve.served_model import ServedModel
from dynamo.serve.stream import ChatStream

__all__ = ["plan_chat"]


async def plan_chat(request: ChatCompletionRequest, served: ServedModel) -> ReplyPlan:
    """Checks a chat completion request and says what it comes to.

    Raises:
        RequestError: it cannot be served as it is.
    """
    prompt = await chat_prompt(served.codec, request.messages, served.max_model_len)
    sampling = chat_sampling(
        request,
        served.defaults,
        prompt_tokens=len(prompt),
        max_model_len=served.max_model_len,
        vocab_size=served.codec.vocab_size,
    )
    num_choices = request.n or 1
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    wants_logprobs = sampling.num_logprobs is not None

    def open_stream(response_id: str, created: int) -> ChatStream:
        codec = served.codec if wants_logprobs else None
        return ChatStream(response_id, created, served.name, num_choices, include_usage=include_usage, codec=codec)

    def render_body(
        response_id: str, created: int, outputs: Sequence[ChoiceOutput], usage: Usage, timing: RouteTiming | None
    ) -> bytes:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content=output.text),
                logprobs=chat_logprobs(served.codec, output.logprobs) if wants_logprobs else None,
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
            )
            for index, output in enumerate(outputs)
        ]
        answer = ChatCompletion(
            response_id, "chat.completion", created, served.name, choices, usage, UNSET if timing is None else timing
        )
        return msgspec.json.encode(answer)

    return ReplyPlan(
        prompts=[prompt],
        num_choices=num_choices,
        sampling=sampling,
        cache_salt=request.cache_salt or "",
        id_prefix="chatcmpl-",
        include_usage=include_usage,
        open_stream=open_stream if request.stream else None,
        render_body=render_body,
    )
