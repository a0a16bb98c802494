"""Log probabilities in the shapes of the two endpoints."""

import codecs
from collections.abc import Sequence

from dynamo.serve.engine.request import TokenLogprob
from dynamo.serve.openai import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from dynamo.serve.prompt import TextCodec

__all__ = ["LegacyLogprobs", "chat_logprobs"]

# Infinity has no place in JSON; this is what OpenAI sends for tokens that cannot occur.
_LOWEST_LOGPROB = -9999.0


def chat_logprobs(codec: TextCodec, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """One entry per token, each with the most likely tokens at its place."""
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token=codec.token_text(entry.token_id),
                logprob=max(entry.logprob, _LOWEST_LOGPROB),
                bytes=list(codec.token_bytes(entry.token_id)),
                top_logprobs=[
                    TopLogprob(
                        codec.token_text(token_id), max(logprob, _LOWEST_LOGPROB), list(codec.token_bytes(token_id))
                    )
                    for token_id, logprob in entry.top
                ],
            )
            for entry in logprobs
        ]
    )


class LegacyLogprobs:
    """Logprobs of one choice of a text completion, whose offsets run on from delta to delta.

    Args:
        text_offset: characters of the choice's text before its first generated token.
    """

    def __init__(self, codec: TextCodec, text_offset: int = 0) -> None:
        self._codec = codec
        self._offset = text_offset
        # A character may be spread over several tokens: only whole ones move the offset.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def entries(self, logprobs: Sequence[TokenLogprob], num_top: int) -> CompletionLogprobs:
        """The next tokens' entries; the chosen token is always among `top_logprobs`, as at OpenAI."""
        result = CompletionLogprobs([], [], [] if num_top else None, [])
        for entry in logprobs:
            token = self._codec.token_text(entry.token_id)
            logprob = max(entry.logprob, _LOWEST_LOGPROB)
            result.tokens.append(token)
            result.token_logprobs.append(logprob)
            result.text_offset.append(self._offset)
            if not self._codec.is_special(entry.token_id):  # those are no part of the text
                self._offset += len(self._decoder.decode(self._codec.token_bytes(entry.token_id)))
            if result.top_logprobs is not None:
                top = {self._codec.token_text(token_id): max(value, _LOWEST_LOGPROB) for token_id, value in entry.top}
                result.top_logprobs.append({**top, token: logprob})
        return result
