"""The engine's thread: takes commands, runs step after step, hands out what came of them."""

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

from dynamo.serve.engine.delivery import Outbox
from dynamo.serve.engine.generation import Generation
from dynamo.serve.engine.request import FinishedRequest
from dynamo.serve.engine.runner import ModelRunner
from dynamo.serve.engine.sampler import SampledToken
from dynamo.serve.engine.scheduler import ScheduledStep, Scheduler
from dynamo.serve.engine.sequence import SequenceState
from dynamo.serve.errors import EngineDeadError, RequestFailedError, ServeError

__all__ = ["Abort", "Add", "Command", "Counters", "Loaded", "StepLoop", "Stop"]

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
_IDLE_WAIT_S = 1.0  # nothing to do: only a command can change that, and it ends the wait
_BLOCKS_WAIT_S = (0.0002, 0.002)  # all wait for device blocks: first and longest pause before looking again


@dataclass(frozen=True, slots=True)
class Add:
    generation: Generation


@dataclass(frozen=True, slots=True)
class Abort:
    generation: Generation


@dataclass(frozen=True, slots=True)
class Stop:
    """End before the next step; what still runs is told so."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Blocks that a sequence waits for have all come, or will not."""


Command = Add | Abort | Stop | Loaded


@dataclass(slots=True)
class Counters:
    """Since start. Written by the engine's thread, read by anyone."""

    num_steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0


class StepLoop:
    """Body of the engine's thread. `commands` may be put to from any thread; all else belongs to `run`.

    Args:
        stall_timeout_s: how long a request waits for device blocks while no request of this engine runs.

    Attributes:
        commands: what to do next; taken between steps.
        counters: see there.
        on_finished: called with every request that held blocks and has ended; set before `run`, must not raise or wait.
        death: why the thread ended, once it did; after that no command is taken.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, outbox: Outbox, *, stall_timeout_s: float) -> None:
        self.on_finished: Callable[[FinishedRequest], None] | None = None
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.counters = Counters()
        self.death: EngineDeadError | None = None
        self._scheduler = scheduler
        self._runner = runner
        self._outbox = outbox
        self._stall_timeout_s = stall_timeout_s
        self._live: dict[str, Generation] = {}
        self._is_stopping = False
        self._failed_steps = 0
        self._pause_s = _BLOCKS_WAIT_S[0]
        self._stalled_since: float | None = None
        scheduler.when_loaded(lambda: self.commands.put(Loaded()))

    def run(self) -> None:
        """Runs until stopped, or until the engine cannot go on. Every request is told how it ended."""
        death = EngineDeadError("the engine has stopped")
        try:
            while not self._is_stopping:
                self._turn()
        except EngineDeadError as error:
            logger.error("%s", error)
            death = error
        except Exception as error:  # root of the thread: told to every request and to the log
            logger.critical("the engine's thread failed", exc_info=True)
            death = EngineDeadError(f"the engine's thread failed: {error!r}")
        finally:
            self._end(death)

    def _turn(self) -> None:
        if not self._scheduler.has_work:
            self._await_command(_IDLE_WAIT_S)
        while not self.commands.empty():
            self._obey(self.commands.get_nowait())
        if self._is_stopping:
            return
        step = self._scheduler.schedule()
        for sequence, failure in step.failed:
            self._fail(self._live[sequence.request_id], failure)
        if step.is_empty:
            self._flush()
            if self._scheduler.has_work:
                self._await_blocks()
            return
        self._pause_s = _BLOCKS_WAIT_S[0]
        self._stalled_since = None
        try:
            outcomes = self._runner.execute(step)
        except Exception as error:  # noqa: BLE001  # root of a step: told to its requests and to the log
            self._step_failed(step, error)
        else:
            self._failed_steps = 0
            self._step_done(step, outcomes)
        self._flush()

    def _await_command(self, timeout_s: float) -> None:
        try:
            command = self.commands.get(timeout=timeout_s)
        except queue.Empty:
            return
        self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Add(generation):
                try:
                    self._scheduler.add(generation.sequence)
                except RequestFailedError as error:
                    self._fail(generation, error)
                else:
                    self._live[generation.sequence.request_id] = generation
            case Abort(generation):
                self._forget(generation)
            case Stop():
                self._is_stopping = True
            case Loaded():
                pass  # the next `schedule` sees it

    def _await_blocks(self) -> None:
        """Nothing can be computed until loads end, which is told, or patience with them does, or blocks that nobody here
        holds become available."""
        patience_s = self._scheduler.patience_left_s
        wait_s = _IDLE_WAIT_S if patience_s is None else min(_IDLE_WAIT_S, patience_s)
        if self._scheduler.num_running and not self._scheduler.num_waiting:
            self._await_command(wait_s)
        else:
            self._await_command(min(wait_s, self._pause_s))
            self._pause_s = min(2 * self._pause_s, _BLOCKS_WAIT_S[1])
        if self._scheduler.num_running:  # loads have deadlines of their own
            self._stalled_since = None
            return
        now = time.monotonic()
        if self._stalled_since is None:
            self._stalled_since = now
        elif now - self._stalled_since >= self._stall_timeout_s and self._live:
            self._stalled_since = None
            oldest = min(self._live.values(), key=lambda generation: generation.sequence.arrival)
            message = (
                f"request {oldest.sequence.request_id} found no device blocks for {self._stall_timeout_s:g} s although "
                "no other request runs; something outside this engine holds blocks of its cache"
            )
            self._fail(oldest, RequestFailedError(message))
            self._flush()

    def _step_done(self, step: ScheduledStep, outcomes: list[SampledToken | RequestFailedError]) -> None:
        counters = self.counters
        counters.num_steps += 1
        counters.generated_tokens += len(outcomes)
        self._scheduler.complete(
            step, [outcome.token_id if isinstance(outcome, SampledToken) else None for outcome in outcomes]
        )
        live = self._live
        for sequence, outcome in zip(step.sampling, outcomes, strict=True):
            generation = live[sequence.request_id]
            if isinstance(outcome, SampledToken):
                self._outbox.put(generation.stream, generation.push(outcome))
                if generation.is_finished:
                    self._forget(generation)
            else:
                counters.generated_tokens -= 1
                self._fail(generation, outcome)
        for chunk in step.prefills:
            sequence = chunk.sequence
            if chunk.is_last and sequence.num_output_tokens == 1:  # later ones recompute, or were counted elsewhere
                counters.prompt_tokens += sequence.num_prompt_tokens
                counters.cached_prompt_tokens += sequence.num_cached_tokens or 0

    def _step_failed(self, step: ScheduledStep, error: Exception) -> None:
        logger.error("a step of %d sequences failed", len(step.decodes) + len(step.prefills), exc_info=error)
        for sequence in [*step.decodes, *(chunk.sequence for chunk in step.prefills)]:
            failure = RequestFailedError(f"request {sequence.request_id} failed in the engine: {error!r}")
            self._fail(self._live[sequence.request_id], failure)
        self._failed_steps += 1
        if self._failed_steps == MAX_FAILED_STEPS:
            raise EngineDeadError(f"{MAX_FAILED_STEPS} steps in a row failed, the last with {error!r}")

    def _fail(self, generation: Generation, error: ServeError) -> None:
        self._outbox.put(generation.stream, error)
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        """Ends a request: its blocks are released, and nothing of it is kept. Idempotent."""
        generation.is_finished = True
        if self._live.get(generation.sequence.request_id) is generation:
            del self._live[generation.sequence.request_id]
            self._tell_finished(generation.sequence)
            self._scheduler.finish(generation.sequence)

    def _tell_finished(self, sequence: SequenceState) -> None:
        if self.on_finished is not None and sequence.kv is not None:
            self.on_finished(
                FinishedRequest(
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    num_output_tokens=sequence.num_output_tokens,
                    num_cached_tokens=sequence.num_cached_tokens or 0,
                    block_keys=sequence.kv.block_keys,
                )
            )

    def _flush(self) -> None:
        if not self._outbox.flush():
            raise EngineDeadError("the event loop that the engine was started on is closed")

    def _end(self, death: EngineDeadError) -> None:
        self.death = death  # from here on the face refuses; what was put before is told below
        generations = list(self._live.values())
        while not self.commands.empty():
            command = self.commands.get_nowait()
            if isinstance(command, Add):
                generations.append(command.generation)
        for generation in generations:
            self._outbox.put(generation.stream, death)
            try:
                self._forget(generation)
            except Exception:  # root of the thread: the other requests must still be told
                logger.exception("request %s could not be released", generation.sequence.request_id)
        self._outbox.flush()
