"""How worker processes end with the process that started them, however that one ended.

The parent keeps the writing end of a pipe and its children inherit the reading end: when the parent is gone, even by
SIGKILL, the kernel closes its end and the children read that there will be nothing. Unlike prctl(PR_SET_PDEATHSIG) this does
not hang on the thread that started the child, and it leaves no moment between the start and the first look.
"""

import os
import signal
import threading
import time
from collections.abc import MutableMapping
from types import TracebackType
from typing import Self

__all__ = ["LIFELINE_VARIABLE", "Lifeline", "hold_on"]

LIFELINE_VARIABLE = "DYNAMO_LIFELINE_FD"
"""Environment variable that tells a child the number of the descriptor it inherited."""


class Lifeline:
    """The parent's side; cut by `close`, or when the process ends.

    Attributes:
        child_fd: what children inherit, to be named to them by `LIFELINE_VARIABLE`.
    """

    def __init__(self) -> None:
        self.child_fd, self._fd = os.pipe()  # children inherit neither unless told to

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cuts it. Once only."""
        os.close(self._fd)
        os.close(self.child_fd)


def hold_on(grace_s: float, environ: MutableMapping[str, str] = os.environ) -> None:
    """In a child: has this process get SIGTERM when the parent is gone, and end at once if that took longer than `grace_s`.

    Without a parent that holds a lifeline nothing happens. The variable is removed, as it means nothing to grandchildren.
    """
    number = environ.pop(LIFELINE_VARIABLE, "")
    if not number:
        return
    fd = int(number)
    os.set_inheritable(fd, False)
    threading.Thread(target=_watch, args=(fd, grace_s), name="dynamo-lifeline", daemon=True).start()


def _watch(fd: int, grace_s: float) -> None:
    while os.read(fd, 1):  # nothing is ever written
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)
