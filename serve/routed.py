"""What a front's own endpoints need of an engine that has workers behind it."""

from typing import Protocol

__all__ = ["Routed"]


class Routed(Protocol):
    """The engine as its operators see it."""

    @property
    def has_workers(self) -> bool:
        """Whether a request would find a worker now."""
        ...
