"""One request's way from sampled tokens to text: detokenisation and the exact place where it ends."""

from dynamo.serve.engine.delivery import OutputStream
from dynamo.serve.engine.output_text import OutputText
from dynamo.serve.engine.request import GenerationRequest, OutputDelta
from dynamo.serve.engine.sampler import SampledToken
from dynamo.serve.engine.sequence import SequenceState
from dynamo.serve.engine.tokenizer import Tokenizer

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

    __slots__ = ("_text", "_wants_logprobs", "is_finished", "sequence", "stream")

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
        self._wants_logprobs = params.num_logprobs is not None
        self._text = OutputText(request, tokenizer, eos_token_ids=eos_token_ids, max_model_len=max_model_len)

    def push(self, sampled: SampledToken) -> OutputDelta:
        """Takes the next token. Sets `is_finished` if it is the last; an ending token id is counted but has no text."""
        text, finish_reason, stop_reason = self._text.push(sampled.token_id)
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
