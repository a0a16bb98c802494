"""How fast a tier gives blocks back, measured on the parts of loads as they end."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["LaneMeter", "LaneSpeed"]

_NUM_SAMPLES = 16
_SAMPLE_PARTS = 4  # parts that run beside one another end together: one alone says nothing about the lane
_START_S = 0.005  # of the first part's time, up to so much went into waking threads and says nothing about the speed
_MIN_GIVE_UPS = 2  # in a row, before a lane of which nothing else is known counts as slow
_FIRST_PROBE_S = 2.0
_LAST_PROBE_S = 300.0


@dataclass(frozen=True, slots=True)
class LaneSpeed:
    """What loading costs, as of one moment.

    Attributes:
        latency_s: from a lane at rest to its first bytes.
        block_s: of each block, with all the lane's threads at work.
        num_waiting: blocks of each load that is under way.
    """

    latency_s: float
    block_s: float
    num_waiting: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    """`num_blocks` came in `seconds` until `at_s`; it counts as much as `weight` blocks.

    Attributes:
        is_whole: all came that were asked for; otherwise it is only known that it took at least so long.
    """

    num_blocks: int
    seconds: float
    weight: int
    at_s: float
    is_whole: bool


class LaneMeter:
    """Speed and queue of one tier's loads. Not thread-safe: `LoadPlanner` guards it.

    The speed is the median over recent samples, weighted by their blocks: a single hiccup does not move it, two loads that
    were too slow do. A lane that is found too slow is tried again after a pause, which doubles each time it fails.
    """

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=_NUM_SAMPLES)
        self._latencies: deque[float] = deque(maxlen=_NUM_SAMPLES)
        self._loads: dict[int, int] = {}  # blocks that are still to come, by the load's number
        self._num_running = 0
        self._mark_s = 0.0  # when the part before ended, or the lane began to work
        self._is_first = True
        self._open_parts = self._open_blocks = 0  # of the sample that is being collected
        self._open_s = 0.0
        self._observed_s = 0.0
        self._pause_s = _FIRST_PROBE_S
        self._probed_s: float | None = None
        self._num_give_ups = 0  # in a row
        self._is_on_trial = False

    @property
    def is_on_trial(self) -> bool:
        """Whether a first measurement has begun and not ended: had the lane been fast, it would have."""
        return self._is_on_trial

    @property
    def is_trusted(self) -> bool:
        """Whether the last load came in time, or the tier has shown since how fast it is."""
        return not self._num_give_ups

    @property
    def bandwidth_blocks_per_s(self) -> float | None:
        """Blocks per second; None before it was measured."""
        return 1.0 / max(1e-9, _block_s(self._samples)) if self._samples else None

    def speed(self, now: float) -> LaneSpeed | None:
        """What is known; None where loading must show how fast it is: never measured, or too slow a while ago."""
        is_known = any(sample.is_whole for sample in self._samples) or self._num_give_ups >= _MIN_GIVE_UPS
        if not is_known or now - self._observed_s >= self._pause_s:
            return None
        return LaneSpeed(self._latency_s, _block_s(self._samples), tuple(self._loads.values()))

    def last_speed(self) -> LaneSpeed | None:
        """What was last known, however long ago; None where nothing was. For loads that are started in any case."""
        return (
            LaneSpeed(self._latency_s, _block_s(self._samples), tuple(self._loads.values())) if self._samples else None
        )

    def speed_since(self, moment_s: float) -> LaneSpeed | None:
        """What has been measured since a moment, for one load alone; None if nothing."""
        samples = [sample for sample in self._samples if sample.is_whole and sample.at_s > moment_s]
        return LaneSpeed(self._latency_s, _block_s(samples), ()) if samples else None

    def expect(self, load: int, num_blocks: int) -> None:
        """Takes note of blocks of a load that are going to come."""
        self._loads[load] = self._loads.get(load, 0) + num_blocks

    def forget(self, load: int) -> None:
        """Nothing more is to come of a load."""
        self._loads.pop(load, None)

    def begin_trial(self) -> None:
        """A measurement begins for which nobody waits."""
        self._is_on_trial = True

    def observe_trial(self, now: float, num_blocks: int, seconds: float, latency_s: float) -> None:
        """The measurement found that `num_blocks` blocks take `seconds`, behind `latency_s` until the first bytes."""
        self._latencies.append(latency_s)
        self._add(_Sample(num_blocks, seconds, num_blocks, now, is_whole=True))

    def end_trial(self) -> None:
        """The measurement has ended, whether it found something or not."""
        self._is_on_trial = False

    def begin_part(self, now: float) -> None:
        """A part of a load starts."""
        if not self._num_running:
            self._mark_s, self._is_first = now, True
        self._num_running += 1

    def end_part(self, now: float, load: int, num_blocks: int, num_moved: int) -> None:
        """A part of `num_blocks` blocks ended, and `num_moved` of them were moved."""
        self._num_running -= 1
        left = self._loads.get(load, 0) - num_blocks
        if left > 0:
            self._loads[load] = left
        else:
            self._loads.pop(load, None)
        if not num_moved:
            return
        seconds = now - self._mark_s
        self._mark_s = now
        if self._is_first:
            if self._samples:
                self._latencies.append(max(0.0, seconds - num_moved * _block_s(self._samples)))
            seconds = max(0.0, seconds - _START_S)
            self._is_first = False
        self._open_parts += 1
        self._open_blocks += num_moved
        self._open_s += seconds
        if self._open_parts == _SAMPLE_PARTS or not self._num_running:
            self._add(_Sample(self._open_blocks, self._open_s, self._open_blocks, now, is_whole=True))
            self._num_give_ups = 0
            self._open_parts, self._open_blocks, self._open_s = 0, 0, 0.0

    def give_up(self, now: float, num_wanted: int, num_arrived: int, seconds: float) -> None:
        """A load was ended because it was too slow: of `num_wanted` blocks, `num_arrived` came within `seconds`."""
        self._add(_Sample(max(1, num_arrived), seconds, num_wanted, now, is_whole=False))
        self._num_give_ups += 1
        if self._probed_s is not None:
            self._probed_s = None
            self._pause_s = min(2 * self._pause_s, _LAST_PROBE_S)

    def probe(self, now: float) -> None:
        """A load is started although the lane was too slow."""
        if self._samples and self._probed_s is None:
            self._probed_s = now
            self._observed_s = now  # one probe at a time

    def load_ended(self) -> None:
        """A load came in time: if it was a probe, what was measured before it no longer holds."""
        self._num_give_ups = 0
        if self._probed_s is not None:
            self._probed_s = None
            self._pause_s = _FIRST_PROBE_S
            last = self._samples[-1]
            self._samples.clear()
            self._samples.append(last)

    @property
    def _latency_s(self) -> float:
        return float(np.median(self._latencies)) if self._latencies else 0.0

    def _add(self, sample: _Sample) -> None:
        self._samples.append(sample)
        self._observed_s = sample.at_s


def _block_s(samples: Iterable[_Sample]) -> float:
    """Median seconds of a block; 0 without samples."""
    rates = sorted((sample.seconds / sample.num_blocks, sample.weight) for sample in samples)
    half = sum(weight for _, weight in rates) / 2
    for seconds, weight in rates:
        half -= weight
        if half <= 0:
            return seconds
    return 0.0
