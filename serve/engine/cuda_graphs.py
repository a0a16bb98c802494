"""Decode steps captured as CUDA graphs: hundreds of launches submitted as one, for a few fixed batch sizes.

A step of n sequences is padded to the next size; what it reads lies in buffers at fixed addresses, filled before each
replay. Sizes are captured when first needed.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CudaStepCapturer", "DecodeGraphs", "StepCapturer", "decode_sizes"]

logger = logging.getLogger(__name__)


class StepCapturer(Protocol):
    """Turns a computation over fixed buffers into one that replays it."""

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns what repeats `run` and gives its result, the same tensor each time.

        Args:
            run: may be called any number of times; each call does the same work over the buffers' contents.

        Raises:
            RuntimeError: it cannot be captured.
        """
        ...


class CudaStepCapturer:
    """Captures on a side stream of its own. All graphs share one memory pool, so only one may be in use at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Entering the stream that is current anyway brings it back: a capture that fails leaves the thread on its own stream.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            # What is done once (compiling kernels, making cuBLAS workspaces) cannot be captured, so it is done here.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls belong to the graph: others copy blocks between tiers meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def decode_sizes(max_running: int) -> tuple[int, ...]:
    """Batch sizes worth a graph: powers of two up to 8, then multiples that pad by at most a third, and the last.

    >>> decode_sizes(64)
    (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    """
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_running:
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return (*(size for size in sizes if size < max_running), max_running)


class DecodeGraphs:
    """At most `len(decode_sizes(max_running))` captured decode steps.

    Args:
        run: computes the logits of a decode step padded to the given size, from buffers already filled.
        max_running: the most sequences of a step.
    """

    def __init__(self, run: Callable[[int], Tensor], capturer: StepCapturer, *, max_running: int) -> None:
        self._run = run
        self._capturer: StepCapturer | None = capturer
        self._sizes = decode_sizes(max_running)
        self._replays: dict[int, Callable[[], Tensor]] = {}

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Sizes captured so far, in that order."""
        return tuple(self._replays)

    def size_for(self, num_decodes: int) -> int:
        """The size a step of `num_decodes` sequences, from 1 to `max_running`, is padded to."""
        return next(size for size in self._sizes if size >= num_decodes)

    def logits(self, size: int) -> Tensor:
        """Computes a step of the size, one of `size_for`. The result is overwritten by the next step.

        Where capturing fails, this and every later step that is not captured yet are computed without graphs.
        """
        replay = self._replays.get(size)
        if replay is not None:
            return replay()
        if self._capturer is None:
            return self._run(size)
        try:
            replay = self._replays[size] = self._capturer.capture(lambda: self._run(size))
        except RuntimeError:  # what torch raises for everything, want of memory included
            logger.warning(
                "decoding %d sequences could not be captured; going on without more graphs", size, exc_info=True
            )
            self._capturer = None
            return self._run(size)
        return replay()
