import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

import dynamo.serve.demo
from dynamo.kvcache import KVCache
from dynamo.serve.engine.delivery import MAX_QUEUED_DELTAS, OutputStream
from dynamo.serve.engine.engine import InferenceEngine
from dynamo.serve.engine.mocker import mock_kv_spec
from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams, TokenLogprob
from dynamo.serve.engine.sampler import SampledToken
from dynamo.serve.engine.scheduler import ScheduledStep, SchedulerLimits
from dynamo.serve.engine.sequence import SequenceState
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import EngineDeadError, EngineOverloadedError, RequestFailedError

BLOCK_SIZE = 4
WAIT_S = 20.0
T = TypeVar("T")
Eventually = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(dynamo.serve.demo.__file__).parent / "model")


class ScriptedRunner:
    """Says the words of a script by output position; a test may hold it, or make steps fail."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.permits = threading.Semaphore(0)
        self.is_held = False
        self.num_failing_steps = 0
        self.poisoned: set[str] = set()
        self.num_executed = 0

    def execute(self, step: ScheduledStep) -> list[SampledToken | RequestFailedError]:
        if self.is_held:
            self.permits.acquire(timeout=WAIT_S)
        if self.num_failing_steps:
            self.num_failing_steps -= 1
            raise ArithmeticError("scripted failure")
        self.num_executed += 1
        return [self._outcome(sequence) for sequence in step.sampling]

    def hold(self) -> None:
        self.is_held = True

    def let_go(self) -> None:
        self.is_held = False
        self.permits.release(1000)

    def _outcome(self, sequence: SequenceState) -> SampledToken | RequestFailedError:
        if sequence.request_id in self.poisoned:
            return RequestFailedError(f"{sequence.request_id} has NaN logits")
        token_id = self.token_ids[sequence.num_output_tokens % len(self.token_ids)]
        wants_logprobs = sequence.params.num_logprobs is not None
        return SampledToken(token_id, TokenLogprob(token_id, -0.5) if wants_logprobs else None)


class Stage:
    """A running engine, and all that a test may want to look at."""

    def __init__(self, runner: ScriptedRunner, cache: KVCache, engine: InferenceEngine, eventually: Eventually) -> None:
        self.runner = runner
        self.cache = cache
        self.engine = engine
        self._eventually = eventually
        self._num_requests = 0

    def request(
        self, prompt: list[int] | None = None, *, request_id: str | None = None, max_tokens: int = 8, **sampling: object
    ) -> GenerationRequest:
        self._num_requests += 1
        return GenerationRequest(
            request_id=request_id or f"request-{self._num_requests}",
            prompt_token_ids=prompt or [5, 6, 7],
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        )

    async def collect(self, request: GenerationRequest) -> OutputDelta:
        """All deltas of a request as one."""
        whole = OutputDelta()
        async for deltas in self.engine.generate(request):
            for delta in deltas:
                assert whole.finish_reason is None, "a delta after the last one"
                whole.text += delta.text
                whole.token_ids += delta.token_ids
                if delta.logprobs is not None:
                    whole.logprobs = (whole.logprobs or []) + delta.logprobs
                whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason
                whole.num_cached_tokens = delta.num_cached_tokens
        assert whole.finish_reason is not None
        return whole

    async def until(self, condition: Callable[[], bool]) -> None:
        await asyncio.to_thread(self._eventually, condition)

    def holds_nothing(self) -> bool:
        stats = self.cache.stats()
        return stats.num_open_sequences == 0 and stats.tier("device").num_pinned_blocks == 0


def make_engine(cache: KVCache, runner: ScriptedRunner, tokenizer: Tokenizer) -> InferenceEngine:
    return InferenceEngine(
        cache,
        runner,
        tokenizer,
        eos_token_ids=frozenset(),
        max_model_len=10**9,
        limits=SchedulerLimits(max_running=4, max_batch_tokens=64),
        max_waiting=4,
    )


@asynccontextmanager
async def play(
    tokenizer: Tokenizer,
    eventually: Eventually,
    script: str | list[int] = " the value of the key",
    *,
    device_blocks: int = 64,
    max_model_len: int = 10_000,
    max_waiting: int = 100,
    stall_timeout_s: float = 30.0,
    max_running: int = 64,
    max_batch_tokens: int = 2048,
    prefill_chunk: int = 512,
) -> AsyncIterator[Stage]:
    token_ids = tokenizer.encode(script, add_special_tokens=False) if isinstance(script, str) else script
    cache = KVCache(mock_kv_spec("engine-test", BLOCK_SIZE), device="cpu", device_blocks=device_blocks)
    runner = ScriptedRunner(token_ids)
    engine = InferenceEngine(
        cache,
        runner,
        tokenizer,
        eos_token_ids=tokenizer.eos_token_ids,
        max_model_len=max_model_len,
        limits=SchedulerLimits(max_running=max_running, max_batch_tokens=max_batch_tokens, prefill_chunk=prefill_chunk),
        max_waiting=max_waiting,
        stall_timeout_s=stall_timeout_s,
    )
    await engine.start()
    stage = Stage(runner, cache, engine, eventually)
    try:
        yield stage
        if engine_is_alive(engine):
            await stage.until(stage.holds_nothing)
        cache.check_invariants()
    finally:
        runner.let_go()
        await engine.stop()


Playing = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def playing(tokenizer: Tokenizer, eventually: Eventually) -> Playing:
    """Runs an engine over a scripted runner: `async with playing("what it says", device_blocks=8) as stage`."""
    return partial(play, tokenizer, eventually)


def engine_is_alive(engine: InferenceEngine) -> bool:
    try:
        engine.check_healthy()
    except EngineDeadError:
        return False
    return True


def run(test: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(test, 60.0)

    return asyncio.run(bounded())


def test_a_request_ends_at_max_tokens_with_its_text(playing: Playing, tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with playing() as stage:
            whole = await stage.collect(stage.request(max_tokens=7))
            expected = (stage.runner.token_ids * 7)[:7]
            assert (whole.token_ids, whole.finish_reason, whole.stop_reason) == (expected, "length", None)
            assert whole.text == tokenizer.decode(expected)
            assert whole.logprobs is None

    run(test())


def test_max_model_len_ends_a_request_too(playing: Playing) -> None:
    async def test() -> None:
        async with playing(max_model_len=10) as stage:
            whole = await stage.collect(stage.request([1, 2, 3], max_tokens=100))
            assert (len(whole.token_ids), whole.finish_reason) == (7, "length")

    run(test())


def test_max_model_len_is_bounded_by_the_device_pool(playing: Playing) -> None:
    async def test() -> None:
        async with playing(device_blocks=3) as stage:
            assert stage.engine.max_model_len == 3 * BLOCK_SIZE
            whole = await stage.collect(stage.request([1, 2, 3], max_tokens=100))
            assert len(whole.token_ids) == 3 * BLOCK_SIZE - 3

    run(test())


@pytest.mark.parametrize("prompt", [[], list(range(10))])
def test_a_prompt_that_leaves_no_room_is_refused(playing: Playing, prompt: list[int]) -> None:
    async def test() -> None:
        async with playing(max_model_len=10) as stage:
            request = GenerationRequest(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1))
            with pytest.raises(RequestFailedError, match=f"has {len(prompt)} tokens; this engine takes 1 to 9"):
                await stage.collect(request)

    run(test())


@pytest.mark.parametrize("token_id", [-1, 1 << 20])
def test_a_token_the_model_does_not_have_is_refused(playing: Playing, token_id: int) -> None:
    async def test() -> None:
        async with playing() as stage:
            with pytest.raises(RequestFailedError, match=f"token id {token_id}; the model has ids 0 to"):
                await stage.collect(stage.request([1, token_id, 2]))

    run(test())


def test_end_of_sequence_ends_a_request_without_text(playing: Playing, tokenizer: Tokenizer) -> None:
    eos = min(tokenizer.eos_token_ids)
    words = tokenizer.encode(" the value", add_special_tokens=False)

    async def test() -> None:
        async with playing([*words, eos, *words]) as stage:
            whole = await stage.collect(stage.request(max_tokens=50))
            assert (whole.token_ids, whole.text) == ([*words, eos], " the value")
            assert (whole.finish_reason, whole.stop_reason) == ("stop", None)
            ignoring = await stage.collect(stage.request(max_tokens=50, ignore_eos=True))
            assert (len(ignoring.token_ids), ignoring.finish_reason) == (50, "length")
            patient = await stage.collect(stage.request(max_tokens=50, min_tokens=len(words) + 2))
            assert len(patient.token_ids) == 2 * (len(words) + 1) + len(words)

    run(test())


def test_a_stop_token_id_ends_a_request_and_is_named(playing: Playing, tokenizer: Tokenizer) -> None:
    words = tokenizer.encode(" the value of the key", add_special_tokens=False)
    stop_id = words[2]

    async def test() -> None:
        async with playing(words) as stage:
            request = stage.request(max_tokens=50, stop_token_ids=frozenset({stop_id}), ignore_eos=True)
            whole = await stage.collect(request)
            assert whole.token_ids == words[: words.index(stop_id) + 1]
            assert (whole.finish_reason, whole.stop_reason) == ("stop", stop_id)
            assert whole.text == tokenizer.decode(words[: words.index(stop_id)])

    run(test())


def test_a_stop_string_across_tokens_ends_exactly_there(playing: Playing, tokenizer: Tokenizer) -> None:
    words = tokenizer.encode(" the value of the key", add_special_tokens=False)

    async def test() -> None:
        async with playing(words) as stage:
            whole = await stage.collect(stage.request(max_tokens=50, stop=("nowhere", "ue of t")))
            assert whole.text == " the val"
            assert (whole.finish_reason, whole.stop_reason) == ("stop", "ue of t")
            without_last = tokenizer.decode(whole.token_ids[:-1])
            assert "ue of t" in tokenizer.decode(whole.token_ids)
            assert "ue of t" not in without_last, "no token after the one that completed the stop"
            assert stage.engine.stats().generated_tokens == len(whole.token_ids)

    run(test())


def test_every_token_has_its_logprob_when_asked(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            whole = await stage.collect(stage.request(max_tokens=9, num_logprobs=0))
            assert whole.logprobs is not None
            assert [entry.token_id for entry in whole.logprobs] == whole.token_ids

    run(test())


def test_cached_tokens_are_reported_and_counted(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            prompt = list(range(4 * BLOCK_SIZE))
            first = await stage.collect(stage.request(prompt))
            second = await stage.collect(stage.request(prompt))
            assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 3 * BLOCK_SIZE)
            stats = stage.engine.stats()
            assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (8 * BLOCK_SIZE, 3 * BLOCK_SIZE)
            assert (stats.generated_tokens, stats.num_running, stats.num_waiting) == (16, 0, 0)

    run(test())


def test_deltas_queue_while_the_consumer_is_busy(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            slow = stage.engine.generate(stage.request(max_tokens=40, num_logprobs=0))
            first = await anext(slow)
            whole = await stage.collect(stage.request(max_tokens=40))  # not held up by the slow one
            await stage.until(stage.holds_nothing)
            await stage.collect(stage.request(max_tokens=1))  # handed over after all of the slow one's deltas
            (rest,) = [deltas async for deltas in slow]
            assert len(first + rest) == 40
            assert [token_id for delta in first + rest for token_id in delta.token_ids] == whole.token_ids
            assert "".join(delta.text for delta in first + rest) == whole.text
            assert [delta.finish_reason for delta in rest] == [None] * (len(rest) - 1) + ["length"]

    run(test())


def test_what_queues_for_a_consumer_that_never_reads_is_bounded() -> None:
    async def test() -> None:
        stream = OutputStream()
        for token_id in range(MAX_QUEUED_DELTAS + 40):
            stream.feed(OutputDelta("x", [token_id], [TokenLogprob(token_id, -1.0)]))
        stream.feed(OutputDelta(finish_reason="length"))
        deltas = await stream.next()
        assert len(deltas) == MAX_QUEUED_DELTAS
        assert [token_id for delta in deltas for token_id in delta.token_ids] == list(range(MAX_QUEUED_DELTAS + 40))
        assert len(deltas[-1].text) == len(deltas[-1].logprobs or []) == 41
        assert deltas[-1].finish_reason == "length"

    run(test())


def test_closing_the_generator_frees_the_blocks_after_the_current_step(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            generator = stage.engine.generate(stage.request(max_tokens=1000))
            await anext(generator)
            stage.runner.hold()
            await generator.aclose()
            executed = stage.runner.num_executed
            stage.runner.permits.release(2)  # the step under way, and one that may have been decided before
            await stage.until(stage.holds_nothing)
            assert stage.runner.num_executed <= executed + 2

    run(test())


def test_cancelling_the_consumer_aborts_waiting_requests_too(playing: Playing) -> None:
    async def test() -> None:
        async with playing(max_running=1, max_batch_tokens=64, prefill_chunk=64) as stage:
            stage.runner.hold()
            tasks = [asyncio.create_task(stage.collect(stage.request(max_tokens=1000))) for _ in range(3)]
            await stage.until(lambda: stage.engine.stats().num_running == 1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stage.runner.let_go()
            await stage.until(stage.holds_nothing)
            assert stage.engine.stats().num_waiting == 0

    run(test())


def test_one_request_too_many_is_refused(playing: Playing) -> None:
    async def test() -> None:
        async with playing(max_running=2, max_waiting=1, max_batch_tokens=64, prefill_chunk=64) as stage:
            stage.runner.hold()
            tasks = [asyncio.create_task(stage.collect(stage.request())) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(EngineOverloadedError, match="3 requests are running or waiting"):
                await stage.collect(stage.request())
            stage.runner.let_go()
            assert len(await asyncio.gather(*tasks)) == 3
            await stage.collect(stage.request())

    run(test())


def test_an_id_is_unique_among_live_requests(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            generator = stage.engine.generate(stage.request(request_id="same", max_tokens=500))
            await anext(generator)
            with pytest.raises(ValueError, match="'same'"):
                await stage.collect(stage.request(request_id="same"))
            await generator.aclose()
            await stage.collect(stage.request(request_id="same"))

    run(test())


def test_a_request_whose_sampling_fails_fails_alone(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            stage.runner.poisoned.add("bad")
            bad = asyncio.create_task(stage.collect(stage.request(request_id="bad")))
            good = asyncio.create_task(stage.collect(stage.request(max_tokens=30)))
            with pytest.raises(RequestFailedError, match="bad has NaN logits"):
                await bad
            assert len((await good).token_ids) == 30

    run(test())


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(
    playing: Playing, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with playing() as stage:
            for _ in range(2):
                stage.runner.num_failing_steps = 1
                with pytest.raises(RequestFailedError, match="scripted failure"):
                    await stage.collect(stage.request())
                await stage.collect(stage.request())
            assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]

    run(test())


def test_three_failed_steps_in_a_row_end_the_engine(playing: Playing) -> None:
    async def test() -> None:
        async with playing(max_running=1, max_batch_tokens=64, prefill_chunk=64) as stage:
            stage.runner.hold()
            tasks = [asyncio.create_task(stage.collect(stage.request())) for _ in range(5)]
            await stage.until(lambda: stage.engine.stats().num_running == 1)
            stage.runner.num_failing_steps = 3
            stage.runner.let_go()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds == [RequestFailedError] * 3 + [EngineDeadError] * 2
            assert "3 steps in a row failed" in str(outcomes[4])
            with pytest.raises(EngineDeadError, match="3 steps in a row failed"):
                stage.engine.check_healthy()
            with pytest.raises(EngineDeadError):
                await stage.collect(stage.request())
            assert stage.holds_nothing()

    run(test())


def test_a_bug_outside_a_step_ends_the_engine_and_tells_everybody(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            generator = stage.engine.generate(stage.request(max_tokens=1000))
            await anext(generator)
            stage.cache.close()  # pulled away from under the engine
            with pytest.raises(EngineDeadError, match="CacheClosedError"):
                await asyncio.wait_for(stage.collect(stage.request()), WAIT_S)
            with pytest.raises(EngineDeadError):
                async for _ in generator:
                    pass

    run(test())


def test_a_request_that_finds_no_blocks_fails_in_bounded_time_and_others_go_on(playing: Playing) -> None:
    async def test() -> None:
        async with playing(device_blocks=8, stall_timeout_s=0.05) as stage:
            with stage.cache.open(list(range(100, 100 + 7 * BLOCK_SIZE))):  # somebody else's
                with pytest.raises(RequestFailedError, match=r"no device blocks for 0\.05 s"):
                    await stage.collect(stage.request(list(range(2 * BLOCK_SIZE))))
                with pytest.raises(RequestFailedError, match="no device blocks"):
                    await stage.collect(stage.request([1], max_tokens=20))  # outgrows what is left
                await stage.collect(stage.request([1], max_tokens=BLOCK_SIZE))
            await stage.collect(stage.request(list(range(2 * BLOCK_SIZE))))

    run(test())


def test_stopping_fails_what_runs_or_waits_and_refuses_what_comes(playing: Playing) -> None:
    async def test() -> None:
        async with playing(max_running=1, max_batch_tokens=64, prefill_chunk=64) as stage:
            stage.runner.hold()
            tasks = [asyncio.create_task(stage.collect(stage.request(max_tokens=20))) for _ in range(3)]
            await stage.until(lambda: stage.engine.stats().num_running == 1)
            stopping = asyncio.create_task(stage.engine.stop())
            await asyncio.sleep(0)
            with pytest.raises(EngineDeadError, match="stopping"):
                await stage.collect(stage.request())
            stage.runner.let_go()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert [str(end) for end in ends] == ["the engine has stopped"] * 3
            await stopping
            with pytest.raises(EngineDeadError):
                stage.engine.check_healthy()

    run(test())


def test_an_engine_that_was_never_started_can_be_stopped(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        cache = KVCache(mock_kv_spec("engine-test", BLOCK_SIZE), device="cpu", device_blocks=4)
        engine = make_engine(cache, ScriptedRunner([1]), tokenizer)
        with pytest.raises(EngineDeadError, match=r"was start\(\) awaited"):
            engine.check_healthy()
        await engine.stop()
        await engine.stop()

    run(test())


def test_an_engine_whose_event_loop_was_closed_ends_and_holds_nothing(
    tokenizer: Tokenizer, eventually: Eventually
) -> None:
    cache = KVCache(mock_kv_spec("engine-test", BLOCK_SIZE), device="cpu", device_blocks=64)
    runner = ScriptedRunner([1])
    runner.hold()
    engine = make_engine(cache, runner, tokenizer)
    stage = Stage(runner, cache, engine, eventually)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.start())
    task = loop.create_task(stage.collect(stage.request(max_tokens=10**6)))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()  # silences the warning about a pending task; the loop never runs it
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    runner.let_go()
    eventually(lambda: not engine_is_alive(engine))
    with pytest.raises(EngineDeadError, match="event loop"):
        engine.check_healthy()
    eventually(stage.holds_nothing)
    run(engine.stop())


def test_a_request_from_another_event_loop_is_refused(playing: Playing) -> None:
    async def test() -> None:
        async with playing() as stage:
            with pytest.raises(RuntimeError, match="event loop"):
                await asyncio.to_thread(asyncio.run, stage.collect(stage.request()))

    run(test())


@pytest.mark.parametrize("device_blocks", [12, 400])
def test_many_requests_with_random_disconnects_leave_nothing_behind(playing: Playing, device_blocks: int) -> None:
    async def test() -> None:
        limits = {"max_running": 8, "max_batch_tokens": 32, "prefill_chunk": 12}
        async with playing(device_blocks=device_blocks, max_waiting=1000, **limits) as stage:

            async def client(number: int) -> None:
                prompt = [1] * (4 * (number % 3)) + [number % 5 + 2] * (number % 7 + 1)
                request = stage.request(prompt, max_tokens=number % 23 + 1)
                seen: list[int] = []
                generator = stage.engine.generate(request)
                async for deltas in generator:
                    seen += [token_id for delta in deltas for token_id in delta.token_ids]
                    if number % 4 == 0 and len(seen) > number % 6:
                        await generator.aclose()
                        return
                expected = (stage.runner.token_ids * 23)[: number % 23 + 1]
                assert seen == expected

            for wave in range(4):
                await asyncio.gather(*(client(60 * wave + i) for i in range(60)))
                await stage.until(stage.holds_nothing)
                stage.cache.check_invariants()
            stats = stage.engine.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert stats.prompt_tokens >= stats.cached_prompt_tokens > 0
            assert (stats.num_preemptions > 0) == (device_blocks == 12)

    run(test())
