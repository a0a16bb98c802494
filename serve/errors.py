"""Errors of the server.

ServeError
├── ConfigError            a flag, the TOML file or the model folder is wrong: printed and exit 2
├── ModelLoadError         the model folder cannot be loaded
├── RequestError           the client's request is wrong or cannot be served; carries the OpenAI error fields
├── EngineOverloadedError  the waiting queue is full: 429 at the door
├── EngineDeadError        the engine's thread ended: 503 at the door
├── WorkerStartError       worker processes cannot be kept running: printed, and the server ends
├── WorkerLostError        a worker cannot be reached any more: the front goes on elsewhere, else 503 at the door
│   └── WorkerDrainingError    it is about to leave and takes nothing new; nothing is wrong with it
├── NoWorkerError          there is no worker that could take the request: 503 at the door
└── RequestFailedError     one request failed inside the engine: 500 at the door, others go on
"""

__all__ = [
    "ConfigError",
    "EngineDeadError",
    "EngineOverloadedError",
    "ModelLoadError",
    "NoWorkerError",
    "RequestError",
    "RequestFailedError",
    "ServeError",
    "WorkerDrainingError",
    "WorkerLostError",
    "WorkerStartError",
]


class ServeError(Exception):
    """Root of all errors raised by `dynamo.serve`."""


class ConfigError(ServeError):
    """A setting is wrong. The message names the setting, its value and what would be accepted."""


class ModelLoadError(ServeError):
    """A model folder cannot be loaded. The message names the file and what is wrong with it."""


class RequestError(ServeError):
    """A request is refused.

    Attributes:
        message: for people; names what was wrong, the value and the way out.
        status: HTTP status.
        type: OpenAI error type, such as "invalid_request_error".
        param: the request field at fault, or None.
        code: OpenAI error code, such as "context_length_exceeded", or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code


class EngineOverloadedError(ServeError):
    """The engine's waiting queue is full; the caller may retry later."""


class EngineDeadError(ServeError):
    """The engine's thread has ended and no request can be served."""


class WorkerLostError(ServeError):
    """A worker cannot be reached, or its stream broke: nothing more comes from it. Whoever can, goes on at another one.

    Attributes:
        worker_id: which worker that is.
    """

    def __init__(self, worker_id: str, reason: str) -> None:
        super().__init__(f"worker {worker_id} is lost: {reason}")
        self.worker_id = worker_id


class WorkerDrainingError(WorkerLostError):
    """A worker that is about to leave takes the request no more. It keeps its good name."""


class NoWorkerError(ServeError):
    """No worker is there, or none of those that are may take the request. The message says which of the two."""


class RequestFailedError(ServeError):
    """One request failed inside the engine; the others go on."""


class WorkerStartError(ServeError):
    """A worker process cannot be started, or ends as often as it is. The message ends with the worker's own last sentence.

    Attributes:
        exit_code: for the server: the worker's own where a setting is wrong, else 1.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
