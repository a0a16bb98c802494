"""POST /v1/completions: from its body to a plan, and from its outputs to its answer."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from dynamo.serve.errors import RequestError
from dynamo.serve.logprobs import LegacyLogprobs
from dynamo.serve.openai import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    RouteTiming,
    Usage,
)
from dynamo.serve.parameters import completion_sampling
from dynamo.serve.prompt import MAX_SEQUENCES, completion_prompts
from dynamo.serve.reply import ChoiceOutput, ReplyPlan
from dynamo.serve.served_model import ServedModel
from dynamo.serve.stream import CompletionStream

__all__ = ["plan_completion"]


async def plan_completion(request: CompletionRequest, served: ServedModel) -> ReplyPlan:
    """Checks a completion request and says what it comes to.

    Raises:
        RequestError: it cannot be served as it is.
    """
    prompts = await completion_prompts(served.codec, request.prompt, served.max_model_len)
    num_choices = request.n or 1
    if len(prompts) * num_choices > MAX_SEQUENCES:
        raise RequestError(
            f"{len(prompts)} prompts with n={num_choices} are {len(prompts) * num_choices} sequences; "
            f"accepted are at most {MAX_SEQUENCES} per request",
            param="n",
            code="invalid_value",
        )
    sampling = completion_sampling(
        request,
        served.defaults,
        prompt_tokens=[len(prompt) for prompt in prompts],
        max_model_len=served.max_model_len,
        vocab_size=served.codec.vocab_size,
    )
    echoes = _echoes(request, prompts, num_choices, served)
    include_usage = bool(request.stream_options and request.stream_options.include_usage)

    def open_stream(response_id: str, created: int) -> CompletionStream:
        return CompletionStream(
            response_id,
            created,
            served.name,
            echoes,
            include_usage=include_usage,
            codec=served.codec,
            num_logprobs=sampling.num_logprobs,
            with_token_ids=bool(request.return_token_ids),
        )

    def render_body(
        response_id: str, created: int, outputs: Sequence[ChoiceOutput], usage: Usage, timing: RouteTiming | None
    ) -> bytes:
        choices = [
            CompletionChoice(
                index=index,
                text=echo + output.text,
                logprobs=_logprobs(served, output, sampling.num_logprobs),
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
                token_ids=output.token_ids if request.return_token_ids else UNSET,
            )
            for index, (echo, output) in enumerate(zip(echoes, outputs, strict=True))
        ]
        answer = Completion(
            response_id, "text_completion", created, served.name, choices, usage, UNSET if timing is None else timing
        )
        return msgspec.json.encode(answer)

    return ReplyPlan(
        prompts=prompts,
        num_choices=num_choices,
        sampling=sampling,
        cache_salt=request.cache_salt or "",
        id_prefix="cmpl-",
        include_usage=include_usage,
        open_stream=open_stream if request.stream else None,
        render_body=render_body,
    )


def _echoes(
    request: CompletionRequest, prompts: Sequence[list[int]], num_choices: int, served: ServedModel
) -> list[str]:
    """What stands before each choice's own text: nothing, the text as sent, or what the token ids say."""
    if not request.echo:
        return [""] * (len(prompts) * num_choices)
    if isinstance(request.prompt, str):
        texts = [request.prompt]
    elif all(isinstance(entry, str) for entry in request.prompt):
        texts = [entry for entry in request.prompt if isinstance(entry, str)]
    else:
        texts = [served.codec.decode(prompt) for prompt in prompts]
    return [text for text in texts for _ in range(num_choices)]


def _logprobs(served: ServedModel, output: ChoiceOutput, num_logprobs: int | None) -> CompletionLogprobs | None:
    if num_logprobs is None:
        return None
    return LegacyLogprobs(served.codec).entries(output.logprobs, num_logprobs)
