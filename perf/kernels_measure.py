"""How the kernel benchmark measures: times taken in turn with a ceiling's, on the CPU and on a GPU."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from dynamo.perf.harness import BenchmarkError, median, timed
from dynamo.perf.interrupts import put_off
from dynamo.perf.report import Result

__all__ = [
    "CudaTimer",
    "Paired",
    "Timer",
    "WallTimer",
    "busy_core",
    "choose_timer",
    "new_event",
    "new_stream",
    "paired",
    "paired_cpu",
    "speed_results",
]

_L2_FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache
_FLUSHES_TIMED = 16
_COVER = 1.5  # the GPU is kept busy for so much longer than the host took to queue an action when it was prepared
_MOST_COVER_S = 0.02


@dataclass(frozen=True, slots=True)
class Paired:
    """Medians over repeats, each of which ran the action and its ceiling one after the other.

    Attributes:
        gb_s: payload per second.
        share: of the ceiling's speed, in per cent: the median of the repeats' ratios.
    """

    gb_s: float
    share: float


class Timer(Protocol):
    """Times actions that may go on after they return."""

    def prepare(self, *actions: Callable[[], object]) -> None:
        """Runs actions, unmeasured, that are going to be measured next."""

    def seconds(self, action: Callable[[], object]) -> float:
        """One run, from its start to the end of all work it queued."""


class WallTimer:
    """Actions that are done when they return. Implements Timer."""

    def prepare(self, *actions: Callable[[], object]) -> None:
        for action in actions:
            action()

    def seconds(self, action: Callable[[], object]) -> float:
        return timed(action).wall_s


class CudaTimer:
    """GPU time between two events on torch's current stream, with cold second-level cache. Implements Timer.

    Work that flushes the cache keeps the GPU busy until the host has queued the action, as an engine's own work does: what
    planning and launching cost is the host's time, and is measured as such elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.zeros(_L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._start, self._end = new_event(), new_event()
        self._num_flushes = _FLUSHES_TIMED
        flushing_s = self._between_events(self._fill)
        self._flush_s = max(flushing_s / _FLUSHES_TIMED, 1e-6)
        self._num_flushes = 1

    def prepare(self, *actions: Callable[[], object]) -> None:
        queueing_s = 0.0
        for action in actions:
            action()
            torch.cuda.synchronize()
            queueing_s = max(queueing_s, timed(action).wall_s)
            torch.cuda.synchronize()
        self._num_flushes = 1 + math.ceil(min(_COVER * queueing_s, _MOST_COVER_S) / self._flush_s)

    def seconds(self, action: Callable[[], object]) -> float:
        self._fill()
        return self._between_events(action)

    def _fill(self) -> None:
        for _ in range(self._num_flushes):
            self._flush.zero_()

    def _between_events(self, action: Callable[[], object]) -> float:
        self._start.record()
        action()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1000


def new_event() -> torch.cuda.Event:
    """An event that tells times."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own, as copy engines want."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def choose_timer(device: torch.device) -> Timer:
    """The timer for work on `device`."""
    return CudaTimer(device) if device.type == "cuda" else WallTimer()


def paired(
    timer: Timer, action: Callable[[], object], ceiling: Callable[[], object], num_bytes: int, repeats: int
) -> Paired:
    """Times `action` in turn with `ceiling`, which moves as many bytes. Both run before, unmeasured."""
    timer.prepare(ceiling, action)
    pairs = [(timer.seconds(ceiling), timer.seconds(action)) for _ in range(repeats)]
    return Paired(
        gb_s=num_bytes / median([ours for _, ours in pairs]) / 1e9,
        share=100 * median([limit / ours for limit, ours in pairs]),
    )


def paired_cpu(
    action: Callable[[], object], ceiling: Callable[[], object], num_bytes: int, repeats: int
) -> tuple[Paired, Paired]:
    """As `paired`, for work on the CPU.

    Returns:
        By elapsed time, which is what a caller waits, and by processor time of all threads of this process.
    """
    for warm_up in (ceiling, action):
        warm_up()
    pairs = [(timed(ceiling), timed(action)) for _ in range(repeats)]
    cpu = [(limit.cpu_s, ours.cpu_s) for limit, ours in pairs]
    wall = [(limit.wall_s, ours.wall_s) for limit, ours in pairs]

    def middle(times: Sequence[tuple[float, float]]) -> Paired:
        return Paired(
            gb_s=num_bytes / median([ours for _, ours in times]) / 1e9,
            share=100 * median([limit / ours for limit, ours in times]),
        )

    return middle(wall), middle(cpu)


def speed_results(case: str, subject: str, speed: Paired, repeats: int, metric: str = "payload") -> Iterator[Result]:
    """The two numbers of a measurement: GB/s and share of the ceiling."""
    yield Result(case=case, subject=subject, metric=metric, value=speed.gb_s, unit="GB/s", samples=repeats)
    yield Result(
        case=case, subject=subject, metric=f"{metric} of ceiling", value=speed.share, unit="%", samples=repeats
    )


@contextmanager
def busy_core() -> Iterator[None]:
    """Keeps one other core computing for the block: a process that touches no memory to speak of.

    Raises:
        BenchmarkError: the process does not start.
    """
    program = (
        "import os\nparent = os.getppid()\nprint('on', flush=True)\n"
        "while os.getppid() == parent:\n for _ in range(1 << 20): pass"  # ends with a parent that is killed
    )
    with ExitStack() as undo:
        with put_off():  # until there is what ends it
            process = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
            undo.enter_context(process)  # closes the pipe and waits
            undo.callback(process.kill)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "on":
            raise BenchmarkError("the process that keeps a second core busy did not start")
        yield
