"""What a front needs of a worker, whatever way it is reached."""

from collections.abc import AsyncGenerator
from typing import Protocol

from dynamo.serve.engine.request import GenerationRequest, OutputDelta

__all__ = ["WorkerLink"]


class WorkerLink(Protocol):
    """The way to one worker. Used on one event loop; any number of requests run side by side."""

    @property
    def worker_id(self) -> str:
        """The worker's unique name."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        """As `Engine.generate`: yields what queued meanwhile, at least one delta; closing it aborts the request at once.

        `request.request_id` is unique among the live requests of this link, and a new attempt has a new one.

        Raises:
            WorkerLostError: the worker cannot be reached, it is going away, or the stream broke. What was yielded before
                stays valid; the request can be carried on at another worker.
            WorkerDrainingError: as that, and nothing is wrong with the worker: it takes nothing new, as it is about to leave.
            EngineOverloadedError: the worker's waiting queue is full.
            EngineDeadError: the worker answers, but its engine has ended.
            RequestFailedError: this request alone failed, and would elsewhere.
        """
        ...

    async def close(self) -> None:
        """Ends the link and every request on it. Idempotent."""
        ...
