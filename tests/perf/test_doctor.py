"""The examination of a configuration."""

import argparse
import contextlib
import ctypes
import fcntl
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dynamo.kvcache.config import format_size
from dynamo.perf import doctor, doctor_disk
from dynamo.perf.__main__ import main
from dynamo.perf.doctor_facts import (
    Mount,
    Pages,
    cuda_driver,
    importable,
    lock_holder,
    lock_limit_bytes,
    memory_pages,
    mount_of,
    nearest_folder,
)
from dynamo.perf.doctor_findings import Findings
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.report import Report
from dynamo.serve.config import SECTIONS
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host_budget import HostBudget
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.namespace import held_bytes

QUIET = Console(file=io.StringIO())
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # see capabilities(7)


def examine(*arguments: str) -> Report:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args([*arguments, "--size", "16MiB"]), QUIET)


def test_every_tier_is_told_with_its_path_and_speed(tmp_path: Path) -> None:
    report = examine("--disk-cache", f"{tmp_path / 'new' / 'kv'}:64MiB", "--host-cache", "32MiB", "--device", "cpu")
    text = "\n".join(report.epilogue)
    for fact in (
        "memory:",
        "ulimit -l",
        "huge pages:",
        "versions:",
        "kvikio:",
        "ucxx:",
        "CUDA:",
        "host tier:",
        "free,",
    ):
        assert fact in text
    assert "does not exist yet; measured in" in text
    assert "GPUDirect Storage:" in text
    assert "to cpu: two hops through host memory: no CUDA device" in text
    cases = {result.case for result in report.results}
    assert {"host tier", "device tier", "2 MiB blocks"} >= cases >= {"host tier", "device tier"}
    assert all(result.value > 0 for result in report.results)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert str(tmp_path) not in str(report.parameters) + str(report.notes) + str(report.results)


def test_the_exit_status_says_whether_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["doctor", "--size", "16MiB", "--disk-cache", "off", "--device", "cpu"]
    assert main([*common, "--host-cache", "1MiB"]) == 0
    assert "PROBLEM" not in capsys.readouterr().out
    assert main([*common, "--host-cache", "1000000GiB"]) == 1
    assert "PROBLEM: --host-cache 9.537e+05 TiB is more than" in capsys.readouterr().out.replace("976.6", "9.537e+05")


def test_a_capacity_beyond_the_free_space_is_a_problem(tmp_path: Path) -> None:
    report = examine("--disk-cache", f"{tmp_path}:1000000GiB", "--host-cache", "0", "--device", "cpu")
    assert report.exit_status == 1
    assert any(line.startswith("PROBLEM: --disk-cache asks for") for line in report.epilogue)


def test_a_budget_that_cannot_be_counted_is_a_problem_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "budget").write_text("somebody's file")
    monkeypatch.setattr(doctor, "HostBudget", lambda: HostBudget(tmp_path / "budget"))
    report = examine("--disk-cache", "off", "--host-cache", "1MiB", "--device-cache", "1MiB", "--device", "cpu")
    assert any("PROBLEM: what KV caches hold of their budget cannot be counted" in line for line in report.epilogue)


def test_a_file_in_the_place_of_a_directory_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "kv"):
        report = examine("--disk-cache", f"{place}:64MiB", "--host-cache", "0", "--device", "cpu")
        assert f"PROBLEM: {tmp_path / 'file'} is no folder" in "\n".join(report.epilogue)
        assert report.exit_status == 1


EXAMINATION = """
import sys
import torch
from dynamo.kvcache.config import parse_disk_place
from dynamo.perf.doctor_disk import examine_disk
from dynamo.perf.doctor_findings import Findings
for place in sys.argv[1:]:
    findings = Findings()
    place = parse_disk_place(place)
    list(examine_disk(place, [place], 1, 16 << 20, torch.device("cpu"), findings, keeps_in_host=False))
    print(*[line for line in findings.lines() if line.startswith("PROBLEM")])
"""


def test_a_folder_without_permission_is_a_problem_and_ends_nothing(tmp_path: Path) -> None:
    def obey() -> None:  # permissions of files hold for root too
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)

    prctl = ctypes.CDLL(None).prctl
    closed, unreadable = tmp_path / "closed", tmp_path / "unreadable"
    closed.mkdir(mode=0o000)
    unreadable.mkdir(mode=0o300)
    places = [f"{place}:64MiB" for place in (closed, closed / "new" / "kv", unreadable)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", EXAMINATION, *places],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=obey if os.geteuid() == 0 else None,
        check=False,
    )
    closed.chmod(0o700)
    unreadable.chmod(0o700)
    told = done.stdout.splitlines()
    assert len(told) == 3, done.stderr
    assert all(line.startswith(f"PROBLEM: this user may not write to {closed}: give it the") for line in told[:2])
    assert re.match(f"PROBLEM: what is free in {unreadable} .* cannot be told: .*Permission denied", told[2])


def keep_blocks(*directories: Path) -> int:
    """Opens a disk tier in each, as a server would, and closes it. Returns the bytes they hold together."""
    for directory in directories:
        DiskTier.open(directory, BlockLayout(3, 4, 2, 10, 4), 1 << 20, b"model-a.").close()
    return sum(held_bytes(directory) for directory in directories)


@pytest.mark.parametrize(
    ("flags", "below"),
    [
        (["--workers", "2"], ["worker-0", "worker-1"]),
        (["--engine", "mocker"], ["mocker"]),
        (["--workers", "2", "--engine", "mocker"], ["worker-0/mocker", "worker-1/mocker"]),
        ([], ["."]),
    ],
    ids=["workers", "mocker", "mocked workers", "one process"],
)
def test_blocks_of_all_the_servers_processes_are_counted(tmp_path: Path, flags: list[str], below: list[str]) -> None:
    places = [tmp_path / name for name in below]
    held = keep_blocks(*places)
    assert held > 0
    with contextlib.closing(DiskTier.open(places[0], BlockLayout(3, 4, 2, 10, 4), 1 << 20, b"model-a.")):
        report = examine(*flags, "--disk-cache", f"{tmp_path}:64MiB", "--host-cache", "0", "--device", "cpu")
    text = "\n".join(report.epilogue)
    assert re.search(rf"{tmp_path}: .* free, {format_size(held)} taken by KV blocks already", text)
    assert f"models with blocks here: {len(below)}, in use now: 1" in text
    assert "no tier of this configuration" not in text


def test_what_all_workers_may_take_together_is_held_against_the_free_space(tmp_path: Path) -> None:
    capacity_bytes = shutil.disk_usage(tmp_path).free * 2 // 3
    place = ("--disk-cache", f"{tmp_path}:{capacity_bytes}", "--host-cache", "0", "--device", "cpu")
    assert not any("--disk-cache asks for" in line for line in examine(*place).epilogue)
    report = examine(*place, "--workers", "2")
    assert any(f"--disk-cache asks for {format_size(2 * capacity_bytes)}" in line for line in report.epilogue)


def test_blocks_that_are_not_the_configurations_own_are_told_apart(tmp_path: Path) -> None:
    held, worker = keep_blocks(tmp_path / "alice"), tmp_path / "alice"
    place = ("--disk-cache", f"{tmp_path}:64MiB", "--host-cache", "0", "--device", "cpu")
    text = "\n".join(examine(*place).epilogue)
    assert re.search(rf"{tmp_path}: .* free, 0 B taken by KV blocks already", text)
    nobodys = "which no tier of this configuration gives up; a worker would that is started with --worker-id alice"
    assert f"{worker}: {format_size(held)} taken by KV blocks, {nobodys}" in text
    with contextlib.closing(DiskTier.open(worker, BlockLayout(3, 4, 2, 10, 4), 1 << 20, b"model-a.")):
        text = "\n".join(examine(*place).epilogue)
    assert f"taken by KV blocks, of process {os.getpid()}, which has its disk tier there" in text


def test_user_data_is_left_alone(tmp_path: Path) -> None:
    model = tmp_path / "0123456789abcdef"
    model.mkdir()
    for name in ("LOCK", "journal.log", "blocks.dat"):
        (model / name).write_bytes(name.encode())
    with (model / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = examine("--disk-cache", f"{tmp_path}:64MiB", "--host-cache", "0", "--device", "cpu")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == {
        name: name.encode() for name in ("LOCK", "journal.log", "blocks.dat")
    }
    assert list(tmp_path.iterdir()) == [model]
    text = "\n".join(report.epilogue)
    assert f"process {os.getpid()} uses {model}" in text
    assert "models with blocks here: 1, in use now: 1" in text


def test_the_servers_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        '[cache]\ndisk_cache = "off"\nhost_cache = "1MiB"\ndevice_cache = "2MiB"\n[model]\ndevice = "cpu"\n'
    )
    report = examine("--config", str(file))
    assert any("host tier is smaller than the device tier" in line for line in report.epilogue)
    with pytest.raises(BenchmarkError, match=r"unknown key cache\.hots"):
        file.write_text("[cache]\nhots = 1\n")
        examine("--config", str(file))


def test_too_little_to_measure_is_refused() -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    with pytest.raises(BenchmarkError, match="give 16 MiB"):
        doctor.run(parser.parse_args(["--size", "1MiB"]), QUIET)


def test_all_cache_options_of_the_server_are_taken() -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    text = parser.format_help()
    assert all(str(entry.flag) in text for entry in SECTIONS["cache"])


@pytest.mark.parametrize(
    ("mount", "advice"),
    [
        (Mount(Path("/x"), "ext4", "sda1", "rw", "rotating"), "sda1 rotates"),
        (Mount(Path("/x"), "tmpfs", "tmpfs", "rw", "no block device"), "is memory"),
        (Mount(Path("/x"), "nfs4", "host:/x", "rw", "no block device"), "goes through other software"),
        (Mount(Path("/x"), "fuse.sshfs", "host:/x", "rw", "no block device"), "goes through other software"),
        (Mount(Path("/x"), "xfs", "nvme0n1", "rw,sync", "NVMe"), "mounted with sync"),
        (Mount(Path("/x"), "xfs", "nvme0n1", "rw,noatime", "NVMe"), None),
        (Mount(Path("/x"), "ext4", "vda", "rw", "virtual"), None),
    ],
)
def test_what_a_disk_is_not_good_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: Mount, advice: str | None
) -> None:
    monkeypatch.setattr(doctor_disk, "mount_of", lambda _: mount)
    report = examine("--disk-cache", f"{tmp_path}:64MiB", "--host-cache", "0", "--device", "cpu")
    sentences = [
        line for line in report.epilogue if line.startswith("advice") and (str(mount.folder) in line or advice)
    ]
    if advice is None:
        assert not any("rotates" in line or "sync" in line for line in report.epilogue if line.startswith("advice"))
    else:
        assert any(advice in line for line in sentences)


def test_too_little_space_to_measure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor_disk.shutil, "disk_usage", lambda _: real._replace(free=1 << 20))
    report = examine("--disk-cache", f"{tmp_path}:64MiB", "--host-cache", "0", "--device", "cpu")
    assert any("too little space is free" in line for line in report.epilogue)
    assert not [result for result in report.results if result.case == "2 MiB blocks"]


def test_findings_end_with_what_to_change() -> None:
    findings = Findings()
    findings.say("disk", "there")
    findings.say("", "fast")
    assert findings.lines()[1:3] == ["disk:                 there", "                      fast"]
    assert findings.lines()[-1] == "nothing to change"
    findings.problem("broken; mend it")
    findings.advise("slow; hurry")
    assert findings.lines()[-2:] == ["advice: slow; hurry", "PROBLEM: broken; mend it"]
    assert findings.has_problems


# --- facts, from made-up system folders


MOUNTINFO = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard
23 22 0:30 / /proc rw - proc proc rw
24 22 259:2 / {base}/data\\040disk rw,noatime - xfs /dev/nvme0n1p1 rw,attr2
25 22 8:1 / {base}/old rw - ext4 /dev/sda1 rw
26 25 0:40 / {base}/old rw - tmpfs tmpfs rw,size=1k
"""


@pytest.fixture
def system(tmp_path: Path) -> tuple[Path, Path]:
    """A procfs and a sysfs with a virtual disk, an NVMe partition, and a rotating disk hidden by a tmpfs."""
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(MOUNTINFO.format(base=tmp_path))
    (sys / "dev/block").mkdir(parents=True)
    for number, name, partition in (
        ("254:1", "vda", "vda1"),
        ("259:2", "nvme0n1", "nvme0n1p1"),
        ("8:1", "sda", "sda1"),
    ):
        folder = sys / "devices" / name / partition
        folder.mkdir(parents=True)
        (folder / "partition").write_text("1\n")
        (folder.parent / "queue").mkdir()
        (folder.parent / "queue" / "rotational").write_text("1\n")
        (sys / "dev/block" / number).symlink_to(folder)
    return proc, sys


def test_a_folder_lies_on_the_nearest_mount(tmp_path: Path, system: tuple[Path, Path]) -> None:
    for name in ("data disk", "old", "elsewhere"):
        (tmp_path / name / "kv").mkdir(parents=True)
    found = {name: mount_of(tmp_path / name / "kv", *system) for name in ("data disk", "old", "elsewhere")}
    assert found["data disk"] == Mount(tmp_path / "data disk", "xfs", "nvme0n1p1", "rw,noatime,rw,attr2", "NVMe")
    assert found["old"] == Mount(tmp_path / "old", "tmpfs", "tmpfs", "rw,rw,size=1k", "no block device")
    assert found["elsewhere"] == Mount(Path("/"), "ext4", "vda1", "rw,relatime,rw,discard", "virtual")


def test_a_rotating_disk_is_known(tmp_path: Path, system: tuple[Path, Path]) -> None:
    proc, _ = system
    lines = (proc / "self" / "mountinfo").read_text().splitlines(keepends=True)
    (proc / "self" / "mountinfo").write_text("".join(lines[:-1]))
    (tmp_path / "old").mkdir()
    mount = mount_of(tmp_path / "old", *system)
    assert mount is not None
    assert (mount.device, mount.kind) == ("sda1", "rotating")


def test_huge_pages_are_read_from_the_system(tmp_path: Path) -> None:
    assert memory_pages(tmp_path, tmp_path) == Pages(None, 0, 0)
    folder = tmp_path / "kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "meminfo").write_text("HugePages_Total:      12\nHugePages_Free:        3\nHugepagesize: 2048 kB\n")
    assert memory_pages(tmp_path, tmp_path) == Pages("madvise", 3, 12)


def test_a_lock_is_seen_without_asking_for_it(tmp_path: Path) -> None:
    file = tmp_path / "LOCK"
    assert lock_holder(file) is None
    file.write_text("")
    assert lock_holder(file) is None
    with file.open() as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        assert lock_holder(file) == os.getpid()
    assert lock_holder(file) is None


def test_libraries_and_drivers_are_told(tmp_path: Path) -> None:
    assert importable("json") is None
    assert importable("no_such_module") == "not installed"
    assert cuda_driver(tmp_path) is None
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    (tmp_path / "driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n"
    )
    assert cuda_driver(tmp_path) == "580.65.06"
    limit = lock_limit_bytes()
    assert limit is None or limit >= 0
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
