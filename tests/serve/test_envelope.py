import msgspec
import pytest

from dynamo.serve.envelope import envelope, refusal_of
from dynamo.serve.errors import (
    EngineDeadError,
    EngineOverloadedError,
    NoWorkerError,
    RequestFailedError,
    ServeError,
    WorkerDrainingError,
    WorkerLostError,
)


@pytest.mark.parametrize(
    ("error", "status", "code", "message"),
    [
        (EngineOverloadedError("full"), 429, "engine_overloaded", "try again"),
        (EngineDeadError("gone"), 503, "engine_dead", "started again"),
        (WorkerLostError("worker-1", "its stream broke off"), 503, "worker_lost", "send the request again"),
        (WorkerDrainingError("worker-1", "it leaves"), 503, "worker_lost", "send the request again"),
        (NoWorkerError("none is there"), 503, "no_worker", "none is there"),
        (RequestFailedError("bad luck"), 500, "request_failed", "bad luck"),
    ],
)
def test_a_client_is_told_of_every_foreseen_error(error: ServeError, status: int, code: str, message: str) -> None:
    refusal = refusal_of(error)
    assert refusal is not None
    assert refusal.status == status
    told = msgspec.json.decode(envelope(refusal))["error"]
    assert told["code"] == code
    assert message in told["message"]


def test_of_an_unforeseen_one_the_envelope_knows_nothing() -> None:
    assert refusal_of(KeyError("a bug")) is None
