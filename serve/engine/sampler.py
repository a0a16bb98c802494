"""Chooses tokens from logits, each row by its own request's settings, in a few operations over the whole batch."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamo.serve.engine.request import SamplingParams, TokenLogprob
from dynamo.serve.errors import RequestFailedError

__all__ = ["SampledToken", "Sampler", "SamplingState"]

NUM_CANDIDATES = 32
"""Most likely tokens looked at first, and eight times as many as long as top_p and min_p keep all of them. Finding few is
much cheaper than sorting a row, and few are nearly always enough."""

UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; `logprob` only where the request asked for logprobs."""

    token_id: int
    logprob: TokenLogprob | None


class SamplingState:
    """What sampling remembers of one request: how many tokens it has, which, and where its random numbers stand.

    Random numbers depend only on the seed and the index of the token in the output, so a request draws the same ones
    whatever runs beside it, and goes on where it was after preemption, or elsewhere when built anew from its tokens.

    Args:
        output_token_ids: tokens already generated.
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()
    ) -> None:
        self.params = params
        self.num_output_tokens = 0
        self._stream = _mix64((secrets.randbits(64) if params.seed is None else params.seed) & UINT64)
        self._penalises_repetition = params.repetition_penalty != 1.0
        self.has_penalties = self._penalises_repetition or bool(params.presence_penalty or params.frequency_penalty)
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.empty(64, np.float32)
        if self._penalises_repetition:
            for token_id in dict.fromkeys(prompt_token_ids):
                self._count(token_id, 0)
        for token_id in output_token_ids:
            self.record(token_id)

    @property
    def seen_token_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Distinct tokens the penalties are about: those of the output, and of the prompt where repetition is penalised."""
        return self._ids[: len(self._index)]

    @property
    def seen_counts(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """How often each of `seen_token_ids` is in the output."""
        return self._counts[: len(self._index)]

    def record(self, token_id: int) -> None:
        """Notes the next output token."""
        self.num_output_tokens += 1
        if self.has_penalties:
            self._count(token_id, 1)

    def uniform(self) -> float:
        """The random number in [0, 1) for the next output token (SplitMix64, Steele et al. 2014)."""
        bits = _mix64((self._stream + (self.num_output_tokens + 1) * 0x9E3779B97F4A7C15) & UINT64)
        return (bits >> 12) * 2.0**-52

    def _count(self, token_id: int, amount: int) -> None:
        place = self._index.get(token_id)
        if place is None:
            place = self._index[token_id] = len(self._index)
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token_id, 0
        self._counts[place] += amount


class Sampler:
    """Samples a batch. Keeps nothing between calls; what it remembers is in the states, which one call at a time may use.

    Args:
        eos_token_ids: banned, with a request's stop token ids, until it has min_tokens tokens.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken | RequestFailedError]:
        """Chooses one token per row and records it in the row's state.

        Penalties come first, then temperature, top_k, top_p over what top_k left, and min_p. Logprobs are those of the
        model's own distribution, before all of these.

        Args:
            logits: float32 [num_rows, vocab_size]; overwritten.
            states: of the rows' requests.

        Returns:
            Per row the token, or an error for a row without finite maximum (NaN or infinite logits).
        """
        if logits.shape[0] != len(states):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(states)} states")
        if not states:
            return []
        with torch.inference_mode():
            wanted = [i for i, state in enumerate(states) if state.params.num_logprobs is not None]
            logprobs = logits[wanted].log_softmax(-1) if wanted else None
            self._ban_endings(logits, states)
            _apply_penalties(logits, states)
            best, choices = logits.max(dim=-1)
            token_ids, is_valid = choices.tolist(), best.isfinite().tolist()
            drawn = [i for i, state in enumerate(states) if state.params.temperature > 0 and is_valid[i]]
            if drawn:
                rows = logits if len(drawn) == len(states) else logits[drawn]
                for i, token_id in zip(drawn, _draw(rows, [states[i] for i in drawn]), strict=True):
                    token_ids[i] = token_id
            entries: list[TokenLogprob | None] = [None] * len(states)
            if logprobs is not None:
                chosen = [token_ids[i] for i in wanted]
                for i, entry in zip(
                    wanted, _logprob_entries(logprobs, chosen, [states[i] for i in wanted]), strict=True
                ):
                    entries[i] = entry
        outcomes: list[SampledToken | RequestFailedError] = []
        for state, token_id, logprob, valid in zip(states, token_ids, entries, is_valid, strict=True):
            if valid:
                state.record(token_id)
                outcomes.append(SampledToken(token_id, logprob))
            else:
                outcomes.append(RequestFailedError("the model gave NaN or infinite logits for this request"))
        return outcomes

    def _ban_endings(self, logits: Tensor, states: Sequence[SamplingState]) -> None:
        rows, columns = [], []
        for i, state in enumerate(states):
            if state.num_output_tokens < state.params.min_tokens:
                banned = [t for t in self._eos_token_ids | state.params.stop_token_ids if t < logits.shape[1]]
                rows += [i] * len(banned)
                columns += banned
        if rows:
            places = torch.tensor([rows, columns], device=logits.device)
            logits[places[0], places[1]] = -torch.inf


def _apply_penalties(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """Applies repetition penalty, then presence and frequency penalties, to the tokens each request has seen."""
    penalised = [i for i, state in enumerate(states) if state.has_penalties]
    if not penalised:
        return
    ids = [states[i].seen_token_ids for i in penalised]
    lengths = [len(x) for x in ids]
    params = [states[i].params for i in penalised]
    per_row = np.array([(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params], np.float32)
    repetition, presence, frequency = np.repeat(per_row, lengths, axis=0).T
    counts = np.concatenate([states[i].seen_counts for i in penalised])
    subtracted = torch.from_numpy(frequency * counts + presence * (counts > 0)).to(logits.device)
    factor = torch.from_numpy(np.ascontiguousarray(repetition)).to(logits.device)
    rows = torch.from_numpy(np.repeat(np.array(penalised), lengths)).to(logits.device)
    columns = torch.from_numpy(np.concatenate(ids)).to(logits.device)
    values = logits[rows, columns]
    logits[rows, columns] = torch.where(values > 0, values / factor, values * factor) - subtracted


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Draws one token per row of finite-maximum logits by inverting the cumulative distribution at `uniform()`."""
    device, vocab_size = logits.device, logits.shape[1]
    temperature = torch.tensor([[state.params.temperature] for state in states], device=device)
    # Shifted before the division, so that a tiny temperature gives -inf and not inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    uniform = torch.tensor([[state.uniform()] for state in states], dtype=torch.float64, device=device)
    open_rows = [i for i, state in enumerate(states) if not _truncates(state.params, vocab_size)]
    token_ids = [0] * len(states)
    if open_rows:
        whole = len(open_rows) == len(states)
        rows, points = (scaled, uniform) if whole else (scaled[open_rows], uniform[open_rows])
        cumulative = rows.exp().cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
        for i, token_id in zip(open_rows, drawn.squeeze(1).tolist(), strict=True):
            token_ids[i] = token_id
    is_open = set(open_rows)
    pending = [i for i in range(len(states)) if i not in is_open]
    limits = [min(states[i].params.top_k or 0, vocab_size) for i in pending]
    num_candidates = min(vocab_size, max(NUM_CANDIDATES, *limits)) if pending else 0
    while pending:
        drawn_ids = _draw_truncated(
            scaled[pending], uniform[pending], [states[i].params for i in pending], num_candidates
        )
        for i, drawn_id in zip(pending, drawn_ids, strict=True):
            if drawn_id is not None:
                token_ids[i] = drawn_id
        pending = [i for i, drawn_id in zip(pending, drawn_ids, strict=True) if drawn_id is None]
        num_candidates = min(vocab_size, 8 * num_candidates)
    return token_ids


def _draw_truncated(
    scaled: Tensor, uniform: Tensor, params: Sequence[SamplingParams], num_candidates: int
) -> list[int | None]:
    """Draws from the `num_candidates` most likely tokens; None for rows whose kept tokens do not end among them.

    In order of probability, top_k, top_p and min_p each keep a beginning of the row, so the shortest decides.
    """
    vocab_size, device = scaled.shape[1], scaled.device
    values, ids = scaled.topk(num_candidates, dim=-1)
    probabilities = values.exp()  # relative to the most likely token's
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    top_k = torch.tensor([[min(p.top_k or vocab_size, vocab_size)] for p in params], device=device)
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([[p.min_p] for p in params], device=device)
    mass_of_k = cumulative.gather(1, top_k.clamp(max=num_candidates) - 1)
    mass = torch.where(top_k < vocab_size, mass_of_k, scaled.exp().sum(-1, keepdim=True, dtype=torch.float64))
    mass_before = cumulative - probabilities
    in_top_p = (mass_before < top_p * mass) | (top_p >= 1)
    num_kept = (in_top_p & (probabilities >= min_p)).sum(-1, keepdim=True)
    num_kept = torch.minimum(num_kept, top_k).clamp(min=1)
    kept_mass = cumulative.gather(1, num_kept - 1)
    places = torch.searchsorted(cumulative, uniform * kept_mass, right=True).clamp(max=num_kept - 1)
    drawn: list[int | None] = ids.gather(1, places).squeeze(1).tolist()
    if num_candidates < vocab_size:
        is_cut = ((num_kept == num_candidates) & (top_k > num_candidates)).squeeze(1).tolist()
        drawn = [None if cut else token_id for token_id, cut in zip(drawn, is_cut, strict=True)]
    return drawn


def _truncates(params: SamplingParams, vocab_size: int) -> bool:
    return params.top_p < 1 or params.min_p > 0 or (params.top_k or vocab_size) < vocab_size


def _logprob_entries(logprobs: Tensor, chosen: list[int], states: Sequence[SamplingState]) -> list[TokenLogprob]:
    numbers = [state.params.num_logprobs or 0 for state in states]
    own = logprobs.gather(1, torch.tensor(chosen, device=logprobs.device)[:, None]).squeeze(1).tolist()
    values, ids = (x.tolist() for x in logprobs.topk(min(max(numbers), logprobs.shape[1]), dim=-1))
    return [
        TokenLogprob(token_id, logprob, tuple(zip(ids[i][:number], values[i][:number], strict=True)))
        for i, (token_id, logprob, number) in enumerate(zip(chosen, own, numbers, strict=True))
    ]


def _mix64(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & UINT64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & UINT64
    return value ^ (value >> 31)
