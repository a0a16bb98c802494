"""`python -m dynamo.serve`, without the server: what becomes of its errors."""

import sys
from typing import NoReturn

import pytest

from dynamo.serve import lifecycle
from dynamo.serve.__main__ import main
from dynamo.serve.config import Config
from dynamo.serve.errors import ConfigError, EngineDeadError, ModelLoadError, ServeError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("--port 1 is wrong"), 2),
        (ModelLoadError("m/config.json is missing"), 2),
        (EngineDeadError("the engine's thread did not end within 30 s"), 1),
    ],
)
def test_errors_are_one_line_and_a_status(
    error: ServeError, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Config) -> NoReturn:
        raise error

    monkeypatch.setattr(lifecycle, "run_server", fail)
    monkeypatch.setattr(sys, "argv", ["dynamo.serve"])
    assert main() == status
    assert capsys.readouterr().err == f"error: {error}\n"
