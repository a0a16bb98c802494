"""Errors of the router.

RouterError
├── RouterConfigError          a setting of RouterConfig is wrong (also a ValueError)
├── IncompatibleWorkerError    a worker's card cannot be routed to, such as one with another version of block keys
├── UnknownWorkerError         a worker was named that is not a member (also a KeyError)
├── RouteError                 a request got no worker
│   ├── NoWorkersError         no worker may take it: none is there, all drain, or the request excludes them
│   ├── PinnedWorkerError      the worker it is pinned to may not take it, or a pin is needed and there is none
│   └── AllBusyError           workers may take it, but all are above the busy thresholds
│       └── PinnedWorkerBusyError  the worker it is pinned to is
└── WaitingError               a request did not get through the waiting room
    ├── WaitingRoomFullError   the room holds as many as it may, none of them of a lower priority
    └── WaitedTooLongError     its deadline passed while it waited
"""

__all__ = [
    "AllBusyError",
    "IncompatibleWorkerError",
    "NoWorkersError",
    "PinnedWorkerBusyError",
    "PinnedWorkerError",
    "RouteError",
    "RouterConfigError",
    "RouterError",
    "UnknownWorkerError",
    "WaitedTooLongError",
    "WaitingError",
    "WaitingRoomFullError",
]


class RouterError(Exception):
    """Root of all errors raised by `dynamo.router`."""


class RouterConfigError(RouterError, ValueError):
    """A setting is wrong. The message names it, its value and what would be accepted."""


class IncompatibleWorkerError(RouterError):
    """A worker's card contradicts what this router knows; the worker is not taken in. The message says what differs."""


class UnknownWorkerError(RouterError, KeyError):
    """A worker was named that is not a member.

    Attributes:
        worker_id: the name.
    """

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"no worker named {worker_id!r} is a member")
        self.worker_id = worker_id

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError's own shows the repr


class RouteError(RouterError):
    """A request got no worker; nothing was booked."""


class NoWorkersError(RouteError):
    """No worker may take the request. Waiting helps only if workers are about to join."""


class PinnedWorkerError(RouteError):
    """The request names a worker that may not take it, or names none where it must. Waiting does not help.

    Attributes:
        worker_id: the worker named; None where none was.
    """

    def __init__(self, message: str, worker_id: str | None) -> None:
        super().__init__(message)
        self.worker_id = worker_id


class AllBusyError(RouteError):
    """Every worker that may take the request is above the busy thresholds. Wait (`WaitingRoom`), or send 429 or 503."""


class PinnedWorkerBusyError(AllBusyError):
    """The worker that the request is pinned to is above the busy thresholds; others may not be.

    Attributes:
        worker_id: the worker named.
    """

    def __init__(self, message: str, worker_id: str) -> None:
        super().__init__(message)
        self.worker_id = worker_id


class WaitingError(RouterError):
    """A request did not get through the waiting room; nothing was booked."""


class WaitingRoomFullError(WaitingError):
    """As many requests wait as may, or a more important one took the place. Raised at once or while waiting."""


class WaitedTooLongError(WaitingError):
    """No worker had room before the request's deadline.

    Attributes:
        waited_s: how long it waited.
    """

    def __init__(self, message: str, waited_s: float) -> None:
        super().__init__(message)
        self.waited_s = waited_s
