"""A request on its way through the engine, and what the scheduler needs of a cache. No tensors here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.hashing import BlockKey
from dynamo.serve.engine.request import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from dynamo.serve.engine.sampler import SamplingState

__all__ = ["CacheSequence", "DeviceCache", "Phase", "SequenceState"]


class CacheSequence(Protocol):
    """The part of `dynamo.kvcache.Sequence` that an inference loop needs. See there for what each does."""

    @property
    def is_ready(self) -> bool: ...
    @property
    def patience_left_s(self) -> float: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def block_keys(self) -> Sequence[BlockKey]: ...
    @property
    def block_table(self) -> npt.NDArray[np.int32]: ...
    def next_span(self, num_computed: int, max_tokens: int, /) -> tuple[int, int]: ...
    def when_ready(self, callback: Callable[[], None], /) -> None: ...
    def append(self, tokens: list[int], /) -> None: ...
    def commit(self, num_tokens: int | None = None, /) -> None: ...
    def close(self) -> None: ...


class DeviceCache(Protocol):
    """The part of `dynamo.kvcache.KVCache` that the scheduler needs."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_device_blocks(self) -> int: ...
    @property
    def num_available_blocks(self) -> int: ...
    def open(
        self, tokens: list[int], /, *, salt: str = "", spare_blocks: int = 0, overlap: bool = False
    ) -> CacheSequence: ...


class Phase(Enum):
    """Where a sequence stands.

    WAITING → LOADING → PREFILL → DECODE → FINISHED, and from any of the middle three back to WAITING by preemption.
    """

    WAITING = "waiting"
    LOADING = "loading"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class SequenceState:
    """One request's tokens and how far they are computed. Only the scheduler changes it, on the engine's thread.

        tokens   [0 ............ num_computed)   KV is written
                 [num_computed .. reserved)      the cache has slots for them, and knows the tokens
                 [reserved ...... capacity)      fall into the last reserved block; the cache is told once it is full
                 [capacity ......)               need a block that is not reserved yet

    Attributes:
        arrival: order of arrival; a preempted sequence keeps it.
        tokens: prompt, then generated tokens, here or elsewhere.
        kv: its blocks in the cache; None while waiting and once finished.
        salt: see `GenerationRequest.cache_salt`.
        num_admissions: times it was let in; more than one after preemptions.
        computing_admission: the first of them in which it computed; 0 before that.
        num_cached_tokens: prompt tokens whose KV came from the cache then, as far as is known; None before that. Those
            generated elsewhere are no part of the prompt.
        sampling: the sampler's memory of it, made by the runner; survives preemption.
    """

    request_id: str
    params: SamplingParams
    salt: str
    tokens: list[int]
    num_prompt_tokens: int
    arrival: int = 0
    phase: Phase = Phase.WAITING
    kv: CacheSequence | None = None
    num_computed: int = 0
    reserved: int = 0
    capacity: int = 0
    num_admissions: int = 0
    computing_admission: int = 0
    num_cached_tokens: int | None = None
    sampling: "SamplingState | None" = field(default=None, repr=False)

    @classmethod
    def from_request(cls, request: GenerationRequest) -> "SequenceState":
        prompt = request.prompt_token_ids
        return cls(
            request_id=request.request_id,
            params=request.sampling,
            salt=request.cache_salt,
            tokens=[*prompt, *request.output_token_ids],
            num_prompt_tokens=len(prompt),
        )

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_tokens(self) -> Sequence[int]:
        """Copy of the generated tokens."""
        return self.tokens[self.num_prompt_tokens :]
