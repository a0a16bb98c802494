"""One request's way from sampled tokens to text: detokenisation and the exact place where it ends."""

from dynamo.serve.engine.delivery import OutputStream
from dynamo.serve.engine.request import FinishReason, GenerationRequest, OutputDelta
from dynamo.serve.engine.sampler import SampledToken
from dynamo.serve.engine.sequence import SequenceState
from dynamo.serve.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from dynamo.serve.errors import RequestFailedError

__all__ = ["Generation"]


class Generation:
    """A live request. Made on the event loop, from then on used by the engine's thread alone.

    Attributes:
        sequence: what the scheduler knows of it.
        stream: where its deltas go.
        is_finished: it has ended, for whatever reason; it holds no blocks and gets no more deltas.

    Raises:
        RequestFailedError: the tokens generated elsewhere have ended the request already.
    """

    __slots__ = (
        "_detokenizer",
        "_ending_ids",
        "_max_tokens",
        "_min_tokens",
        "_num_tokens",
        "_stop_ids",
        "_wants_logprobs",
        "is_finished",
        "sequence",
        "stream",
    )

    def __init__(
        self,
        request: GenerationRequest,
        stream: OutputStream,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        params = request.sampling
        self.sequence = SequenceState.from_request(request)
        self.stream = stream
        self.is_finished = False
        self._stop_ids = params.stop_token_ids
        self._ending_ids = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_token_ids
        self._max_tokens = min(params.max_tokens, max_model_len - len(request.prompt_token_ids))
        self._min_tokens = params.min_tokens
        self._wants_logprobs = params.num_logprobs is not None
        self._num_tokens = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.stop, params.min_tokens)
        for token_id in request.output_token_ids:
            if self._advance(token_id)[1] is not None:
                raise RequestFailedError(
                    f"request {request.request_id} cannot go on: it ended with output token {self._num_tokens} of the "
                    f"{len(request.output_token_ids)} that were generated before"
                )

    def push(self, sampled: SampledToken) -> OutputDelta:
        """Takes the next token. Sets `is_finished` if it is the last; an ending token id is counted but has no text."""
        text, finish_reason, stop_reason = self._advance(sampled.token_id)
        if finish_reason is not None:
            self.is_finished = True
        return OutputDelta(
            text,
            [sampled.token_id],
            [sampled.logprob] if self._wants_logprobs and sampled.logprob is not None else None,
            finish_reason,
            stop_reason,
            self.sequence.num_cached_tokens or 0,
        )

    def _advance(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Counts a token: the text that is certain with it, why it is the last if it is, and the stop that ended it."""
        num_tokens = self._num_tokens = self._num_tokens + 1
        if token_id in self._ending_ids and num_tokens >= self._min_tokens:
            return self._detokenizer.finish(), "stop", token_id if token_id in self._stop_ids else None
        text, stop = self._detokenizer.push(token_id)
        if stop is not None:
            return text, "stop", stop
        if num_tokens >= self._max_tokens:
            return text + self._detokenizer.finish(), "length", None
        return text, None, None
