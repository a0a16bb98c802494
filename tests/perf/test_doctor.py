"""The examination of a configuration."""

import argparse
import fcntl
import io
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

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
from dynamo.tiers.host_budget import HostBudget

QUIET = Console(file=io.StringIO())


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
