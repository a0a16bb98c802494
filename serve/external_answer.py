"""The answer of a foreign completion server, chunk by chunk, as the deltas of a request."""

from collections.abc import Sequence
from typing import Final, Protocol

from dynamo.serve.engine.output_text import OutputText
from dynamo.serve.engine.request import FinishReason, GenerationRequest, OutputDelta, TokenLogprob
from dynamo.serve.errors import RequestFailedError, ServeError, WorkerLostError
from dynamo.serve.external_wire import Choice, Chunk, Logprobs, error_of

__all__ = ["ExternalAnswer", "Spelling"]

_FINISH_REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length"}
_TOKEN_ID_KEY: Final = "token_id:"
_MAX_TOKEN_ID: Final = (1 << 32) - 1


class Spelling(Protocol):
    """The part of the tokenizer that is needed here."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...

    def encode(self, text: str, *, max_tokens: int) -> list[int]: ...


class ExternalAnswer:
    """What one attempt has brought so far.

    The last delta waits for the event that follows it, which says how much of the prompt was cached.

    Args:
        has_token_ids: whether the server sends them; else texts are taken as they come.

    Attributes:
        is_over: the last delta was handed out.
        failure: why there will be none; what `take` returned before it is valid.
    """

    def __init__(
        self,
        worker_id: str,
        request: GenerationRequest,
        spelling: Spelling,
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        has_token_ids: bool,
    ) -> None:
        self._worker_id = worker_id
        self._spelling = spelling
        self._max_model_len = max_model_len
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._num_top = request.sampling.num_logprobs
        self._text = OutputText(request, spelling, eos_token_ids=eos_token_ids, max_model_len=max_model_len)
        self._has_token_ids = has_token_ids
        # Text that the worker before held back, such as the beginning of what could have become a stop string.
        self._owed = "" if has_token_ids else self._text.finish()
        self._has_delivered = False
        self._last: OutputDelta | None = None
        self.is_over = False
        self.failure: ServeError | None = None

    def take(self, chunks: Sequence[Chunk], is_done: bool) -> list[OutputDelta]:
        """The deltas of chunks that arrived together; may be none. Where they say that it failed, `failure` is set.

        Args:
            is_done: the server said that nothing follows.
        """
        deltas: list[OutputDelta] = []
        is_last_due = is_done
        for chunk in chunks:
            if chunk.error is not None and self._last is None:
                self.failure = self._failure_of(chunk)
            for choice in chunk.choices[:1]:
                if self._last is not None:
                    is_last_due |= bool(choice.token_ids)  # it goes on where the text has ended
                    continue
                delta = self._delta(choice)
                if delta is None or self.failure is not None:
                    continue
                self._has_delivered = True
                if delta.finish_reason is None:
                    deltas.append(delta)
                else:
                    self._last = delta
                    # Of stop strings the server was not told: it would go on, and nothing more of it is of use.
                    is_last_due |= isinstance(delta.stop_reason, str) and choice.finish_reason is None
            if self.failure is not None:
                break
            if self._last is not None and chunk.usage is not None:
                details = chunk.usage.prompt_tokens_details
                found = (details.cached_tokens if details else None) or 0
                self._last.num_cached_tokens = min(max(0, found), self._num_prompt_tokens)
                is_last_due = True
        return deltas + self.drain() if is_last_due else deltas

    def drain(self) -> list[OutputDelta]:
        """The last delta, if it is known already; for when nothing more comes."""
        deltas, self._last = [] if self._last is None else [self._last], None
        self.is_over = self.is_over or bool(deltas)
        return deltas

    def broken(self, reason: str) -> ServeError:
        """What to raise when the answer stopped in the middle."""
        if self._has_delivered and not self._has_token_ids:
            return RequestFailedError(
                f"worker {self._worker_id} broke off ({reason}), and as it gives no token ids, nobody can go on from there"
            )
        return WorkerLostError(self._worker_id, reason)

    def _delta(self, choice: Choice) -> OutputDelta | None:
        if self._has_token_ids:
            delta = self._from_token_ids(choice)
        else:
            ids = self._spelling.encode(choice.text, max_tokens=self._max_model_len) if choice.text else []
            text, self._owed = self._owed + choice.text, ""
            delta = OutputDelta(text, [token_id for token_id in ids if not self._spelling.is_special(token_id)])
        if choice.finish_reason is not None and delta.finish_reason is None:
            reason = _FINISH_REASONS.get(choice.finish_reason)
            if reason is None:
                self.failure = self.broken(f"it ended the request with {choice.finish_reason!r}")
            else:
                delta.finish_reason, delta.stop_reason = reason, choice.stop_reason
                delta.text += self._text.finish()
        is_empty = not (delta.text or delta.token_ids or delta.finish_reason)
        return None if is_empty else delta

    def _from_token_ids(self, choice: Choice) -> OutputDelta:
        delta, texts = OutputDelta(), []
        if choice.token_ids is None and choice.text:
            self.failure = WorkerLostError(self._worker_id, "it no longer sends token ids")
        for token_id in choice.token_ids or ():
            if not 0 <= token_id <= _MAX_TOKEN_ID:
                self.failure = WorkerLostError(self._worker_id, f"it sent the token id {token_id}")
                break
            text, delta.finish_reason, delta.stop_reason = self._text.push(token_id)
            texts.append(text)
            delta.token_ids.append(token_id)
            if delta.finish_reason is not None:
                break
        delta.text = "".join(texts)
        if self._num_top is not None and delta.token_ids:
            delta.logprobs = self._logprobs(choice.logprobs, delta.token_ids, self._num_top)
        return delta

    def _logprobs(self, given: Logprobs | None, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
        if given is None or len(given.token_logprobs) < len(token_ids):
            self.failure = RequestFailedError(f"worker {self._worker_id} sent fewer logprobs than tokens")
            return []
        tops = given.top_logprobs or []
        return [
            TokenLogprob(
                token_id,
                given.token_logprobs[place] or 0.0,
                self._top((tops[place] if place < len(tops) else None) or {}, num_top),
            )
            for place, token_id in enumerate(token_ids)
        ]

    def _top(self, logprobs: dict[str, float], num_top: int) -> tuple[tuple[int, float], ...]:
        """The most likely tokens; one whose text stands for no single token is left out."""
        best = sorted(logprobs.items(), key=lambda item: -item[1])[:num_top]
        known = ((self._token_id(key), logprob) for key, logprob in best)
        return tuple((token_id, logprob) for token_id, logprob in known if token_id is not None)

    def _token_id(self, key: str) -> int | None:
        if key.startswith(_TOKEN_ID_KEY) and key[len(_TOKEN_ID_KEY) :].isdecimal():
            return int(key[len(_TOKEN_ID_KEY) :])
        ids = self._spelling.encode(key, max_tokens=self._max_model_len)
        ids = [token_id for token_id in ids if not self._spelling.is_special(token_id)]
        return ids[0] if len(ids) == 1 else None

    def _failure_of(self, chunk: Chunk) -> ServeError:
        told = error_of(chunk.error)
        is_clients = told.code == "request_failed" or (told.code or "").startswith("4")
        reason = f"it broke the request off: {told.message}"
        return RequestFailedError(f"worker {self._worker_id}: {reason}") if is_clients else self.broken(reason)
