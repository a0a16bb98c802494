"""Continuous batching: which tokens of which sequences the next step computes.

Synchronous, without threads, clocks or tensors: the engine calls `schedule`, has the step executed, and hands the
sampled tokens to `complete`. It uses nothing of the cache but its public face. Scheduling by iteration is Orca's idea
(https://www.usenix.org/conference/osdi22/presentation/yu), mixing decodes with pieces of prompts is Sarathi-Serve's
(https://arxiv.org/abs/2403.02310).
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from dynamo.kvcache.errors import OutOfBlocksError
from dynamo.serve.engine.sequence import CacheSequence, DeviceCache, Phase, SequenceState
from dynamo.serve.errors import RequestFailedError

__all__ = ["PrefillChunk", "ScheduledStep", "Scheduler", "SchedulerLimits"]

_by_arrival = attrgetter("arrival")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of one step.

    Attributes:
        max_running: sequences that compute at once. As many more may hold device blocks while they wait for loads.
        max_batch_tokens: tokens computed in one step, decodes and prompt pieces together; at least `max_running`.
        prefill_chunk: prompt tokens of one sequence in one step. Where it and `max_batch_tokens` are as large as a
            prompt, the prompt is computed whole.
    """

    max_running: int
    max_batch_tokens: int
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ValueError(f"max_running must be at least 1, not {self.max_running}")
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, not {self.prefill_chunk}")
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens must be at least max_running ({self.max_running}), not {self.max_batch_tokens}: "
                "every running sequence computes a token per step"
            )


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """`num_tokens` tokens of a sequence from its `num_computed` on; `is_last`: up to its end, and one is sampled."""

    sequence: SequenceState
    num_tokens: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One step's work. In a batch the decodes come first, then the chunks, each in the order given here.

    Attributes:
        decodes: sequences that compute their last token and sample the next.
        prefills: pieces of prompts, or of preempted sequences.
        sampling: sequences for which a token is sampled, in batch order.
        failed: sequences that were given up while scheduling; they hold nothing any more.
    """

    decodes: list[SequenceState]
    prefills: list[PrefillChunk]
    sampling: list[SequenceState]
    failed: list[tuple[SequenceState, RequestFailedError]]

    @property
    def is_empty(self) -> bool:
        """Nothing to execute."""
        return not self.decodes and not self.prefills

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.prefills)


class Scheduler:
    """Owns the queue, the running sequences and their cache sequences. Used by one thread.

    Order is by arrival throughout: a sequence never overtakes an older one into the pool, and the youngest is preempted
    first. The oldest can therefore take every block of the pool, so it always goes on, and so do all after it.

    A sequence that waits for blocks to be loaded takes no place in the batch. If it finds none when they have come, or are
    not worth waiting for, the youngest one that computes gives way: it was let in only because of the wait.
    """

    def __init__(self, cache: DeviceCache, limits: SchedulerLimits) -> None:
        self._cache = cache
        self._limits = limits
        self._block_size = cache.block_size
        self._waiting: deque[SequenceState] = deque()
        self._filling: list[SequenceState] = []  # LOADING and PREFILL, by arrival
        self._decoding: list[SequenceState] = []  # DECODE, by arrival
        self._next_arrival = 0
        self._num_preemptions = 0
        # Admission is not tried again before a sequence let go of blocks or this many are available.
        self._admission_needs = 0
        self._on_loaded: Callable[[], None] | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold device blocks."""
        return len(self._filling) + len(self._decoding)

    @property
    def num_preemptions(self) -> int:
        return self._num_preemptions

    @property
    def num_prefill_tokens_waiting(self) -> int:
        """Tokens still to be computed before all sequences decode, of which the cache may hold some. From any thread."""
        # Copied in one step of the interpreter each: the scheduler goes on meanwhile.
        sequences = (*tuple(self._waiting), *tuple(self._filling))
        return sum(max(0, len(sequence.tokens) - sequence.num_computed) for sequence in sequences)

    @property
    def has_work(self) -> bool:
        return bool(self._decoding or self._filling or self._waiting)

    @property
    def patience_left_s(self) -> float | None:
        """Seconds until a sequence has waited for its loads for as long as is worth it; None if none waits."""
        waiting = [_kv(sequence).patience_left_s for sequence in self._filling if sequence.phase is Phase.LOADING]
        return min(waiting, default=None)

    def when_loaded(self, callback: Callable[[], None]) -> None:
        """Has `callback` called, on some thread, whenever a load that a sequence waits for has ended."""
        self._on_loaded = callback

    def add(self, sequence: SequenceState) -> None:
        """Queues a new sequence.

        Raises:
            RequestFailedError: its prompt is larger than the whole device pool.
        """
        if self._blocks_for(len(sequence.tokens)) > self._cache.num_device_blocks:
            raise self._never_fits(sequence)
        sequence.arrival = self._next_arrival
        self._next_arrival += 1
        self._waiting.append(sequence)

    def finish(self, sequence: SequenceState) -> None:
        """Ends a sequence wherever it stands, between steps; its blocks are released. Idempotent."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
            self._admission_needs = 0
        elif sequence.phase is not Phase.FINISHED:
            self._release(sequence)
        sequence.phase = Phase.FINISHED

    def schedule(self) -> ScheduledStep:
        """Decides the next step and reserves the blocks it writes. May preempt.

        Does not wait for loads. Reserving may wait up to 50 ms for blocks that only their own offload still holds.
        """
        step = ScheduledStep([], [], [], [])
        self._end_loads()
        self._schedule_decodes(step)
        budget = self._limits.max_batch_tokens - len(step.decodes)
        for sequence in self._filling:
            if budget and sequence.phase is Phase.PREFILL:
                budget -= self._schedule_chunk(step, sequence, budget)
        while budget and self._waiting and self._has_place:
            admitted = self._admit()
            if admitted is None:
                break
            if _kv(admitted).is_ready:
                admitted.phase = Phase.PREFILL
                budget -= self._schedule_chunk(step, admitted, budget)
            elif self._on_loaded is not None:
                _kv(admitted).when_ready(self._on_loaded)
        return step

    def complete(self, step: ScheduledStep, token_ids: Sequence[int | None]) -> None:
        """Records that the step's KV is written, and the tokens sampled from it.

        Committing may wait up to a second where offloading is congested, once per congestion.

        Args:
            token_ids: one per sequence of `step.sampling`; None where sampling failed. What the step wrote for such a
                sequence is not trusted and not shared, and it must be finished before the next `schedule`.
        """
        spoiled: set[int] = set()
        if None in token_ids:
            spoiled = {id(s) for s, token_id in zip(step.sampling, token_ids, strict=True) if token_id is None}
        for sequence in step.decodes:
            computed = sequence.num_computed + 1
            sequence.num_computed = computed
            if computed == sequence.capacity and id(sequence) not in spoiled:
                self._commit_full_block(sequence)
        for chunk in step.prefills:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            if id(sequence) not in spoiled:
                _kv(sequence).commit(sequence.num_computed)
            if chunk.is_last:
                sequence.phase = Phase.DECODE
                self._filling.remove(sequence)
                insort(self._decoding, sequence, key=_by_arrival)
        for sequence, token_id in zip(step.sampling, token_ids, strict=True):
            if token_id is not None:
                sequence.tokens.append(token_id)

    def check_invariants(self) -> None:
        """Raises AssertionError when the scheduler contradicts itself."""
        running = self._filling + self._decoding
        arrivals = [sequence.arrival for sequence in self._waiting]
        assert arrivals == sorted(arrivals), f"sequences out of order of arrival: {arrivals}"
        arrivals += [sequence.arrival for sequence in running]
        assert len(arrivals) == len(set(arrivals)), f"sequences that arrived together: {sorted(arrivals)}"
        assert self._decoding == sorted(self._decoding, key=_by_arrival), "decoding sequences out of order"
        assert self._filling == sorted(self._filling, key=_by_arrival), "filling sequences out of order"
        assert self._num_computing <= self._limits.max_running, f"{self._num_computing} sequences compute"
        num_loading = len(running) - self._num_computing
        assert num_loading <= self._limits.max_running, f"{num_loading} sequences wait for loads"
        for sequence in self._waiting:
            assert sequence.phase is Phase.WAITING, sequence
            assert sequence.kv is None, sequence
        for sequence in running:
            assert sequence.phase in (Phase.LOADING, Phase.PREFILL, Phase.DECODE), sequence
            assert (sequence.phase is Phase.DECODE) == (sequence in self._decoding), sequence
            table = _kv(sequence).block_table
            assert len(set(table.tolist())) == len(table), f"{sequence.request_id} holds a block twice"
            assert sequence.capacity == len(table) * self._block_size, sequence
            assert 0 <= sequence.num_computed <= sequence.capacity, sequence
            assert sequence.num_computed < len(sequence.tokens), sequence
            assert sequence.reserved <= min(sequence.capacity, len(sequence.tokens)), sequence

    def _schedule_decodes(self, step: ScheduledStep) -> None:
        decoding = self._decoding
        decodes = step.decodes
        position = 0
        while position < len(decoding):  # preemption shortens the list, but only behind `position`
            sequence = decoding[position]
            if len(sequence.tokens) > sequence.capacity and not self._grow(sequence, step):
                continue
            decodes.append(sequence)
            position += 1
        step.sampling.extend(decodes)

    def _grow(self, sequence: SequenceState, step: ScheduledStep) -> bool:
        """Reserves the block its last token falls into, preempting from the youngest; False if it gave way itself."""
        if self._blocks_for(len(sequence.tokens)) > self._cache.num_device_blocks:
            self._release(sequence)
            sequence.phase = Phase.FINISHED
            step.failed.append((sequence, self._never_fits(sequence)))
            return False
        while True:
            try:
                _kv(sequence).append(sequence.tokens[sequence.reserved :])
            except OutOfBlocksError:
                victim = self._youngest()
                self._preempt(victim)
                if victim is sequence:
                    return False
            else:
                sequence.reserved = len(sequence.tokens)
                sequence.capacity += self._block_size
                return True

    def _youngest(self) -> SequenceState:
        return max((queue[-1] for queue in (self._filling, self._decoding) if queue), key=_by_arrival)

    def _preempt(self, sequence: SequenceState) -> None:
        self._release(sequence)
        sequence.phase = Phase.WAITING
        self._num_preemptions += 1
        insort(self._waiting, sequence, key=_by_arrival)
        # It has just been found that there is no room; the sequence it gave way to takes its blocks first.
        self._admission_needs = self._blocks_for(len(sequence.tokens)) + self.num_running

    def _release(self, sequence: SequenceState) -> None:
        (self._decoding if sequence.phase is Phase.DECODE else self._filling).remove(sequence)
        kv = _kv(sequence)
        sequence.kv = None
        sequence.num_computed = sequence.reserved = sequence.capacity = 0
        self._admission_needs = 0
        kv.close()

    def _admit(self) -> SequenceState | None:
        """Opens the oldest waiting sequence in the cache, if there is room for it and for those running to grow."""
        num_running = self.num_running
        available = self._cache.num_available_blocks
        if num_running and available < self._admission_needs:
            return None
        sequence = self._waiting[0]
        try:
            # Each running sequence will want a block before long. Taking the last ones would only lead to preemption.
            kv = self._cache.open(sequence.tokens, salt=sequence.salt, spare_blocks=num_running, overlap=True)
        except OutOfBlocksError as error:
            self._admission_needs = available + error.needed_blocks - error.available_blocks
            return None
        self._waiting.popleft()
        sequence.kv = kv
        sequence.reserved = len(sequence.tokens)
        sequence.capacity = self._blocks_for(len(sequence.tokens)) * self._block_size
        sequence.num_admissions += 1
        sequence.phase = Phase.LOADING
        self._filling.append(sequence)
        return sequence

    @property
    def _num_computing(self) -> int:
        return len(self._decoding) + sum(sequence.phase is Phase.PREFILL for sequence in self._filling)

    @property
    def _has_place(self) -> bool:
        """Whether one more may be admitted: it may be about to compute, or to wait for a load."""
        num_computing, most = self._num_computing, self._limits.max_running
        return num_computing < most and self.num_running - num_computing < most

    def _end_loads(self) -> None:
        """Gives sequences whose cached blocks are in place, or will not come, a place in the batch."""
        for sequence in [s for s in self._filling if s.phase is Phase.LOADING and _kv(s).is_ready]:
            if self._num_computing == self._limits.max_running:
                computing = [*(s for s in self._filling if s.phase is Phase.PREFILL), *self._decoding]
                youngest = max(computing, key=_by_arrival)
                if youngest.arrival < sequence.arrival:
                    return
                self._preempt(youngest)
            sequence.phase = Phase.PREFILL

    def _schedule_chunk(self, step: ScheduledStep, sequence: SequenceState, budget: int) -> int:
        kv = _kv(sequence)
        sequence.num_computed, end = kv.next_span(sequence.num_computed, min(self._limits.prefill_chunk, budget))
        sequence.computing_admission = sequence.computing_admission or sequence.num_admissions
        if sequence.num_admissions == sequence.computing_admission:
            sequence.num_cached_tokens = min(kv.num_cached_tokens, sequence.num_prompt_tokens)
        num_tokens, is_last = end - sequence.num_computed, end == len(sequence.tokens)
        step.prefills.append(PrefillChunk(sequence, num_tokens, is_last))
        if is_last:
            step.sampling.append(sequence)
        return num_tokens

    def _commit_full_block(self, sequence: SequenceState) -> None:
        kv = _kv(sequence)
        if sequence.reserved < sequence.num_computed:
            kv.append(sequence.tokens[sequence.reserved : sequence.num_computed])  # within its last block: cannot fail
            sequence.reserved = sequence.num_computed
        kv.commit(sequence.num_computed)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _never_fits(self, sequence: SequenceState) -> RequestFailedError:
        pool = self._cache.num_device_blocks
        return RequestFailedError(
            f"request {sequence.request_id} has reached {len(sequence.tokens)} tokens, which need "
            f"{self._blocks_for(len(sequence.tokens))} device blocks, and the device cache holds {pool} blocks of "
            f"{self._block_size} tokens; give it more device memory, or send a shorter prompt"
        )


def _kv(sequence: SequenceState) -> CacheSequence:
    assert sequence.kv is not None, f"{sequence.request_id} is {sequence.phase.value} and holds no blocks"
    return sequence.kv
