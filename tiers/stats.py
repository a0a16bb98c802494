"""What a tier has moved and what went wrong, as a snapshot and as the recorder behind it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType

from dynamo.tiers.latency import LatencyCounts, LatencyHistogram

__all__ = ["MovedBlocks", "TierRecorder", "TierStats"]


@dataclass(frozen=True, slots=True)
class MovedBlocks:
    """Blocks moved in one direction since the tier was opened.

    Attributes:
        blocks: blocks moved with success.
        bytes: their payload (`block_bytes` each).
        failed_blocks: blocks whose outcome was False.
        calls: calls that moved or failed at least one block.
        seconds: time spent inside those calls, added up over threads.
    """

    blocks: int = 0
    bytes: int = 0
    failed_blocks: int = 0
    calls: int = 0
    seconds: float = 0.0

    @property
    def gb_per_s(self) -> float | None:
        """GB (10^9 bytes) per second inside the calls, which is per thread where several move blocks; None: no calls."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else None

    def since(self, earlier: "MovedBlocks") -> "MovedBlocks":
        """What was moved between a snapshot and this later one."""
        return MovedBlocks(
            self.blocks - earlier.blocks,
            self.bytes - earlier.bytes,
            self.failed_blocks - earlier.failed_blocks,
            self.calls - earlier.calls,
            self.seconds - earlier.seconds,
        )


@dataclass(frozen=True, slots=True)
class TierStats:
    """Snapshot of one tier.

    Attributes:
        name: "device", "host" or "disk".
        num_slots: slots of the tier.
        path: the way bytes take, such as "pinned", "pageable", "O_DIRECT" or "buffered".
        read: blocks read out of the tier.
        write: blocks written into the tier.
        faults: number of faults by kind, such as {"truncated": 1}; kinds that never happened are absent.
        read_latency: of the calls that read.
        write_latency: of the calls that wrote.
        page_bytes: size of the memory pages that hold most of the tier; None where it is no host memory, or not known.
    """

    name: str
    num_slots: int
    path: str
    read: MovedBlocks
    write: MovedBlocks
    faults: Mapping[str, int]
    read_latency: LatencyCounts = field(default_factory=LatencyCounts)
    write_latency: LatencyCounts = field(default_factory=LatencyCounts)
    page_bytes: int | None = None


class TierRecorder:
    """Thread-safe counters behind `TierStats`; every tier owns one."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._lock = Lock()
        self._read = MovedBlocks()
        self._write = MovedBlocks()
        self._read_latency = LatencyHistogram()
        self._write_latency = LatencyHistogram()
        self._faults: dict[str, int] = {}

    def add_read(self, blocks: int, failed_blocks: int, seconds: float) -> None:
        """Counts one read call."""
        with self._lock:
            self._read = self._added(self._read, blocks, failed_blocks, seconds, self._read_latency)

    def add_write(self, blocks: int, failed_blocks: int, seconds: float) -> None:
        """Counts one write call."""
        with self._lock:
            self._write = self._added(self._write, blocks, failed_blocks, seconds, self._write_latency)

    def add_fault(self, kind: str, count: int = 1) -> bool:
        """Counts a fault.

        Returns:
            True when this is the first fault of its kind, which is when it should be logged.
        """
        if count <= 0:
            return False
        with self._lock:
            first = kind not in self._faults
            self._faults[kind] = self._faults.get(kind, 0) + count
            return first

    def snapshot(self, name: str, num_slots: int, path: str) -> TierStats:
        """The counters as they are now."""
        with self._lock:
            return TierStats(
                name,
                num_slots,
                path,
                self._read,
                self._write,
                MappingProxyType(dict(self._faults)),
                self._read_latency.snapshot(),
                self._write_latency.snapshot(),
            )

    def _added(
        self, moved: MovedBlocks, blocks: int, failed_blocks: int, seconds: float, latency: LatencyHistogram
    ) -> MovedBlocks:
        if blocks == 0 and failed_blocks == 0:
            return moved
        latency.add(seconds)
        return MovedBlocks(
            moved.blocks + blocks,
            moved.bytes + blocks * self._block_bytes,
            moved.failed_blocks + failed_blocks,
            moved.calls + 1,
            moved.seconds + seconds,
        )
