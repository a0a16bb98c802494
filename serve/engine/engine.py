"""The embedded engine: continuous batching on one thread, behind the asynchronous `Engine` seam.

It is also the example of a custom inference loop over `dynamo.kvcache`, and uses nothing but the cache's public face:
the scheduler opens a sequence per request, appends and commits; the runner reads `block_table` and `layer`.

    event loop                               engine's thread (StepLoop)
    generate() ── Add, Abort, Stop ───────►  schedule → execute → complete → detokenise, find stops
    OutputStream ◄── one call per step ────  Outbox
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable

import torch

from dynamo.kernels.paged_proof import find_paged_fault
from dynamo.kvcache import KVCache
from dynamo.serve.engine.delivery import Outbox, OutputStream
from dynamo.serve.engine.generation import Generation
from dynamo.serve.engine.loader import LoadedModel
from dynamo.serve.engine.paged_steps import PagedSteps
from dynamo.serve.engine.request import EngineStats, FinishedRequest, GenerationRequest, OutputDelta
from dynamo.serve.engine.runner import ModelRunner, TorchRunner
from dynamo.serve.engine.sampler import Sampler
from dynamo.serve.engine.scheduler import Scheduler, SchedulerLimits
from dynamo.serve.engine.step_loop import Abort, Add, StepLoop, Stop
from dynamo.serve.engine.step_meter import StepMeter
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import EngineDeadError, EngineOverloadedError, RequestFailedError

__all__ = ["InferenceEngine", "build_model_engine"]

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0  # the longest a single step may reasonably take


class InferenceEngine:
    """Serves requests from one runner and one cache; implements `dynamo.serve.engine.request.Engine`.

    Owns its thread and, from construction on, the cache: `stop` closes it.

    Args:
        eos_token_ids: tokens that end a request unless it ignores them.
        max_model_len: most tokens of a request. What the device pool can hold at once bounds it further.
        max_waiting: requests beyond `limits.max_running` that may be live; one more is refused.
        stall_timeout_s: a request that finds no device blocks for so long while no other runs is failed.
    """

    def __init__(
        self,
        cache: KVCache,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        limits: SchedulerLimits,
        max_waiting: int,
        stall_timeout_s: float = 30.0,
    ) -> None:
        self._cache = cache
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._max_model_len = min(max_model_len, cache.num_device_blocks * cache.block_size)
        self._max_live = limits.max_running + max_waiting
        self._scheduler = Scheduler(cache, limits)
        self._outbox = Outbox()
        self._step_loop = StepLoop(self._scheduler, runner, self._outbox, stall_timeout_s=stall_timeout_s)
        self._thread = threading.Thread(target=self._step_loop.run, name="dynamo-engine", daemon=True)
        self._live_ids: set[str] = set()
        self._is_stopping = False
        self._is_started = False

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def num_prefill_tokens_waiting(self) -> int:
        """Tokens of requests that are still to be computed before the next one is sampled."""
        return self._scheduler.num_prefill_tokens_waiting

    def on_finished(self, listener: Callable[[FinishedRequest], None]) -> None:
        """Has `listener` told, on the engine's thread, of every request that held blocks and has ended. Before `start`.

        It must neither raise nor wait. There is one at most.
        """
        self._step_loop.on_finished = listener

    async def start(self) -> None:
        """Starts the engine's thread, for requests of the event loop that runs this. Once only."""
        self._outbox.attach(asyncio.get_running_loop())
        self._thread.start()
        self._is_started = True

    async def stop(self) -> None:
        """Refuses new requests, fails live ones, ends the thread, closes the cache.

        Raises:
            EngineDeadError: the thread is stuck in a step; the cache is left open, as the step still uses it.
        """
        self._is_stopping = True
        if self._is_started:
            self._step_loop.commands.put(Stop())
            await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                raise EngineDeadError(
                    f"the engine's thread did not end within {_JOIN_TIMEOUT_S:.0f} s: it is in the middle of a step"
                )
        await asyncio.to_thread(self._cache.close)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        """See `Engine.generate`. The request is submitted when the first deltas are asked for.

        Raises:
            ValueError: another live request has this id.
            RuntimeError: this is not the event loop that `start` ran on.
        """
        generation = self._submit(request)
        is_over = False
        try:
            while not is_over:
                deltas = await generation.stream.next()
                is_over = deltas[-1].finish_reason is not None
                yield deltas
        finally:
            self._live_ids.discard(request.request_id)
            if not is_over:
                self._step_loop.commands.put(Abort(generation))

    def stats(self) -> EngineStats:
        counters = self._step_loop.counters
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=counters.num_steps,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            generated_tokens=counters.generated_tokens,
        )

    def check_healthy(self) -> None:
        if self._step_loop.death is not None:
            raise EngineDeadError(str(self._step_loop.death))
        if not self._thread.is_alive():
            raise EngineDeadError("the engine's thread is not running; was start() awaited?")

    def _submit(self, request: GenerationRequest) -> Generation:
        self.check_healthy()
        if asyncio.get_running_loop() is not self._outbox.loop:
            raise RuntimeError("requests must come from the event loop that start() ran on")
        if self._is_stopping:
            raise EngineDeadError("the engine is stopping")
        if request.request_id in self._live_ids:
            raise ValueError(f"another live request has the id {request.request_id!r}")
        if len(self._live_ids) >= self._max_live:
            raise EngineOverloadedError(f"{len(self._live_ids)} requests are running or waiting; try again later")
        self._check_tokens(request)
        generation = Generation(
            request,
            OutputStream(request.hold_s, request.sink),
            self._tokenizer,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self._max_model_len,
        )
        self._step_loop.commands.put(Add(generation))
        if self._step_loop.death is not None:  # it ended meanwhile, and may not have seen the command
            raise EngineDeadError(str(self._step_loop.death))
        self._live_ids.add(request.request_id)
        return generation

    def _check_tokens(self, request: GenerationRequest) -> None:
        prompt, output = request.prompt_token_ids, request.output_token_ids
        if not prompt or len(prompt) + len(output) >= self._max_model_len:
            began = f" and {len(output)} tokens were generated before" if output else ""
            raise RequestFailedError(
                f"the prompt has {len(prompt)} tokens{began}; this engine takes 1 to {self._max_model_len - 1}"
            )
        # An unknown id would fail the whole step, and with it the requests beside this one.
        vocab_size = self._tokenizer.vocab_size
        for name, token_ids in (("prompt", prompt), ("output so far", output)):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
                wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
                raise RequestFailedError(f"the {name} holds token id {wrong}; the model has ids 0 to {vocab_size - 1}")


def build_model_engine(
    loaded: LoadedModel,
    cache: KVCache,
    *,
    device: torch.device,
    max_model_len: int,
    limits: SchedulerLimits,
    max_waiting: int,
    paged_attention: bool | None = None,
) -> InferenceEngine:
    """An engine that runs a loaded model. The caller sets torch's thread count.

    Args:
        cache: made for this model, on the same device; the engine closes it.
        device: where the model was loaded to.
        paged_attention: whether the paged kernels attend, and decode steps are captured; None: on CUDA, if they prove
            right there.
    """
    paged = None
    if paged_attention or (paged_attention is None and device.type == "cuda" and _are_kernels_right(loaded, cache)):
        paged = PagedSteps(
            loaded.model,
            cache.layer,
            block_size=cache.block_size,
            max_running=limits.max_running,
            max_batch_tokens=limits.max_batch_tokens,
            max_model_len=min(max_model_len, cache.num_device_blocks * cache.block_size),
        )
    runner = TorchRunner(
        loaded.model,
        Sampler(loaded.tokenizer.eos_token_ids),
        cache.layer,
        device=device,
        block_size=cache.block_size,
        max_batch_tokens=limits.max_batch_tokens,
        paged=paged,
        meter=StepMeter(cache.observe_compute, is_async=device.type == "cuda"),
    )
    return InferenceEngine(
        cache,
        runner,
        loaded.tokenizer,
        eos_token_ids=loaded.tokenizer.eos_token_ids,
        max_model_len=max_model_len,
        limits=limits,
        max_waiting=max_waiting,
    )


def _are_kernels_right(loaded: LoadedModel, cache: KVCache) -> bool:
    """Tries the paged kernels on the cache's device with the model's shape; says aloud when plain torch must do."""
    config = loaded.config
    fault = find_paged_fault(
        cache.device,
        loaded.dtype,
        num_q_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=cache.block_size,
    )
    if fault is not None:
        logger.error("going on with plain torch attention, which is slower: %s", fault)
    return fault is None
