"""Host memory shared out among processes."""

import errno
import fcntl
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.tiers.errors import TierConfigError, TierMemoryError
from dynamo.tiers.host_budget import DEFAULT_SHARE, Holder, HostBudget
from dynamo.tiers.memory import memory_limit_bytes

TIMEOUT_S = 30
LIMIT = 10 << 30

# Says whether its reservation was granted, and then for each size that it reads whether it got that; ends with its input.
OWNER = """
import sys
from pathlib import Path
from dynamo.tiers.errors import TierMemoryError
from dynamo.tiers.host_budget import HostBudget
print("ready", flush=True)
sys.stdin.readline()
try:
    kept = HostBudget(Path(sys.argv[1]), int(sys.argv[2])).reserve(int(sys.argv[3]), sys.argv[4])
except TierMemoryError as error:
    print("refused", flush=True)
else:
    print("granted", flush=True)
    for line in sys.stdin:
        try:
            kept.resize(int(line))
        except TierMemoryError as error:
            print("refused", flush=True)
        else:
            print("grown", flush=True)
"""

# Keeps all others from counting.
HOLDER = """
import sys
from pathlib import Path
from dynamo.tiers.host_budget import HostBudget
with HostBudget(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


class Owner:
    """Another process that reserves."""

    def __init__(self, folder: Path, num_bytes: int, purpose: str = "another cache", script: str = OWNER) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", script, str(folder), str(LIMIT), str(num_bytes), purpose],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def say(self) -> str:
        out = self.process.stdout
        assert out is not None
        assert select.select([out], [], [], TIMEOUT_S)[0], "the other process says nothing"
        return out.readline().decode().strip()

    def go(self, num_bytes: int | None = None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n" if num_bytes is None else b"%d\n" % num_bytes)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "budget"


@pytest.fixture
def owners(folder: Path) -> Iterator[list[Owner]]:
    started: list[Owner] = []
    yield started
    for owner in started:
        owner.close()


def test_what_does_not_fit_is_refused_with_who_holds_what(folder: Path) -> None:
    budget = HostBudget(folder, LIMIT)
    first, second = budget.reserve(6 << 30, "the host tier"), budget.reserve(1 << 30, "scratch")
    with pytest.raises(TierMemoryError) as caught:
        budget.reserve(4 << 30, "a benchmark")
    assert str(caught.value) == (
        "a benchmark needs 4.00 GiB, but of the 10.00 GiB that KV caches may take on this machine 3.00 GiB are left "
        f"(process {os.getpid()} holds 6.00 GiB for the host tier; process {os.getpid()} holds 1.00 GiB for scratch); "
        "make it smaller, or end or shrink one of those"
    )
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (4 << 30, 3 << 30)
    first.close()
    first.close()
    budget.reserve(4 << 30, "a benchmark").close()
    assert budget.holders() == [Holder(os.getpid(), 1 << 30, "scratch")]
    second.close()


def test_a_reservation_grows_within_the_budget_and_shrinks(folder: Path) -> None:
    budget = HostBudget(folder, LIMIT)
    one, other = budget.reserve(4 << 30, "one"), budget.reserve(4 << 30, "other")
    with pytest.raises(TierMemoryError, match=r"2\.00 GiB|6\.00 GiB are left"):
        one.resize(7 << 30)
    assert one.num_bytes == 4 << 30
    one.resize(6 << 30)
    with pytest.raises(TierMemoryError):
        other.resize((4 << 30) + 1)
    one.resize(1 << 30)
    other.resize(9 << 30)
    assert [(holder.purpose, holder.num_bytes) for holder in budget.holders()] == [("other", 9 << 30), ("one", 1 << 30)]
    one.close()
    other.close()


def test_a_killed_owner_leaves_nothing_behind(folder: Path, owners: list[Owner]) -> None:
    owner = Owner(folder, 9 << 30)
    owners.append(owner)
    assert owner.say() == "ready"
    owner.go()
    assert owner.say() == "granted"
    budget = HostBudget(folder, LIMIT)
    with pytest.raises(TierMemoryError, match=f"process {owner.process.pid} holds 9.00 GiB for another cache"):
        budget.reserve(2 << 30, "mine")
    owner.kill()
    budget.reserve(9 << 30, "mine").close()
    assert budget.holders() == []
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_of_many_that_start_at_once_only_as_many_as_fit_get_memory(folder: Path, owners: list[Owner]) -> None:
    owners += [Owner(folder, 3 << 30) for _ in range(6)]
    assert [owner.say() for owner in owners] == ["ready"] * 6
    for owner in owners:
        owner.go()
    assert sorted(owner.say() for owner in owners) == ["granted"] * 3 + ["refused"] * 3
    assert sum(holder.num_bytes for holder in HostBudget(folder, LIMIT).holders()) == 9 << 30


def test_of_two_that_grow_at_once_only_the_one_that_fits_gets_memory(folder: Path, owners: list[Owner]) -> None:
    owners += [Owner(folder, 4 << 30) for _ in range(2)]
    for owner in owners:
        assert owner.say() == "ready"
        owner.go()
    assert [owner.say() for owner in owners] == ["granted"] * 2
    for owner in owners:
        owner.go(6 << 30)
    assert sorted(owner.say() for owner in owners) == ["grown", "refused"]
    assert [holder.num_bytes for holder in HostBudget(folder, LIMIT).holders()] == [6 << 30, 4 << 30]


def test_while_another_process_keeps_one_from_counting_nothing_grows_or_starts(
    folder: Path, owners: list[Owner], caplog: pytest.LogCaptureFixture
) -> None:
    budget = HostBudget(folder, LIMIT, lock_timeout_s=0.05)
    kept = budget.reserve(4 << 30, "the host tier")
    holder = Owner(folder, 0, script=HOLDER)
    owners.append(holder)
    assert holder.say() == "locked"
    why = (
        f"process {holder.process.pid} has held {folder / 'lock'} for longer than 0.05 s; continue or end that process"
    )
    with pytest.raises(TierMemoryError) as caught:
        kept.resize(6 << 30)
    assert str(caught.value) == (
        "the host tier cannot grow from 4.00 GiB to 6.00 GiB: how much KV caches take on this machine cannot be counted now "
        f"({why}); try again when that has changed"
    )
    assert kept.num_bytes == 4 << 30
    with pytest.raises(TierMemoryError, match=r"a benchmark needs 1\.00 GiB, and .* cannot be counted now: process"):
        budget.reserve(1 << 30, "a benchmark")
    kept.resize(3 << 30)  # less needs no leave; the others learn of it late
    assert kept.num_bytes == 3 << 30
    assert "other processes do not see yet that the host tier takes only 3.00 GiB now" in caplog.text
    holder.kill()
    assert [entry.num_bytes for entry in budget.holders()] == [4 << 30]
    kept.resize(6 << 30)
    assert [entry.num_bytes for entry in budget.holders()] == [6 << 30]
    kept.close()


def test_a_reservation_whose_file_was_deleted_is_made_anew_when_it_changes(folder: Path) -> None:
    budget = HostBudget(folder, LIMIT)
    kept = budget.reserve(4 << 30, "the host tier")
    shutil.rmtree(folder)
    assert budget.holders() == ()
    kept.resize(5 << 30)
    assert [entry.num_bytes for entry in budget.holders()] == [5 << 30]
    with pytest.raises(TierMemoryError):
        budget.reserve(6 << 30, "another")
    kept.close()
    assert budget.holders() == []


def fill_up(patch: pytest.MonkeyPatch, suffix: str = "") -> None:
    """From now on there is no space to write into files of this suffix, though they can still be made."""
    write = os.pwrite

    def refuse(fd: int, data: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(suffix):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    patch.setattr(os, "pwrite", refuse)


@pytest.mark.parametrize("suffix", ["", ".reservation"], ids=["nothing fits", "the lock's owner fits"])
def test_without_space_for_reservations_nothing_is_handed_out_and_nothing_is_left_behind(
    folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = HostBudget(folder, LIMIT)
    num_descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        fill_up(patch, suffix)
        with pytest.raises(
            TierMemoryError,
            match=rf"x needs 1\.00 GiB, and .* cannot be counted now: .*No space left on device: .*{folder}",
        ):
            budget.reserve(1 << 30, "x")
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert len(os.listdir("/proc/self/fd")) == num_descriptors
    with pytest.raises(TierMemoryError, match=r"of the 10\.00 GiB"):
        budget.reserve(1 << 40, "more than there is")
    budget.reserve(LIMIT, "all").close()


def test_a_reservation_that_cannot_be_made_anew_for_want_of_space_does_not_grow_and_keeps_nobody_from_counting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    budget = HostBudget(folder, LIMIT)
    kept = budget.reserve(4 << 30, "the host tier")
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        fill_up(patch, ".reservation")
        with pytest.raises(TierMemoryError, match=r"cannot grow from 4\.00 GiB to 5\.00 GiB: .*No space left"):
            kept.resize(5 << 30)
        assert kept.num_bytes == 4 << 30
        kept.resize(3 << 30)
    assert "do not see yet that the host tier takes only 3.00 GiB" in caplog.text
    assert budget.holders() == []
    kept.resize(5 << 30)
    assert [entry.num_bytes for entry in budget.holders()] == [5 << 30]
    kept.close()


def test_while_a_live_reservation_cannot_be_read_nothing_grows_or_starts(folder: Path) -> None:
    budget = HostBudget(folder, LIMIT)
    kept = budget.reserve(4 << 30, "the host tier")
    with (folder / "0.reservation").open("w") as unreadable:
        fcntl.flock(unreadable, fcntl.LOCK_EX)
        with pytest.raises(TierMemoryError, match=r"x needs 1\.00 GiB, and .*0\.reservation is no reservation"):
            budget.reserve(1 << 30, "x")
        with pytest.raises(TierMemoryError, match=r"is no reservation .* end the process that holds it"):
            kept.resize(5 << 30)
        kept.resize(3 << 30)
    budget.reserve(7 << 30, "x").close()
    kept.close()


def test_a_process_without_descriptors_to_spare_gets_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(TierMemoryError, match="Too many open files"):
            HostBudget(folder, LIMIT).reserve(1 << 30, "x")


def test_files_are_for_this_user_only(folder: Path) -> None:
    reservation = HostBudget(folder, LIMIT).reserve(1, "x")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    reservation.close()


@pytest.mark.parametrize("what", ["file", "writable"])
def test_a_folder_that_cannot_be_trusted_is_logged_and_not_used(
    folder: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    budget = HostBudget(folder, LIMIT)
    with caplog.at_level(logging.WARNING):
        reservation = budget.reserve(99 << 30, "x")
    assert "not shared out with other processes" in caplog.text
    reservation.resize(5)
    reservation.close()


def test_the_default_budget_is_a_share_of_the_memory() -> None:
    total_bytes = memory_limit_bytes()
    assert total_bytes is not None
    assert HostBudget().limit_bytes == int(DEFAULT_SHARE * total_bytes)


def test_an_empty_budget_is_refused(folder: Path) -> None:
    with pytest.raises(TierConfigError, match="0 bytes"):
        HostBudget(folder, 0)


def test_looking_makes_no_folder(folder: Path) -> None:
    assert HostBudget(folder, LIMIT).holders() == ()
    assert not folder.exists()
