"""From a request's generated tokens to its text, and the exact place where it ends. No torch: a front does it as well."""

from dynamo.serve.engine.request import FinishReason, GenerationRequest
from dynamo.serve.engine.tokenizer import IncrementalDetokenizer, TokenSpelling
from dynamo.serve.errors import RequestFailedError

__all__ = ["OutputText"]


class OutputText:
    """One request's tokens become text, in order. What was generated elsewhere is taken in first, without handing it out.

    Args:
        eos_token_ids: tokens that end the request unless it ignores them.
        max_model_len: most tokens of prompt and output together.

    Raises:
        RequestFailedError: one of `request.output_token_ids` ended it already.
    """

    __slots__ = ("_detokenizer", "_ending_ids", "_max_tokens", "_min_tokens", "_num_tokens", "_stop_ids")

    def __init__(
        self,
        request: GenerationRequest,
        spelling: TokenSpelling,
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        params = request.sampling
        self._stop_ids = params.stop_token_ids
        self._ending_ids = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_token_ids
        self._max_tokens = min(params.max_tokens, max_model_len - len(request.prompt_token_ids))
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._detokenizer = IncrementalDetokenizer(spelling, params.stop, params.min_tokens)
        for token_id in request.output_token_ids:
            if self.push(token_id)[1] is not None:
                raise RequestFailedError(
                    f"request {request.request_id} cannot go on: it ended with output token {self._num_tokens} of the "
                    f"{len(request.output_token_ids)} that were generated before"
                )

    def push(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Counts a token: the text that is certain with it, why it is the last if it is, and the stop that ended it.

        An ending token id is counted but has no text.
        """
        num_tokens = self._num_tokens = self._num_tokens + 1
        if token_id in self._ending_ids and num_tokens >= self._min_tokens:
            return self._detokenizer.finish(), "stop", token_id if token_id in self._stop_ids else None
        text, stop = self._detokenizer.push(token_id)
        if stop is not None:
            return text, "stop", stop
        if num_tokens >= self._max_tokens:
            return text + self._detokenizer.finish(), "length", None
        return text, None, None

    def finish(self) -> str:
        """What was held back, for a request that somebody else ended."""
        return self._detokenizer.finish()
