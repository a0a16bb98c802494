"""Another project, measured in an interpreter of its own: a script that answers one JSON value per line."""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.interrupts import put_off

__all__ = ["PeerProcess"]


class PeerProcess:
    """The script's process. Its standard output carries answers, one line each; what it says on standard error explains
    its end. Owns the process, which `close` ends.

    Attributes:
        hello: its first answer, sent when it is ready.
    """

    def __init__(
        self,
        project: str,
        module: str,
        flag: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 120.0,
    ) -> None:
        """Starts it and waits for its first answer.

        Args:
            project: its name, for messages.
            module: what its interpreter must be able to import.
            flag: the option that named the interpreter.
            command: interpreter, script, arguments.
            environment: added to this process's; PYTHON* variables are left out.
            timeout_s: for each answer.

        Raises:
            BenchmarkError: it does not start, ends, or says nothing for too long.
        """
        self._project, self._module, self._timeout_s = project, module, timeout_s
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._errors: list[str] = []
        self._drain = threading.Thread(target=self._keep_errors, daemon=True)
        with contextlib.ExitStack() as undo:
            with put_off():  # until there is what `close` ends
                try:
                    self._process = subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | dict(environment or {}),
                    )
                except OSError as error:
                    raise BenchmarkError(f"{flag} {command[0]} does not start: {error}") from error
                self._drain.start()
                undo.callback(self.close)
            self.hello: Any = self._reply()
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, order: Any) -> Any:
        """Sends one JSON value and returns the answer.

        Raises:
            BenchmarkError: the process has ended, or says nothing for too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply that does not come tells why
        return self._reply()

    def close(self) -> None:
        """Ends the process. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # an order that it did not read any more

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        deadline = threading.Timer(self._timeout_s, self._process.kill)
        deadline.start()
        try:
            line = self._process.stdout.readline()
        finally:
            deadline.cancel()
        if not line:
            self._process.wait()
            self._drain.join()
            said = self._errors[-1].strip() if self._errors else f"no answer in {self._timeout_s:.0f} s"
            raise BenchmarkError(
                f"the {self._project} peer ended: {said}. Does this interpreter run `import {self._module}`?"
            )
        return json.loads(line)

    def _keep_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors = [*self._errors[-9:], line] if line.strip() else self._errors
