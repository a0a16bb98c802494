"""How one worker's event stream goes."""

from dataclasses import dataclass

__all__ = ["FeedStats"]


@dataclass(frozen=True, slots=True)
class FeedStats:
    """Counters since the feed was made, and what is the case now.

    Attributes:
        batches: applied, heartbeats included.
        events: applied.
        gaps: times that something was missing.
        replays: asked for.
        snapshots: applied.
        losses: gaps that nothing could fill, so that the worker's blocks were all forgotten.
        restarts: of the worker, as seen in its stream.
        duplicates: batches that came again, or too late to matter.
        stale: batches and snapshots of an incarnation that is over.
        malformed: messages that could not be read.
        overflows: batches dropped since too many were waiting.
        unknown_removals: blocks removed that the index did not have.
        unknown_events: of a kind, or for a tier, unknown here.
        num_pending: batches waiting now.
        last_heard_s: when the last readable batch came, on the owner's clock; None before the first.
        is_in_sync: nothing is missing.
    """

    batches: int
    events: int
    gaps: int
    replays: int
    snapshots: int
    losses: int
    restarts: int
    duplicates: int
    stale: int
    malformed: int
    overflows: int
    unknown_removals: int
    unknown_events: int
    num_pending: int
    last_heard_s: float | None
    is_in_sync: bool
