"""What can go wrong with a disk tier, in words for an operator; counted each time, said once."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dynamo.tiers.stats import TierRecorder
from dynamo.tiers.stripe import FaultReport

__all__ = ["fault_reporter"]

logger = logging.getLogger(__name__)

_FAULT_MESSAGES = {
    "truncated": "the file is shorter than its blocks; those lost are computed again",
    "missing": "the index is there but the blocks are gone; going on without them",
    "restriped": "the directories are others than last time; starting empty",
    "deleted": "the file was deleted; its blocks are lost and a new file is started",
    "disk_full": "the disk is full; blocks are not kept until there is space",
    "quota_exceeded": "the disk quota is used up; blocks are not kept until there is space",
    "over_capacity": "other models in use fill the directory's capacity; blocks are not kept",
    "write_budget": "the write budget is used up; blocks are not kept until it has grown again",
    "io_error": "the disk reports I/O errors; blocks affected are computed again",
    "read_only": "the file system is read-only now; blocks are not kept",
    "no_permission": "the permission to use the file was taken away; blocks affected are computed again",
    "resting": "the disk failed several times in a row; it is left alone for a while, then tried again",
    "overwritten": "slots were overwritten while they were read; what was read is thrown away",
    "direct_refused": "O_DIRECT stopped working; going on through the page cache",
    "index_format": "the index cannot be used; starting empty",
    "index_damaged": "the index has damaged records; the blocks they named are forgotten",
    "unavailable": "the file cannot be made again; nothing is kept on disk",
    "still_used": "calls are still running; closing anyway",
}


def fault_reporter(recorder: TierRecorder, directories: Sequence[Path]) -> FaultReport:
    """Counts faults, and logs the first of each kind."""
    where = ", ".join(str(directory) for directory in directories)

    def report(kind: str, count: int, detail: str) -> None:
        if recorder.add_fault(kind, count):
            suffix = f" ({detail})" if detail else ""
            logger.warning("disk tier %s: %s%s", where, _FAULT_MESSAGES[kind], suffix)

    return report
