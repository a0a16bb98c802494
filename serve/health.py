"""Whether the server should get requests, and whether its process works at all."""

from enum import Enum

from dynamo.serve.engine.request import Engine
from dynamo.serve.envelope import shutting_down
from dynamo.serve.errors import EngineDeadError
from dynamo.serve.explain import Routed

__all__ = ["Health", "Readiness"]


class Readiness(Enum):
    """The answer of /health; only READY is a 200. Without a worker, requests still wait a while for one."""

    READY = "ready"
    NO_WORKER = "no_worker"
    DRAINING = "draining"
    DEAD = "dead"


class Health:
    """Knows the engine and whether a shutdown has begun. Used on the event loop alone.

    Args:
        routed: the same engine, if it has workers behind it.
    """

    def __init__(self, engine: Engine, routed: Routed | None = None) -> None:
        self._engine = engine
        self._routed = routed
        self._draining = False

    def begin_drain(self) -> None:
        """From now on new requests are refused; there is no way back."""
        self._draining = True

    @property
    def readiness(self) -> Readiness:
        if self._draining:
            return Readiness.DRAINING
        try:
            self._engine.check_healthy()
        except EngineDeadError:
            return Readiness.DEAD
        if self._routed is not None and not self._routed.has_workers:
            return Readiness.NO_WORKER
        return Readiness.READY

    def check_accepting(self) -> None:
        """Raises what a new generating request must be refused with.

        Raises:
            RequestError: 503; the server drains.
            EngineDeadError: the engine has stopped.
        """
        if self._draining:
            raise shutting_down()
        self._engine.check_healthy()
