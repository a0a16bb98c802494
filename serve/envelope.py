"""Errors as OpenAI's clients expect them: one JSON shape for every status, and for errors inside a stream."""

import msgspec
from starlette.exceptions import HTTPException

from dynamo.serve.errors import (
    EngineDeadError,
    EngineOverloadedError,
    NoWorkerError,
    RequestError,
    RequestFailedError,
    WorkerLostError,
)
from dynamo.serve.openai import ErrorBody, ErrorEnvelope

__all__ = ["envelope", "refusal_of", "shutting_down", "unforeseen"]

_HTTP_ERRORS = {
    404: ("unknown_url", "there is nothing at {path}; /docs lists what is"),
    405: ("method_not_allowed", "{method} is not allowed at {path}; /docs lists what is"),
}


def envelope(error: RequestError) -> bytes:
    """The JSON body that tells a client of `error`."""
    return msgspec.json.encode(ErrorEnvelope(ErrorBody(error.message, error.type, error.param, error.code)))


def refusal_of(error: BaseException, *, method: str = "", path: str = "") -> RequestError | None:
    """What the client is told of `error`; None when nobody foresaw it."""
    match error:
        case RequestError():
            return error
        case HTTPException():
            code, text = _HTTP_ERRORS.get(error.status_code, (None, error.detail))
            return RequestError(text.format(method=method, path=path), status=error.status_code, code=code)
        case EngineOverloadedError():
            message = "the server has as many requests waiting as it accepts; try again in a moment"
            return RequestError(message, status=429, type="rate_limit_error", code="engine_overloaded")
        case EngineDeadError():
            message = "the engine has stopped, and no request can be served until the server is started again"
            return RequestError(message, status=503, type="service_unavailable", code="engine_dead")
        case WorkerLostError():
            message = "the worker that served this request was lost; send the request again"
            return RequestError(message, status=503, type="service_unavailable", code="worker_lost")
        case NoWorkerError():
            message = f"{error}; try again in a moment"
            return RequestError(message, status=503, type="service_unavailable", code="no_worker")
        case RequestFailedError():
            return RequestError(f"the request failed: {error}", status=500, type="server_error", code="request_failed")
    return None


def shutting_down() -> RequestError:
    """The answer to a request that comes, or still runs, when the server goes away."""
    return RequestError("the server is shutting down", status=503, type="service_unavailable", code="shutting_down")


def unforeseen() -> RequestError:
    """The answer when something broke that nobody foresaw; the log has the details, the client does not."""
    message = "the server made an error; its log says more under this answer's x-request-id"
    return RequestError(message, status=500, type="server_error", code="internal_error")
