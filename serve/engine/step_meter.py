"""How long prompts take to compute: told to the cache, which weighs loading against it."""

from collections.abc import Callable

from dynamo.serve.engine.scheduler import ScheduledStep

__all__ = ["StepMeter"]


class StepMeter:
    """Turns measured steps into observations of prefill alone. Used by the engine's thread.

    Decoding sequences share a step with prompts: each token computed is charged with an equal part of the time. That is
    never more than a prompt would have had to wait for. A step that mostly decodes says too little about prompts.

    Args:
        observe: `KVCache.observe_compute`.
        is_async: steps that sample nothing return before the device has computed them, so they count with the next one
            that does.
    """

    def __init__(self, observe: Callable[[int, float, float], None], *, is_async: bool = False) -> None:
        self._observe = observe
        self._is_async = is_async
        self._forget()

    def add(self, step: ScheduledStep, seconds: float) -> None:
        """Takes note of a step that took `seconds`."""
        for chunk in step.prefills:
            self._num_tokens += chunk.num_tokens
            self._num_pairs += chunk.num_tokens * (chunk.sequence.num_computed + chunk.num_tokens / 2)
        self._num_decodes += len(step.decodes)
        self._seconds += seconds
        if self._is_async and not step.sampling:
            return
        count = self._num_tokens
        if count > self._num_decodes:
            # The context that one prompt's chunk would have had to attend to as many tokens.
            context = max(0.0, self._num_pairs / count - count / 2)
            self._observe(count, context, self._seconds * count / (count + self._num_decodes))
        self._forget()

    def _forget(self) -> None:
        self._num_tokens = self._num_decodes = 0
        self._num_pairs = self._seconds = 0.0
