"""`--engine mocker`: no model, simulated time, real blocks.

Scheduler, cache and tiers are the real ones; only the forward pass is replaced. A step takes

    step_s + token_s · decoding sequences + prompt tokens computed / prefill_tokens_per_s

divided by `speedup`. What it writes into the cache names the token and its place, and what comes back from a lower tier
is compared with that, so a wrong block is found at once. Text is a paragraph, repeated.
"""

import math
import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.serve.engine.engine import InferenceEngine
from dynamo.serve.engine.request import TokenLogprob
from dynamo.serve.engine.sampler import SampledToken
from dynamo.serve.engine.scheduler import ScheduledStep, SchedulerLimits
from dynamo.serve.engine.sequence import SequenceState
from dynamo.serve.engine.step_meter import StepMeter
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import RequestFailedError

__all__ = ["DEFAULT_TEXT", "MockRunner", "MockTimings", "build_mock_engine", "mock_kv_spec"]

DEFAULT_TEXT = (
    " A cache is a promise that what was computed once need not be computed again. This one keeps the keys and values"
    " of a language model in blocks of a few tokens, first in the memory of the device, then in the memory of the host,"
    " and at last on disk. No model ran to write this: the mocker repeats one paragraph, and only its timing is modelled."
)

# Simulated: the chosen token has probability 0.9, each further one a tenth of the one before.
_LOGPROB = math.log(0.9)
_LOGPROB_STEP = math.log(0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MockTimings:
    """The modelled machine.

    Attributes:
        prefill_tokens_per_s: prompt tokens computed per second.
        step_s: what any step costs.
        token_s: what each decoding sequence adds to it.
        speedup: modelled time is divided by it; 0 or infinity: no waiting at all.
    """

    prefill_tokens_per_s: float
    step_s: float
    token_s: float
    speedup: float

    def __post_init__(self) -> None:
        if not self.prefill_tokens_per_s > 0:
            raise ValueError(f"prefill_tokens_per_s must be above 0, not {self.prefill_tokens_per_s}")
        if not (0 <= self.step_s < math.inf and 0 <= self.token_s < math.inf):
            raise ValueError(f"step_s and token_s must be seconds from 0 on, not {self.step_s} and {self.token_s}")
        if not self.speedup >= 0:
            raise ValueError(f"speedup must be above 0, not {self.speedup}; 0 or inf does not wait at all")

    @property
    def waits(self) -> bool:
        """Whether steps take any time."""
        return 0 < self.speedup < math.inf

    def modelled_s(self, num_decodes: int, num_prefill_tokens: int) -> float:
        """Seconds a step takes before `speedup`."""
        return self.step_s + self.token_s * num_decodes + num_prefill_tokens / self.prefill_tokens_per_s

    def __str__(self) -> str:
        return (
            f"{self.prefill_tokens_per_s:g} prompt tokens/s, {self.step_s * 1e3:g} ms a step, "
            f"{self.token_s * 1e3:g} ms a decoding sequence, "
            + (f"speedup {self.speedup:g}" if self.waits else "no waiting")
        )


class MockRunner:
    """Stands in for a model: waits as long as one would take, and replays `token_ids` by output position.

    Args:
        cache: made from `mock_kv_spec`, on the CPU.
        token_ids: at least one; repeated for ever.
    """

    def __init__(self, cache: KVCache, token_ids: list[int], timings: MockTimings) -> None:
        if not token_ids:
            raise ValueError("the mocker needs at least one token to say")
        keys, values = cache.layer(0)
        # [num_blocks, block_size] views: of each token, one element of K and one of V.
        self._written_ids: npt.NDArray[np.float32] = keys[:, :, 0, 0].numpy()
        self._written_places: npt.NDArray[np.float32] = values[:, :, 0, 0].numpy()
        self._block_size = cache.block_size
        self._timings = timings
        self._meter = StepMeter(cache.observe_compute)
        self._tokens = [SampledToken(token_id, None) for token_id in token_ids]
        self._num_tokens = len(token_ids)

    def execute(self, step: ScheduledStep) -> list[SampledToken | RequestFailedError]:
        started = time.monotonic()
        for sequence in step.decodes:
            if sequence.num_computed + 1 == sequence.capacity:
                self._write_blocks(sequence, sequence.num_computed, sequence.capacity)
        for chunk in step.prefills:
            sequence = chunk.sequence
            first = sequence.num_computed
            if first and sequence.kv is not None and sequence.kv.num_cached_tokens:
                self._verify_blocks(sequence, first)
            self._write_blocks(sequence, first, first + chunk.num_tokens)
        sampled = [self._next_token(sequence) for sequence in step.sampling]
        seconds = self._timings.modelled_s(len(step.decodes), step.num_prefill_tokens)
        if self._timings.waits:
            rest_s = started + seconds / self._timings.speedup - time.monotonic()
            time.sleep(min(max(0.0, rest_s), threading.TIMEOUT_MAX))  # a longer sleep is an error
            seconds = time.monotonic() - started
        self._meter.add(step, seconds)  # without waiting, the cache decides as on the modelled machine
        return sampled

    def _next_token(self, sequence: SequenceState) -> SampledToken | RequestFailedError:
        place = (len(sequence.tokens) - sequence.num_prompt_tokens) % self._num_tokens
        token = self._tokens[place]
        num_logprobs = sequence.params.num_logprobs
        if num_logprobs is None:
            return token
        alternatives = range(min(num_logprobs, self._num_tokens))
        top = tuple(
            (self._tokens[(place + i) % self._num_tokens].token_id, _LOGPROB + i * _LOGPROB_STEP) for i in alternatives
        )
        return SampledToken(token.token_id, TokenLogprob(token.token_id, _LOGPROB, top))

    def _write_blocks(self, sequence: SequenceState, first: int, last: int) -> None:
        """Writes the blocks that computing tokens [first, last) makes full; nobody reads one that is not."""
        table, block_size = self._full_blocks(sequence, first, last)
        if not len(table):
            return
        start = first - first % block_size
        places = np.arange(start, start + len(table) * block_size, dtype=np.float32).reshape(-1, block_size)
        self._written_ids[table] = self._token_rows(sequence, start, len(table))
        self._written_places[table] = places

    def _verify_blocks(self, sequence: SequenceState, num_cached: int) -> None:
        table, block_size = self._full_blocks(sequence, 0, num_cached)
        places = np.arange(len(table) * block_size, dtype=np.float32).reshape(-1, block_size)
        same_ids = self._written_ids[table] == self._token_rows(sequence, 0, len(table))
        same_places = self._written_places[table] == places
        wrong = np.flatnonzero(~(same_ids & same_places).all(axis=1))
        if len(wrong):
            raise RuntimeError(
                f"the cache gave request {sequence.request_id} wrong content for blocks {wrong.tolist()} of its prompt"
            )

    def _full_blocks(self, sequence: SequenceState, first: int, last: int) -> tuple[npt.NDArray[np.int32], int]:
        assert sequence.kv is not None, f"{sequence.request_id} holds no blocks"
        block_size = self._block_size
        return sequence.kv.block_table[first // block_size : last // block_size], block_size

    def _token_rows(self, sequence: SequenceState, start: int, num_blocks: int) -> npt.NDArray[np.float32]:
        tokens = sequence.tokens[start : start + num_blocks * self._block_size]
        return np.array(tokens, dtype=np.float32).reshape(num_blocks, self._block_size)


def mock_kv_spec(model: str, block_size: int) -> KVSpec:
    """A spec whose blocks are tiny: 64 bytes a token."""
    return KVSpec(
        model=f"mocker/{model}", num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=block_size
    )


def build_mock_engine(
    tokenizer: Tokenizer,
    cache: KVCache,
    *,
    timings: MockTimings,
    max_model_len: int,
    limits: SchedulerLimits,
    max_waiting: int,
    text: str = DEFAULT_TEXT,
) -> InferenceEngine:
    """An engine without a model. It never says end-of-sequence: requests end by `max_tokens` or a stop.

    Args:
        cache: made from `mock_kv_spec`, on the CPU; the engine closes it.
        text: what it says, again and again.
    """
    token_ids = [t for t in tokenizer.encode(text, add_special_tokens=False) if t not in tokenizer.eos_token_ids]
    return InferenceEngine(
        cache,
        MockRunner(cache, token_ids, timings),
        tokenizer,
        eos_token_ids=tokenizer.eos_token_ids,
        max_model_len=max_model_len,
        limits=limits,
        max_waiting=max_waiting,
    )
