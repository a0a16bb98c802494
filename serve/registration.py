"""What a worker says when it registers, and what those who watch hear."""

from dataclasses import dataclass, field

from dynamo.router.workers import WorkerCard

__all__ = ["Joined", "Left", "Registration"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """How to reach a worker.

    Attributes:
        card: what it says of itself.
        address: of its session: "unix:PATH" or "http://HOST:PORT".
        events: ZMQ endpoint of its KV and load events; empty for none.
        replay: ZMQ endpoint that sends past events again; empty for none.
        pid: its process, where it runs.
        key: what it asks of a front; empty for nothing. Registrations are readable by their owner only.
    """

    card: WorkerCard
    address: str
    events: str = ""
    replay: str = ""
    pid: int
    key: str = field(default="", repr=False)

    @property
    def worker_id(self) -> str:
        return self.card.worker_id


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is there. One that changed what it says left before."""

    registration: Registration


@dataclass(frozen=True, slots=True)
class Left:
    """A worker is there no more; `reason` is for people."""

    worker_id: str
    reason: str
