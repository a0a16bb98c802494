import asyncio
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo.router.workers import WorkerCard
from dynamo.serve.discovery import Discovery, FolderDiscovery, Joined, Left, MemoryDiscovery, Registration
from dynamo.serve.errors import ConfigError

WORKER = """
import asyncio, sys
from dynamo.router.workers import WorkerCard
from dynamo.serve.discovery import FolderDiscovery, Registration
from pathlib import Path
import os

async def main():
    card = WorkerCard(worker_id="child", epoch=1, model="m", fingerprint="00", hash_version=1, block_size=16)
    registration = Registration(card=card, address="unix:/x", pid=os.getpid())
    registered = await FolderDiscovery(Path(sys.argv[1]), silence_s=0.6).register(registration)
    await asyncio.to_thread(sys.stdin.read)
    await registered.close()

asyncio.run(main())
"""


def registration(worker_id: str = "worker-0", *, epoch: int = 1, **fields: Any) -> Registration:
    card = WorkerCard(worker_id=worker_id, epoch=epoch, model="m", fingerprint="00", hash_version=1, block_size=16)
    return Registration(**{"card": card, "address": "unix:/x", "pid": os.getpid(), **fields})


class Watch:
    """What a watcher hears."""

    def __init__(self) -> None:
        self.changes: list[Joined | Left] = []

    @property
    def there(self) -> set[str]:
        names = set()
        for change in self.changes:
            match change:
                case Joined(joined):
                    assert joined.worker_id not in names, "it joined twice"
                    names.add(joined.worker_id)
                case Left(worker_id):
                    names.remove(worker_id)
        return names

    async def until(self, there: set[str]) -> None:
        async with asyncio.timeout(8):
            while self.there != there:  # noqa: ASYNC110  # what is waited for is another's state
                await asyncio.sleep(0.005)


@asynccontextmanager
async def watching(discovery: Discovery, known: Iterable[Registration] = ()) -> AsyncIterator[Watch]:
    watch = Watch()

    async def listen() -> None:
        async for change in discovery.watch(known):
            watch.changes.append(change)

    task = asyncio.create_task(listen())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()


@pytest.fixture(params=["memory", "folder"])
def discovery(request: pytest.FixtureRequest, tmp_path: Path) -> Discovery:
    return MemoryDiscovery() if request.param == "memory" else FolderDiscovery(tmp_path / "fleet")


@pytest.fixture
def child(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has registered itself as "child"."""
    folder = tmp_path / "fleet"
    with subprocess.Popen([sys.executable, "-P", "-c", WORKER, str(folder)], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_workers_come_and_go(discovery: Discovery, run: Any) -> None:
    async def test() -> None:
        first = await discovery.register(registration("a", address="unix:/a", events="ipc:///e", key="secret"))
        async with watching(discovery) as watch, watching(discovery) as other:
            await watch.until({"a"})
            second = await discovery.register(registration("b"))
            await watch.until({"a", "b"})
            await first.close()
            await first.close()
            await watch.until({"b"})
            await second.close()
            await watch.until(set())
            await other.until(set())
        assert watch.changes[0] == Joined(registration("a", address="unix:/a", events="ipc:///e", key="secret"))
        async with watching(discovery) as late:
            again = await discovery.register(registration("a"))
            await late.until({"a"})
            await again.close()

    run(test())


def test_a_worker_that_registers_anew_leaves_and_joins(discovery: Discovery, run: Any) -> None:
    async def test() -> None:
        registered = await discovery.register(registration("a"))
        async with watching(discovery) as watch:
            await watch.until({"a"})
            await registered.close()
            registered = await discovery.register(registration("a", address="unix:/b"))
            await asyncio.wait_for(_until(lambda: len(watch.changes) == 3), 5)
            assert watch.changes[2] == Joined(registration("a", address="unix:/b"))
        await registered.close()

    run(test())


def test_who_looked_before_is_told_only_what_has_changed_since(discovery: Discovery, run: Any) -> None:
    async def test() -> None:
        names = ("stays", "changes", "leaves")
        registered = {name: await discovery.register(registration(name)) for name in names}
        async with watching(discovery) as watch:
            await watch.until({*names})
        known = [change.registration for change in watch.changes if isinstance(change, Joined)]
        changed, new = registration("changes", address="unix:/b"), registration("new")
        await registered["changes"].close()
        registered["changes"] = await discovery.register(changed)
        await registered.pop("leaves").close()
        registered["new"] = await discovery.register(new)
        async with watching(discovery, known) as later:
            await _until(lambda: len(later.changes) == 4)
            assert {change.worker_id for change in later.changes if isinstance(change, Left)} == {"changes", "leaves"}
            assert [change.registration for change in later.changes if isinstance(change, Joined)] == [changed, new]
            await registered.pop("stays").close()
            await _until(lambda: len(later.changes) == 5)
        for one in registered.values():
            await one.close()

    run(test())


def test_a_name_must_be_free_and_fit_for_a_file(discovery: Discovery, run: Any) -> None:
    async def test() -> None:
        for name in ("", "../a", "a/b", ".hidden", "a b", "x" * 65):
            with pytest.raises(ConfigError, match="cannot be named"):
                await discovery.register(registration(name))
        registered = await discovery.register(registration("a", pid=os.getppid()))
        with pytest.raises(ConfigError, match="'a' is registered and runs"):
            await discovery.register(registration("a", epoch=2))
        await registered.close()

    run(test())


def test_a_killed_worker_is_gone_at_once(tmp_path: Path, run: Any, child: "subprocess.Popen[bytes]") -> None:
    async def test() -> None:
        async with watching(FolderDiscovery(tmp_path / "fleet")) as watch:
            await watch.until({"child"})
            killed_s = time.monotonic()
            child.kill()
            await watch.until(set())
            assert time.monotonic() - killed_s < 1
            assert "its process has ended" in watch.changes[-1].reason  # type: ignore[union-attr]
            # What it left behind is in nobody's way.
            assert (tmp_path / "fleet" / "child.json").exists()
            registered = await FolderDiscovery(tmp_path / "fleet").register(registration("child", epoch=2))
            await watch.until({"child"})
            await registered.close()

    run(test())


def test_a_stopped_worker_is_gone_until_it_goes_on(tmp_path: Path, run: Any, child: "subprocess.Popen[bytes]") -> None:
    async def test() -> None:
        async with watching(FolderDiscovery(tmp_path / "fleet", silence_s=0.6)) as watch:
            await watch.until({"child"})
            child.send_signal(signal.SIGSTOP)
            await watch.until(set())
            assert "was not kept up" in watch.changes[-1].reason  # type: ignore[union-attr]
            child.send_signal(signal.SIGCONT)
            await watch.until({"child"})
            await asyncio.to_thread(child.communicate)
            await watch.until(set())
        assert list((tmp_path / "fleet").iterdir()) == []

    run(test())


def test_a_leftover_is_no_worker_until_it_is_kept_up(tmp_path: Path, run: Any) -> None:
    async def test() -> None:
        discovery = FolderDiscovery(tmp_path / "fleet")
        registered = await discovery.register(registration("a"))
        content = (tmp_path / "fleet" / "a.json").read_text()
        await registered.close()
        elsewhere = json.loads(content) | {"machine": "another"}
        path = write(tmp_path / "fleet" / "a.json", json.dumps(elsewhere))
        os.utime(path, (1, 1))
        here = await discovery.register(registration("b"))
        async with watching(discovery) as watch:
            await watch.until({"b"})
            os.utime(path)
            await watch.until({"a", "b"})
        await here.close()

    run(test())


def test_a_registration_that_was_removed_is_written_anew(
    tmp_path: Path, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        discovery = FolderDiscovery(tmp_path / "fleet", silence_s=0.6)
        registered = await discovery.register(registration("a"))
        async with watching(discovery) as watch:
            await watch.until({"a"})
            (tmp_path / "fleet" / "a.json").unlink()
            await _until(lambda: len(watch.changes) == 3 or "written anew" in caplog.text)
            await watch.until({"a"})
        await registered.close()

    run(test())
    assert "a.json was removed or replaced by somebody; it is written anew" in caplog.text


def test_a_worker_does_not_take_the_name_of_another_that_runs(
    tmp_path: Path, run: Any, caplog: pytest.LogCaptureFixture, child: "subprocess.Popen[bytes]"
) -> None:
    folder = tmp_path / "fleet"

    async def test() -> None:
        discovery = FolderDiscovery(folder, silence_s=0.15)
        path = folder / "child.json"
        await _until(path.exists)
        child.send_signal(signal.SIGSTOP)  # it runs, but writes nothing
        theirs = path.read_text()
        path.unlink()
        registered = await discovery.register(registration("child", epoch=2))
        write(folder / "new", theirs).replace(path)
        await _until(lambda: "another worker of that name runs" in caplog.text)
        await registered.close()
        assert path.read_text() == theirs

    run(test())
    assert "written anew" not in caplog.text


def test_registrations_come_back_when_their_folder_was_removed(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "deep" / "fleet"

    async def test() -> None:
        discovery = FolderDiscovery(folder, silence_s=0.3)
        shutil.rmtree(folder.parent)
        registered = [await discovery.register(registration(name)) for name in ("a", "b")]
        async with watching(discovery) as watch:
            await watch.until({"a", "b"})
            shutil.rmtree(folder.parent)
            await _until(lambda: (folder / "a.json").exists() and (folder / "b.json").exists())
            assert folder.stat().st_mode & 0o777 == 0o700
            async with watching(discovery) as later:
                await later.until({"a", "b"})
            await watch.until({"a", "b"})
            await registered[0].close()
            await watch.until({"b"})
        await registered[1].close()

    run(test())


def test_a_registration_that_cannot_be_written_is_told_once_and_written_when_it_can(
    tmp_path: Path, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "fleet"

    async def test() -> None:
        registered = await FolderDiscovery(folder, silence_s=0.15).register(registration("a"))
        folder.rename(tmp_path / "gone")
        folder.touch()
        await _until(lambda: "cannot be kept up" in caplog.text)
        await asyncio.sleep(0.3)
        folder.unlink()
        await _until(lambda: "is kept up again" in caplog.text)
        assert (folder / "a.json").exists()
        await registered.close()

    run(test())
    assert len(caplog.records) == 3


def test_a_full_disk_is_told_and_leaves_no_pieces(tmp_path: Path, run: Any) -> None:
    async def test() -> None:
        discovery = FolderDiscovery(tmp_path / "fleet")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            with pytest.raises(ConfigError, match=r"^--discovery .*: File too large; see to that"):
                await discovery.register(registration("a"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list((tmp_path / "fleet").iterdir()) == []

    run(test())


def test_what_is_no_registration_is_passed_over(tmp_path: Path, run: Any) -> None:
    async def test() -> None:
        folder = tmp_path / "fleet"
        discovery = FolderDiscovery(folder)
        registered = await discovery.register(registration("good"))
        content = (folder / "good.json").read_text()
        elsewhere = tmp_path / "elsewhere.json"
        write(elsewhere, content.replace('"good"', '"linked"'))
        (folder / "linked.json").symlink_to(elsewhere)
        write(folder / "torn.json", content.replace('"good"', '"torn"')[:-20])
        write(folder / "renamed.json", content)
        write(folder / "others.json", content.replace('"good"', '"others"')).chmod(0o666)
        write(folder / "large.json", content.replace('"good"', '"large"') + 70_000 * " ")
        write(folder / "noise.json", "\x00\xff")
        write(folder / "bytes.json", content.replace('"good"', '"bytes"').replace('"m"', '"\xff"'))
        write(folder / "deep.json", '{"deep":' + 20_000 * "[" + 20_000 * "]" + "}")
        write(folder / "text.txt", content)
        (folder / "folder.json").mkdir()
        os.mkfifo(folder / "pipe.json")
        async with watching(discovery) as watch:
            await watch.until({"good"})
            last = await discovery.register(registration("last"))
            await watch.until({"good", "last"})
            await last.close()
        await registered.close()

    run(test())


def test_registrations_are_their_owners_alone(tmp_path: Path, run: Any) -> None:
    async def test() -> None:
        folder = tmp_path / "fleet"
        registered = await FolderDiscovery(folder).register(registration("a", key="secret"))
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "a.json").stat().st_mode & 0o777 == 0o600
        await registered.close()

    run(test())
    assert "secret" not in repr(registration("a", key="secret"))


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        FolderDiscovery(open_folder)
    write(tmp_path / "file", "")
    with pytest.raises(ConfigError, match=f"^--discovery {tmp_path}/file: this is no folder; give another path"):
        FolderDiscovery(tmp_path / "file")


def test_a_front_that_stood_still_does_not_take_its_workers_for_gone(
    tmp_path: Path, run: Any, child: "subprocess.Popen[bytes]"
) -> None:
    async def test() -> None:
        discovery = FolderDiscovery(tmp_path / "fleet", silence_s=0.9)
        async with watching(discovery) as watch:
            await watch.until({"child"})
            stand_still(1.5)
            for _ in range(3):
                await asyncio.sleep(0.3)
            assert len(watch.changes) == 1

    run(test())


def test_a_front_that_cannot_look_does_not_take_its_workers_for_gone(
    tmp_path: Path, run: Any, child: "subprocess.Popen[bytes]", caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def test() -> None:
        discovery = FolderDiscovery(tmp_path / "fleet", silence_s=0.6)
        async with watching(discovery) as watch:
            await watch.until({"child"})
            with no_free_descriptors():
                await asyncio.sleep(1.5)
                assert len(watch.changes) == 1
            await _until(lambda: "can be read again" in caplog.text)
            child.send_signal(signal.SIGSTOP)
            await watch.until(set())

    run(test())
    assert caplog.text.count("cannot be read") == 1


@contextmanager
def no_free_descriptors() -> Iterator[None]:
    """As where a process has more clients than it may have open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def stand_still(seconds: float) -> None:
    """Holds up the whole event loop, as SIGSTOP would."""
    time.sleep(seconds)


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode("latin-1"))
    return path


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for is another's state
        await asyncio.sleep(0.005)


def test_replacing_a_worker_tells_of_both(tmp_path: Path, run: Any) -> None:
    async def test() -> None:
        discovery = FolderDiscovery(tmp_path / "fleet")
        first = await discovery.register(registration("a", epoch=1))
        async with watching(discovery) as watch:
            await watch.until({"a"})
            second = await discovery.register(replace(registration("a", epoch=2)))
            await _until(lambda: len(watch.changes) == 3)
            assert isinstance(watch.changes[1], Left)
            joined = watch.changes[2]
            assert isinstance(joined, Joined)
            assert joined.registration.card.epoch == 2
        await second.close()
        await first.close()

    run(test())
