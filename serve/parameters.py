"""From a request's fields to how its tokens are chosen: defaults filled in, and what no single field can show checked."""

from collections.abc import Sequence
from dataclasses import replace

from dynamo.serve.engine.request import SamplingDefaults, SamplingParams
from dynamo.serve.errors import RequestError
from dynamo.serve.openai import ChatCompletionRequest, CompletionRequest, SamplingFields

__all__ = ["chat_sampling", "completion_sampling", "with_seed"]

DEFAULT_COMPLETION_TOKENS = 16
_SEED_MASK = 2**63 - 1


def chat_sampling(
    request: ChatCompletionRequest,
    defaults: SamplingDefaults,
    *,
    prompt_tokens: int,
    max_model_len: int,
    vocab_size: int,
) -> SamplingParams:
    """Sampling of a chat completion; without a limit of its own it may fill the context.

    Raises:
        RequestError: the fields contradict each other, or prompt and completion do not fit into the context.
    """
    if request.store:
        raise _unsupported("store", "completions are not stored; send false or leave it out")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    limits = {"max_tokens": request.max_tokens, "max_completion_tokens": request.max_completion_tokens}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if len(set(given.values())) > 1:
        raise RequestError(
            f"max_tokens {request.max_tokens} and max_completion_tokens {request.max_completion_tokens} differ; send one",
            param="max_completion_tokens",
            code="invalid_value",
        )
    param, wanted = next(iter(given.items()), (None, None))
    max_tokens = _max_tokens(wanted, param, "messages", [prompt_tokens], max_model_len)
    if wanted is None and defaults.max_tokens is not None:
        max_tokens = min(max_tokens, defaults.max_tokens)
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling(request, defaults, max_tokens, num_logprobs, vocab_size)


def completion_sampling(
    request: CompletionRequest,
    defaults: SamplingDefaults,
    *,
    prompt_tokens: Sequence[int],
    max_model_len: int,
    vocab_size: int,
) -> SamplingParams:
    """Sampling of a text completion, for all its prompts.

    Args:
        prompt_tokens: the length of each prompt.

    Raises:
        RequestError: the fields contradict each other, or prompt and completion do not fit into the context.
    """
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise _unsupported(
            "best_of", f"{request.best_of} is not n ({request.n or 1}); choices are not ranked, so ask for n"
        )
    if request.echo and request.logprobs is not None:
        raise _unsupported("echo", "logprobs of the prompt are not supported; leave out either echo or logprobs")
    if request.max_tokens is None:
        wanted, param = min(DEFAULT_COMPLETION_TOKENS, max(1, max_model_len - max(prompt_tokens))), None
    else:
        wanted, param = request.max_tokens, "max_tokens"
    max_tokens = _max_tokens(wanted, param, "prompt", prompt_tokens, max_model_len)
    return _sampling(request, defaults, max_tokens, request.logprobs, vocab_size)


def with_seed(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The same sampling for the choice-th of several replies: seeds count up, so that replies differ but can be had again."""
    if sampling.seed is None or choice == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice) & _SEED_MASK)


def _max_tokens(
    wanted: int | None, param: str | None, prompt_param: str, prompt_tokens: Sequence[int], max_model_len: int
) -> int:
    longest = max(prompt_tokens)
    room = max_model_len - longest
    # Clients recognise this error by the words OpenAI uses for it.
    limit = f"this model's maximum context length is {max_model_len} tokens"
    if room < 1:
        raise RequestError(
            f"{limit}, but the prompt alone has {longest}; send a prompt of at most {max_model_len - 1} tokens",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if wanted is None:
        return room
    if wanted > room:
        raise RequestError(
            f"{limit}, but {longest + wanted} are requested: {longest} of the prompt and {wanted} of the completion "
            f"({param}); send a shorter prompt or at most {room} for {param}",
            param=param,
            code="context_length_exceeded",
        )
    return wanted


def _sampling(
    request: SamplingFields, defaults: SamplingDefaults, max_tokens: int, num_logprobs: int | None, vocab_size: int
) -> SamplingParams:
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise _unsupported("stream_options.include_obfuscation", "chunks are not padded; send false or leave it out")
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens {min_tokens} exceeds the {max_tokens} tokens that may be generated",
            param="min_tokens",
            code="invalid_value",
        )
    stop_token_ids = frozenset(request.stop_token_ids or ())
    if stop_token_ids and max(stop_token_ids) >= vocab_size:
        raise RequestError(
            f"stop_token_ids has {max(stop_token_ids)}, but the model's token ids end at {vocab_size - 1}",
            param="stop_token_ids",
            code="invalid_value",
        )
    top_k = defaults.top_k if request.top_k is None else request.top_k
    stop = request.stop or ()
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=top_k if top_k is not None and top_k > 0 else None,
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=defaults.repetition_penalty
        if request.repetition_penalty is None
        else request.repetition_penalty,
        seed=None if request.seed is None else request.seed & _SEED_MASK,
        min_tokens=min_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=num_logprobs,
    )


def _unsupported(param: str, why: str) -> RequestError:
    return RequestError(f"{param}: {why}", param=param, code="unsupported_parameter")
