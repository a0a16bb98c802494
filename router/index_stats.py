"""What the index holds, and what that costs."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["IndexStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStats:
    """Counts of one moment. An entry is one block in one tier of one worker.

    Attributes:
        num_workers: slots in use.
        num_blocks: different blocks.
        num_runs: stretches of blocks that follow one another and have the same holders.
        num_entries: of workers that are there.
        num_unswept: entries of workers that left or were cleared, not forgotten yet; the next sweeps take them.
        num_predicted: blocks in predictions, those that expired and are not swept yet included.
        num_predictions_evicted: predicted blocks that the bound forgot before their time, since the start.
        num_refused: stored blocks that the bound kept out, since the start.
        entries: by slot and tier.
        slot_bytes: by slot: its share of the table.
        num_bytes: memory of everything.
    """

    num_workers: int
    num_blocks: int
    num_runs: int
    num_entries: int
    num_unswept: int
    num_predicted: int
    num_predictions_evicted: int
    num_refused: int
    entries: Mapping[int, Mapping[str, int]]
    slot_bytes: Mapping[int, int]
    num_bytes: int
