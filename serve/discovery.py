"""Where workers say that they are there, and fronts look for them.

A folder on one machine is enough for many processes: one file for each worker, replaced as a whole, touched every second. A
worker is gone when its file is, when the file was not touched for three seconds, or as soon as its process has ended. Clocks
of different machines are never compared: a watcher measures by its own how long a file has not changed.
"""

import asyncio
import errno
import logging
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from dynamo.serve.errors import ConfigError
from dynamo.serve.path_refusal import path_refusal
from dynamo.serve.process_identity import is_running, machine_id
from dynamo.serve.registration import Joined, Left, Registration
from dynamo.serve.registration_files import FILE_SUFFIX, Entry, FolderView, make_private, read_entry, write_entry

__all__ = ["Discovery", "FolderDiscovery", "Joined", "Left", "MemoryDiscovery", "Registered", "Registration"]

logger = logging.getLogger(__name__)

_SILENCE_S: Final = 3.0
_POLL_S: Final = 0.25
_WORKER_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class Registered(Protocol):
    """A worker's own registration, which it keeps up for as long as it takes requests."""

    async def close(self) -> None:
        """Takes the worker off. Idempotent."""
        ...


class Discovery(Protocol):
    """Workers register, fronts watch."""

    async def register(self, registration: Registration) -> Registered:
        """Says that a worker is there, from now until the result is closed or the process ends.

        Raises:
            ConfigError: its name is another worker's, or the place cannot be used.
        """
        ...

    def watch(self, known: Iterable[Registration] = ()) -> AsyncGenerator[Joined | Left, None]:
        """First the workers that are there, then every change. Never ends by itself.

        Args:
            known: workers that an earlier watch has told of: of these, only what has changed since is told.
        """
        ...


class MemoryDiscovery:
    """For workers of the same event loop."""

    def __init__(self) -> None:
        self._workers: dict[str, Registration] = {}
        self._watchers: list[asyncio.Queue[Joined | Left]] = []

    async def register(self, registration: Registration) -> Registered:
        """See `Discovery.register`."""
        _check_name(registration.worker_id)
        if registration.worker_id in self._workers:
            raise _name_taken(registration.worker_id)
        self.put(registration)
        return _MemoryEntry(self, registration.worker_id)

    async def watch(self, known: Iterable[Registration] = ()) -> AsyncGenerator[Joined | Left, None]:
        """See `Discovery.watch`."""
        queue: asyncio.Queue[Joined | Left] = asyncio.Queue()
        before = {registration.worker_id: registration for registration in known}
        for worker_id, registration in before.items():
            if self._workers.get(worker_id) != registration:
                queue.put_nowait(Left(worker_id, "it has left"))
        for worker_id, registration in self._workers.items():
            if before.get(worker_id) != registration:
                queue.put_nowait(Joined(registration))
        self._watchers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)

    def put(self, registration: Registration) -> None:
        """Registers a worker, or changes what is said of it."""
        self.remove(registration.worker_id)
        self._workers[registration.worker_id] = registration
        self._tell(Joined(registration))

    def remove(self, worker_id: str, reason: str = "it has left") -> None:
        """Takes a worker off, if it is there."""
        if self._workers.pop(worker_id, None) is not None:
            self._tell(Left(worker_id, reason))

    def _tell(self, change: Joined | Left) -> None:
        for queue in self._watchers:
            queue.put_nowait(change)


class _MemoryEntry:
    def __init__(self, discovery: MemoryDiscovery, worker_id: str) -> None:
        self._discovery = discovery
        self._worker_id = worker_id

    async def close(self) -> None:
        self._discovery.remove(self._worker_id)


class FolderDiscovery:
    """One JSON file for each worker in a folder of the user's own.

    Files of other names, of other users, unfinished ones, links and whatever else lies there is passed over.

    Args:
        folder: made where it is missing, for this user only.
        silence_s: a worker that does not keep its file up for so long is gone; it does so three times as often. The same for
            workers and fronts.

    Raises:
        ConfigError: the folder cannot be made, or others may write to it.
    """

    def __init__(self, folder: Path, *, silence_s: float = _SILENCE_S) -> None:
        self._folder = folder
        self._silence_s = silence_s
        try:
            make_private(folder)
            found = folder.stat()
        except OSError as error:
            raise ConfigError(f"--discovery {folder}: {path_refusal(folder, error, 'folder')}") from error
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o022:
            raise ConfigError(
                f"--discovery {folder} can be written to by other users, who could offer workers of theirs; "
                "choose one of your own, or chmod 700 it"
            )

    async def register(self, registration: Registration) -> Registered:
        """See `Discovery.register`."""
        _check_name(registration.worker_id)
        entry = _FolderEntry(self._folder, registration)
        await asyncio.to_thread(entry.begin)
        entry.beating = asyncio.create_task(entry.beat(self._silence_s / 3))
        return entry

    async def watch(self, known: Iterable[Registration] = ()) -> AsyncGenerator[Joined | Left, None]:
        """See `Discovery.watch`. Looks four times a second, and as soon as a worker's process has ended."""
        seen = FolderView(self._folder, silence_s=self._silence_s, poll_s=_POLL_S, known=known)
        look_now = asyncio.Event()
        with _ProcessEnds(look_now.set) as ends:
            while True:
                look_now.clear()
                found = await asyncio.to_thread(seen.read)
                for change in seen.update(found, asyncio.get_running_loop().time()):
                    yield change
                ends.watch(seen.local_pids)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await look_now.wait()


class _FolderEntry:
    """A worker's own file, and the task that touches it. Implements `Registered`."""

    def __init__(self, folder: Path, registration: Registration) -> None:
        self._path = folder / f"{registration.worker_id}{FILE_SUFFIX}"
        self._registration = registration
        self._machine = machine_id()
        self.beating: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """See `Registered.close`."""
        task, self.beating = self.beating, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        await asyncio.to_thread(self._remove)

    def begin(self) -> None:
        try:
            entry = read_entry(self._path)
        except OSError as error:
            raise ConfigError(f"--discovery {self._path.parent}: {path_refusal(self._path, error, 'read')}") from error
        if self._is_anothers(entry):
            raise _name_taken(self._registration.worker_id)
        try:
            make_private(self._path.parent)
            write_entry(self._path, self._registration)
        except OSError as error:
            raise ConfigError(f"--discovery {self._path.parent}: {path_refusal(self._path, error, 'write')}") from error

    async def beat(self, period_s: float) -> None:
        """Touches the file for ever."""
        trouble = ""
        while True:
            await asyncio.sleep(period_s)
            try:
                await asyncio.to_thread(self._touch, not trouble)
            except OSError as error:  # a full or vanished disk: fronts will miss this worker until it is well again
                if trouble != (trouble := str(error)):
                    logger.error("the registration %s cannot be kept up: %s", self._path, error)
            else:
                if trouble:
                    logger.info("the registration %s is kept up again", self._path)
                trouble = ""

    def _touch(self, is_loud: bool) -> None:
        entry = read_entry(self._path)
        if self._is_ours(entry):
            os.utime(self._path, follow_symlinks=False)
            return
        if self._is_anothers(entry):
            raise OSError(errno.EEXIST, "another worker of that name runs by now; restart this one")
        if is_loud:
            logger.warning("the registration %s was removed or replaced by somebody; it is written anew", self._path)
        make_private(self._path.parent)
        write_entry(self._path, self._registration)

    def _is_ours(self, entry: Entry | None) -> bool:
        return entry is not None and entry.registration.card.epoch == self._registration.card.epoch

    def _is_anothers(self, entry: Entry | None) -> bool:
        """Whether it is that of a process that runs, as far as can be seen from this machine."""
        if entry is None or entry.machine != self._machine:
            return False
        pid = entry.registration.pid
        return pid != self._registration.pid and is_running(pid, entry.started)

    def _remove(self) -> None:
        with suppress(OSError):
            if self._is_ours(read_entry(self._path)):
                self._path.unlink()


class _ProcessEnds:
    """Calls back on the event loop when one of the watched processes of this machine ends. A context manager."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._fds: dict[int, int] = {}

    def __enter__(self) -> "_ProcessEnds":
        return self

    def __exit__(self, *_: object) -> None:
        self.watch(set())

    def watch(self, pids: set[int]) -> None:
        """Watches these processes and no others. Where the kernel knows no pidfds, nobody is called; polling must do."""
        for pid in [*self._fds.keys() - pids]:
            fd = self._fds.pop(pid)
            self._loop.remove_reader(fd)
            os.close(fd)
        for pid in pids - self._fds.keys():
            with suppress(OSError):
                fd = self._fds[pid] = os.pidfd_open(pid)
                self._loop.add_reader(fd, self._tell, pid)

    def _tell(self, pid: int) -> None:
        self._loop.remove_reader(self._fds[pid])  # it stays readable
        self._ended()


def _check_name(worker_id: str) -> None:
    if _WORKER_ID.fullmatch(worker_id) is None:
        raise ConfigError(
            f"a worker cannot be named {worker_id!r}: names have 1 to 64 letters, digits, '.', '_' or '-', of which a "
            "letter or digit comes first"
        )


def _name_taken(worker_id: str) -> ConfigError:
    return ConfigError(f"a worker named {worker_id!r} is registered and runs; choose another name")
