from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.sequence import Sequence as KVSequence
from dynamo.serve.engine.request import GenerationRequest, SamplingParams
from dynamo.serve.engine.scheduler import ScheduledStep, Scheduler, SchedulerLimits
from dynamo.serve.engine.sequence import Phase, SequenceState
from dynamo.serve.errors import RequestFailedError

BLOCK_SIZE = 4
SPEC = KVSpec(
    model="scheduler-test", num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32, block_size=BLOCK_SIZE
)


def make_sequence(name: str, prompt: list[int]) -> SequenceState:
    request = GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1))
    return SequenceState.from_request(request)


def next_token(tokens: list[int]) -> int:
    return (31 * sum(tokens) + 7 * len(tokens)) % 997


def expected_output(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class CheckingModel:
    """Writes token and place into the cache, and before sampling reads the whole context back through the block table."""

    def __init__(self, cache: KVCache) -> None:
        self._keys, self._values = cache.layer(0)

    def execute(self, step: ScheduledStep) -> list[int]:
        for sequence in step.decodes:
            self._write(sequence, 1)
        for chunk in step.prefills:
            self._write(chunk.sequence, chunk.num_tokens)
        ends = {id(chunk.sequence): chunk.sequence.num_computed + chunk.num_tokens for chunk in step.prefills}
        for sequence in step.sampling:
            assert ends.get(id(sequence), sequence.num_computed + 1) == len(sequence.tokens)
            self._check(sequence)
        return [next_token(sequence.tokens) for sequence in step.sampling]

    def _write(self, sequence: SequenceState, num_tokens: int) -> None:
        assert sequence.kv is not None
        table = sequence.kv.block_table
        for place in range(sequence.num_computed, sequence.num_computed + num_tokens):
            block, offset = int(table[place // BLOCK_SIZE]), place % BLOCK_SIZE
            self._keys[block, offset, 0, 0] = sequence.tokens[place]
            self._values[block, offset, 0, 0] = place

    def _check(self, sequence: SequenceState) -> None:
        assert sequence.kv is not None
        table = torch.from_numpy(sequence.kv.block_table.astype("int64"))
        count = len(sequence.tokens)
        assert self._keys[table][:, :, 0, 0].flatten()[:count].tolist() == sequence.tokens
        assert self._values[table][:, :, 0, 0].flatten()[:count].tolist() == list(range(count))


class Bench:
    """A scheduler over a real cache, driven by hand."""

    def __init__(self, device_blocks: int, **limits: int) -> None:
        self.cache = KVCache(SPEC, device="cpu", device_blocks=device_blocks)
        self.limits = SchedulerLimits(**limits)
        self.scheduler = Scheduler(self.cache, self.limits)
        self.model = CheckingModel(self.cache)
        self.steps: list[ScheduledStep] = []

    def add(self, name: str, prompt: list[int]) -> SequenceState:
        sequence = make_sequence(name, prompt)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> ScheduledStep:
        step = self.scheduler.schedule()
        self.scheduler.check_invariants()
        num_tokens = len(step.decodes) + step.num_prefill_tokens
        assert num_tokens <= self.limits.max_batch_tokens
        assert all(0 < chunk.num_tokens <= self.limits.prefill_chunk for chunk in step.prefills)
        self.scheduler.complete(step, self.model.execute(step))
        self.steps.append(step)
        self.check()
        return step

    def run(self, budgets: dict[SequenceState, int], max_steps: int = 5000) -> None:
        """Steps until every sequence has generated its budget, and finishes it there."""
        left = dict(budgets)
        for _ in range(max_steps):
            for sequence in [s for s, budget in left.items() if s.num_output_tokens >= budget]:
                self.scheduler.finish(sequence)
                del left[sequence]
            if not left:
                return
            assert not self.step().is_empty, "nothing was scheduled although work is left"
        raise AssertionError(f"not done after {max_steps} steps: {list(left)}")

    def check(self) -> None:
        self.scheduler.check_invariants()
        self.cache.check_invariants()

    @property
    def num_pinned(self) -> int:
        return self.cache.stats().tier("device").num_pinned_blocks


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    made: list[Bench] = []
    yield made
    for bench in made:
        bench.cache.close()


def make_bench(benches: list[Bench], device_blocks: int, **limits: int) -> Bench:
    bench = Bench(device_blocks, **limits)
    benches.append(bench)
    return bench


def test_decodes_come_first_and_prompts_share_the_rest_of_the_budget(benches: list[Bench]) -> None:
    bench = make_bench(benches, 64, max_running=4, max_batch_tokens=8, prefill_chunk=6)
    first = bench.add("first", [1, 2, 3])
    bench.step()
    second = bench.add("second", list(range(20)))
    third = bench.add("third", [5])
    step = bench.step()
    assert step.decodes == [first]
    assert [(c.sequence, c.num_tokens, c.is_last) for c in step.prefills] == [(second, 6, False), (third, 1, True)]
    step = bench.step()
    assert step.decodes == [first, third]
    assert [(c.sequence, c.num_tokens) for c in step.prefills] == [(second, 6)]
    assert step.sampling == [first, third]


def test_prompts_are_computed_whole_where_the_limits_allow_it(benches: list[Bench]) -> None:
    bench = make_bench(benches, 64, max_running=4, max_batch_tokens=256, prefill_chunk=256)
    bench.add("long", list(range(200)))
    step = bench.step()
    assert [(chunk.num_tokens, chunk.is_last) for chunk in step.prefills] == [(200, True)]


def test_waiting_sequences_are_admitted_in_order_up_to_max_running(benches: list[Bench]) -> None:
    bench = make_bench(benches, 64, max_running=2, max_batch_tokens=64, prefill_chunk=64)
    sequences = [bench.add(str(i), [i, i, i]) for i in range(4)]
    step = bench.step()
    assert step.sampling == sequences[:2]
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 2)
    bench.scheduler.finish(sequences[0])
    assert sequences[2] in bench.step().sampling


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers(benches: list[Bench]) -> None:
    bench = make_bench(benches, 4, max_running=2, max_batch_tokens=64, prefill_chunk=64)
    with pytest.raises(RequestFailedError, match=r"17 tokens, which need 5 device blocks.* holds 4 blocks"):
        bench.add("big", list(range(17)))
    assert not bench.scheduler.has_work


def test_a_lone_sequence_that_outgrows_the_pool_fails_and_frees_it(benches: list[Bench]) -> None:
    bench = make_bench(benches, 2, max_running=2, max_batch_tokens=64, prefill_chunk=64)
    sequence = bench.add("grows", [1, 2, 3])
    while not (step := bench.step()).failed:
        assert step.sampling == [sequence]
    assert [failed for failed, _ in step.failed] == [sequence]
    assert sequence.num_output_tokens == 2 * BLOCK_SIZE - 3 + 1
    assert bench.num_pinned == 0
    assert not bench.scheduler.has_work


def test_the_youngest_is_preempted_and_goes_on_as_if_nothing_happened(benches: list[Bench]) -> None:
    bench = make_bench(benches, 8, max_running=4, max_batch_tokens=64, prefill_chunk=64)
    old = bench.add("old", [1, 2, 3, 4, 5])
    young = bench.add("young", [6, 7, 8])
    bench.run({old: 24, young: 16})
    assert bench.scheduler.num_preemptions > 0
    assert all(old in step.sampling for step in bench.steps[:24]), "the older one never gave way"
    assert old.output_tokens == expected_output([1, 2, 3, 4, 5], 24)
    assert young.output_tokens == expected_output([6, 7, 8], 16)
    assert young.num_cached_tokens == 0, "what it left in the cache itself is not a hit"
    assert bench.num_pinned == 0


def test_a_preempted_sequence_returns_before_younger_ones(benches: list[Bench]) -> None:
    bench = make_bench(benches, 8, max_running=4, max_batch_tokens=64, prefill_chunk=64)
    old = bench.add("old", [1, 2, 3, 4, 5])
    young = bench.add("young", [6, 7, 8])
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert (old.phase, young.phase) == (Phase.DECODE, Phase.WAITING)
    last = bench.add("last", [9])
    while last.phase is Phase.WAITING:
        assert young.phase is not Phase.FINISHED
        if old.num_output_tokens == 26:
            bench.scheduler.finish(old)
        bench.step()
    assert young.kv is not None, "the older one was admitted first"


def test_admission_leaves_a_block_for_each_running_sequence(benches: list[Bench]) -> None:
    bench = make_bench(benches, 8, max_running=4, max_batch_tokens=64, prefill_chunk=64)
    running = [bench.add("a", [1] * 7), bench.add("b", [2] * 7)]
    bench.step()
    requested = bench.cache.stats().requested_blocks
    held_back = bench.add("c", [3] * 12)  # 3 of the 4 remaining blocks: one would be left for two sequences
    bench.step()
    assert held_back.phase is Phase.WAITING
    assert bench.cache.stats().requested_blocks == requested, "nothing was looked up for it, loaded or evicted"
    bench.scheduler.finish(running[1])
    bench.step()
    assert held_back.phase is Phase.DECODE
    assert bench.scheduler.num_preemptions == 0


@pytest.mark.parametrize("steps_before", range(7))
def test_finishing_at_any_moment_frees_all_blocks(benches: list[Bench], steps_before: int) -> None:
    bench = make_bench(benches, 16, max_running=2, max_batch_tokens=8, prefill_chunk=5)
    sequences = [bench.add(str(i), [i] * 12) for i in range(3)]
    for _ in range(steps_before):
        bench.step()
    for sequence in sequences:
        bench.scheduler.finish(sequence)
        bench.scheduler.finish(sequence)
        bench.check()
    assert bench.num_pinned == 0
    assert not bench.scheduler.has_work


def test_a_shared_prefix_is_computed_once_and_counted(benches: list[Bench]) -> None:
    bench = make_bench(benches, 64, max_running=4, max_batch_tokens=64, prefill_chunk=64)
    prefix = list(range(16))
    first = bench.add("first", [*prefix, 90])
    bench.step()
    second = bench.add("second", [*prefix, 91, 92])
    step = bench.step()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert [chunk.num_tokens for chunk in step.prefills] == [2]


def test_generated_blocks_are_reusable_by_the_next_turn(benches: list[Bench]) -> None:
    bench = make_bench(benches, 64, max_running=4, max_batch_tokens=64, prefill_chunk=64)
    first = bench.add("first", [1, 2, 3])
    bench.run({first: 14})
    turn = bench.add("second", [*first.tokens, 5, 6])
    bench.step()
    assert turn.num_cached_tokens == 16


def test_what_a_failed_sampling_was_computed_from_is_not_shared(benches: list[Bench]) -> None:
    bench = make_bench(benches, 64, max_running=4, max_batch_tokens=64, prefill_chunk=64)
    prompt = [1] * 12
    spoiled = bench.add("spoiled", prompt)
    bench.scheduler.complete(bench.scheduler.schedule(), [None])
    bench.scheduler.finish(spoiled)
    bench.check()
    assert bench.cache.lookup(prompt).device_tokens == 0


class SlowSequence:
    """A cache sequence whose loads end when the test says so."""

    def __init__(self, inner: KVSequence) -> None:
        self.inner = inner
        self.is_ready = False

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


class SlowCache:
    def __init__(self, inner: KVCache) -> None:
        self.inner = inner
        self.opened: list[SlowSequence] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def open(self, tokens: list[int], **options: Any) -> SlowSequence:
        self.opened.append(SlowSequence(self.inner.open(tokens, **options)))
        return self.opened[-1]


def test_a_loading_sequence_holds_nobody_up() -> None:
    with KVCache(SPEC, device="cpu", device_blocks=32) as cache:
        slow = SlowCache(cache)
        scheduler = Scheduler(slow, SchedulerLimits(max_running=4, max_batch_tokens=64, prefill_chunk=64))  # type: ignore[arg-type]
        loading, other = make_sequence("loading", [1] * 9), make_sequence("other", [2] * 9)
        scheduler.add(loading)
        assert scheduler.schedule().is_empty
        assert (loading.phase, loading.num_cached_tokens) == (Phase.LOADING, None)
        scheduler.add(other)
        assert scheduler.schedule().is_empty
        slow.opened[1].is_ready = True
        step = scheduler.schedule()
        assert [chunk.sequence for chunk in step.prefills] == [other]
        scheduler.complete(step, [5])
        slow.opened[0].is_ready = True
        step = scheduler.schedule()
        assert (step.decodes, [chunk.sequence for chunk in step.prefills]) == ([other], [loading])
        scheduler.complete(step, [5, 6])
        scheduler.check_invariants()
        scheduler.finish(loading)
        scheduler.finish(other)


def test_loading_sequences_take_no_place_from_those_that_compute_until_they_need_it() -> None:
    with KVCache(SPEC, device="cpu", device_blocks=64) as cache:
        slow = SlowCache(cache)
        scheduler = Scheduler(slow, SchedulerLimits(max_running=2, max_batch_tokens=64, prefill_chunk=64))  # type: ignore[arg-type]
        loading = [make_sequence(f"loading-{i}", [i] * 9) for i in range(2)]
        others = [make_sequence(f"other-{i}", [10 + i] * 9) for i in range(3)]
        for sequence in loading:
            scheduler.add(sequence)
        assert scheduler.schedule().is_empty
        for sequence in others:
            scheduler.add(sequence)
        assert scheduler.schedule().is_empty  # no more than max_running wait for loads at once
        slow.opened[0].is_ready = True
        step = scheduler.schedule()
        assert [chunk.sequence for chunk in step.prefills] == [loading[0]]
        scheduler.complete(step, [5])
        slow.opened[2].is_ready = True
        step = scheduler.schedule()
        assert (step.decodes, [chunk.sequence for chunk in step.prefills]) == ([loading[0]], [others[0]])
        scheduler.complete(step, [5, 6])
        scheduler.check_invariants()
        slow.opened[1].is_ready = True
        step = scheduler.schedule()
        assert others[0].phase is Phase.WAITING  # it had the place only because of the wait
        assert (step.decodes, [chunk.sequence for chunk in step.prefills]) == ([loading[0]], [loading[1]])
        scheduler.complete(step, [5, 7])
        scheduler.check_invariants()
        assert scheduler.num_preemptions == 1
        for sequence in (*loading, *others):
            scheduler.finish(sequence)
        assert cache.stats().tier("device").num_pinned_blocks == 0


def test_a_younger_sequence_that_has_loaded_waits_for_a_place() -> None:
    with KVCache(SPEC, device="cpu", device_blocks=64) as cache:
        slow = SlowCache(cache)
        scheduler = Scheduler(slow, SchedulerLimits(max_running=1, max_batch_tokens=64, prefill_chunk=64))  # type: ignore[arg-type]
        first, second = make_sequence("first", [1] * 9), make_sequence("second", [2] * 9)
        scheduler.add(first)
        assert scheduler.schedule().is_empty
        slow.opened[0].is_ready = True
        scheduler.complete(scheduler.schedule(), [5])
        scheduler.add(second)
        scheduler.complete(scheduler.schedule(), [5])
        assert second.phase is Phase.WAITING
        scheduler.finish(first)
        scheduler.schedule()
        slow.opened[-1].is_ready = True
        assert [chunk.sequence for chunk in scheduler.schedule().prefills] == [second]
        scheduler.finish(second)


def test_the_end_of_a_load_is_told() -> None:
    with KVCache(SPEC, device="cpu", device_blocks=32) as cache:
        slow = SlowCache(cache)
        scheduler = Scheduler(slow, SchedulerLimits(max_running=4, max_batch_tokens=64))  # type: ignore[arg-type]
        told: list[bool] = []
        scheduler.when_loaded(lambda: told.append(True))
        sequence = make_sequence("loading", [1] * 9)
        scheduler.add(sequence)
        scheduler.schedule()
        assert told == [True]
        scheduler.finish(sequence)


def test_a_loading_sequence_can_be_aborted() -> None:
    with KVCache(SPEC, device="cpu", device_blocks=32) as cache:
        scheduler = Scheduler(SlowCache(cache), SchedulerLimits(max_running=4, max_batch_tokens=64))  # type: ignore[arg-type]
        loading = make_sequence("loading", [1] * 9)
        scheduler.add(loading)
        scheduler.schedule()
        scheduler.finish(loading)
        assert not scheduler.has_work
        assert cache.stats().tier("device").num_pinned_blocks == 0


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"max_running": 0}, "max_running"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"max_running": 8, "max_batch_tokens": 7}, "max_batch_tokens"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SchedulerLimits(**({"max_running": 4, "max_batch_tokens": 64} | limits))


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps and aborts in any order over a pool that is far too small; outputs must be those of a lone run."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(9, max_running=4, max_batch_tokens=10, prefill_chunk=6)
        self.live: dict[SequenceState, tuple[list[int], int]] = {}
        self.num_added = 0

    @rule(
        prefix=st.sampled_from([[], [1] * 4, [1] * 8, [1] * 4 + [2] * 4]),
        rest=st.lists(st.integers(0, 3), min_size=1, max_size=9),
        budget=st.integers(1, 18),
    )
    def add(self, prefix: list[int], rest: list[int], budget: int) -> None:
        self.num_added += 1
        prompt = [*prefix, *rest]
        self.live[self.bench.add(str(self.num_added), prompt)] = (prompt, budget)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.live)))
        self.bench.scheduler.finish(sequence)
        del self.live[sequence]

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.finish_done()
            if self.live:
                step = self.bench.step()
                assert not step.is_empty
                assert not step.failed

    def finish_done(self) -> None:
        for sequence, (prompt, budget) in list(self.live.items()):
            output = sequence.output_tokens
            assert output == expected_output(prompt, len(output))
            if len(output) >= budget:
                self.bench.scheduler.finish(sequence)
                del self.live[sequence]

    @invariant()
    def books_balance(self) -> None:
        self.bench.check()

    def teardown(self) -> None:
        steps = 0
        while self.live:
            self.step(1)
            steps += 1
            assert steps < 5000, "sequences never finish"
        assert not self.bench.scheduler.has_work
        assert self.bench.num_pinned == 0
        self.bench.cache.close()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_what_came_from_the_cache_is_known_of_a_sequence_that_gave_way_before_it_computed() -> None:
    with KVCache(SPEC, device="cpu", device_blocks=64) as cache:
        prompt = [1] * 17
        with cache.open(prompt) as kept:
            kept.commit()
        slow = SlowCache(cache)
        scheduler = Scheduler(slow, SchedulerLimits(max_running=1, max_batch_tokens=64, prefill_chunk=64))  # type: ignore[arg-type]
        sequence = make_sequence("loading", prompt)
        scheduler.add(sequence)
        assert scheduler.schedule().is_empty
        scheduler._preempt(sequence)  # as where an older one finds no block
        assert scheduler.schedule().is_empty
        slow.opened[1].is_ready = True
        scheduler.complete(scheduler.schedule(), [5])
        assert sequence.num_cached_tokens == 16
        scheduler._preempt(sequence)
        scheduler.schedule()
        slow.opened[2].is_ready = True
        scheduler.complete(scheduler.schedule(), [6])
        assert sequence.num_cached_tokens == 16  # what it had computed itself is no hit
        scheduler.finish(sequence)
