"""What is logged of requests that lose their worker: a worker has many, and each line would say the same."""

import asyncio
import logging
from typing import Final, Literal

__all__ = ["LossLog", "Outcome"]

logger = logging.getLogger(__name__)

_GATHER_S: Final = 0.5

Outcome = Literal["goes on", "is given up"]


class LossLog:
    """Gathers what happens to requests at one worker for half a second, and tells of it in one line. Of one event loop."""

    def __init__(self) -> None:
        self._gathered: dict[tuple[str, Outcome], tuple[int, str]] = {}
        self._due: asyncio.TimerHandle | None = None

    def note(self, worker_id: str, outcome: Outcome, error: Exception) -> None:
        """One request: what becomes of it after it has lost a worker, and why that was lost or nobody else is there."""
        num_requests, reason = self._gathered.get((worker_id, outcome), (0, str(error)))
        self._gathered[worker_id, outcome] = num_requests + 1, reason
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_GATHER_S, self.flush)

    def flush(self) -> None:
        """Logs what was gathered now rather than later."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        gathered, self._gathered = self._gathered, {}
        for (worker_id, outcome), (num_requests, reason) in gathered.items():
            # Of several reasons the first: those that follow are mostly its consequences.
            if outcome == "goes on":
                logger.warning("requests of worker %s that go on elsewhere: %d; %s", worker_id, num_requests, reason)
            else:
                logger.error("requests of worker %s that are given up: %d; %s", worker_id, num_requests, reason)
