"""All that is known of one request while workers come and go under it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dynamo.kvcache.hashing import pack_tokens
from dynamo.serve.engine.request import DeltaSink, GenerationRequest, Journey, OutputDelta
from dynamo.serve.errors import ServeError
from dynamo.serve.plane.link import WorkerLink

__all__ = ["LiveRequest"]

_SEED_BITS = 63


@dataclass(slots=True)
class LiveRequest:
    """A request's whole state: with it, any worker can go on where another one stopped.

    What a worker knows beyond this (sampler, text that is held back, KV) follows from prompt, tokens and sampling, and is
    rebuilt from them by whoever carries the request on. One place for it all, so that more can be taken along.

    Attributes:
        request: as the client sent it, but a request that samples always has a seed: only then does the next worker
            draw the same tokens as this one would have.
        output_token_ids: what the client has, or is about to be handed.
        num_cached_tokens: as the first worker that delivered anything says.
        is_cached_known: that worker was lost, so that what it said last stands.
        num_attempts: how many workers began it.
        num_failures: how many of them were lost.
        failed: workers that were lost under it, or were about to leave, each with the way there: they are not asked again
            until there is another way, that of a new incarnation or connection.
        refused: workers that had no room for it since it last got on.
        last_worker, last_error: which worker was lost last, and how.
        lost_at_s: `time.perf_counter()` when it lost its worker, while no other one has delivered; None else.
        is_over: the last delta has its finish reason.
    """

    request: GenerationRequest
    journey: Journey
    output_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    is_cached_known: bool = False
    num_attempts: int = 0
    num_failures: int = 0
    failed: dict[str, WorkerLink] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    last_worker: str = ""
    last_error: ServeError | None = None
    lost_at_s: float | None = None
    is_over: bool = False

    @classmethod
    def begin(cls, request: GenerationRequest, rng: random.Random) -> "LiveRequest":
        """The state of a request nobody has begun."""
        sampling = request.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            request = replace(request, sampling=replace(sampling, seed=rng.getrandbits(_SEED_BITS)))
        return cls(request, request.journey or Journey())

    @property
    def has_delivered(self) -> bool:
        """Whether the client has tokens of it."""
        return bool(self.output_token_ids)

    def tokens(self) -> memoryview:
        """Prompt and what was generated, as little-endian u32; a copy."""
        prompt = self.request.prompt_token_ids
        return pack_tokens([*prompt, *self.output_token_ids] if self.output_token_ids else prompt)

    def next_attempt(self, sink: DeltaSink | None = None) -> GenerationRequest:
        """What the next worker is asked to do. Its id is a new one: the last worker may still hold on to the old.

        Args:
            sink: what is offered this attempt's deltas on the spot.
        """
        self.num_attempts += 1
        self.journey.num_attempts = self.num_attempts
        return replace(
            self.request,
            request_id=f"{self.request.request_id}#{self.num_attempts}",
            output_token_ids=list(self.output_token_ids),
            journey=None,
            sink=sink,
        )

    def take(self, deltas: Sequence[OutputDelta]) -> None:
        """Notes what a worker delivered, and corrects it."""
        for delta in deltas:
            self.output_token_ids += delta.token_ids
        last = deltas[-1]
        self.correct(deltas)
        if not self.is_cached_known:
            self.num_cached_tokens = last.num_cached_tokens
        if last.finish_reason is not None:
            self.is_over = True

    def correct(self, deltas: Sequence[OutputDelta]) -> None:
        """Makes deltas say of the cache what the request's first worker said. Changes nothing when done again."""
        if self.is_cached_known:
            for delta in deltas:
                delta.num_cached_tokens = self.num_cached_tokens

    def lose(self, worker_id: str, link: WorkerLink, error: ServeError, now_s: float) -> None:
        """Notes that a worker was lost under it."""
        self.failed[worker_id] = link
        self.num_failures += 1
        self.last_worker = worker_id
        self.last_error = error
        self.is_cached_known = self.has_delivered
        if self.lost_at_s is None:
            self.lost_at_s = now_s
