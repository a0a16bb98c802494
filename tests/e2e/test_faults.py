"""The disk tier is damaged under a running server: the text stays right, the fault is counted and logged once."""

import os
import random
import shutil
import signal
import subprocess
import threading

import pytest

LENGTH = 800
CACHED = (LENGTH - 1) // 16 * 16
# What is loaded is counted below: it is waited for, however busy the machine.
FLAGS = ["--device-cache", "3MiB", "--host-cache", "1MiB", "--max-model-len", "1200", "--load-patience", "off"]

pytestmark = pytest.mark.slow


def prompt(seed: int) -> list[int]:
    return [0, *random.Random(seed).choices(range(300, 2048), k=LENGTH - 1)]


def outcome(answer: dict) -> tuple[int, str]:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["text"]


def faults(server) -> dict[str, float]:
    names = ("dynamo_kvcache_tier_faults_total", "dynamo_kvcache_load_faults_total")
    return {name: value for name, value in server.metrics().items() if name.startswith(names)}


def served_and_evicted(server) -> str:
    """The text of prompt 1, which lies on disk only when this returns."""
    text = outcome(server.complete(prompt(1)))[1]
    for seed in range(2, 5):
        server.complete(prompt(seed))
    server.settle()
    return text


def flip_a_byte(path):
    with path.open("r+b") as file:
        file.seek(5 * 32768 + 77)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path):
    os.truncate(path, 7 * 32768)


def delete(path):
    path.unlink()


def delete_folder(path):
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    ("damage", "kind", "cached"),
    [
        (flip_a_byte, 'reason="corrupt"', 768),
        (truncate, 'kind="truncated"', 112),
        (delete, 'kind="deleted"', 0),
        (delete_folder, 'kind="deleted"', 0),
    ],
)
def test_damage_to_the_disk_file_is_survived(start, folder, damage, kind, cached):
    server = start(*FLAGS, "--disk-cache", f"{folder}:64MiB")
    text = served_and_evicted(server)
    (path,) = folder.rglob("blocks.dat")
    damage(path)
    assert outcome(server.complete(prompt(1))) == (cached, text)
    assert sum(value for name, value in faults(server).items() if kind in name) >= 1
    assert len(server.warnings()) == 1
    for seed in range(2, 5):
        server.complete(prompt(seed))
    server.settle()
    assert outcome(server.complete(prompt(1))) == (CACHED, text)
    assert server.is_healthy()


def test_a_folder_that_cannot_be_read_costs_the_disk_tier_only(start, folder):
    server = start(*FLAGS, "--disk-cache", f"{folder}:64MiB")
    text = served_and_evicted(server)
    server.server.stop()
    (path,) = folder.rglob("blocks.dat")
    # For root, permissions are no obstacle; a folder in the file's place is one for everybody.
    path.rename(path.with_name("kept"))
    path.mkdir()
    server = start(*FLAGS, "--disk-cache", f"{folder}:64MiB")
    assert outcome(server.complete(prompt(1))) == (0, text)
    assert faults(server) == {'dynamo_kvcache_tier_faults_total{kind="unavailable",tier="disk"}': 1}
    assert len(server.warnings("going on without a disk tier")) == 1
    assert server.is_healthy()


def test_missing_read_permission_costs_the_disk_tier_only(start, folder):
    server = start(*FLAGS, "--disk-cache", f"{folder}:64MiB", obeys_permissions=True)
    text = served_and_evicted(server)
    (path,) = folder.rglob("blocks.dat")
    path.chmod(0)
    assert outcome(server.complete(prompt(1))) == (CACHED, text)  # a file that is open stays open
    server.server.stop()
    server = start(*FLAGS, "--disk-cache", f"{folder}:64MiB", obeys_permissions=True)
    assert outcome(server.complete(prompt(1))) == (0, text)
    assert faults(server) == {'dynamo_kvcache_tier_faults_total{kind="unavailable",tier="disk"}': 1}
    assert len(server.warnings("going on without a disk tier")) == 1
    assert server.is_healthy()


def test_a_folder_that_loses_its_permissions_while_it_is_used_costs_nothing_but_what_it_must(start, folder):
    server = start(*FLAGS, "--disk-cache", f"{folder}:64MiB", obeys_permissions=True)
    text = served_and_evicted(server)
    inner = next(folder.rglob("blocks.dat")).parent
    for place in (inner, folder):
        place.chmod(0)
    try:
        assert outcome(server.complete(prompt(1)))[1] == text
        for seed in range(2, 8):
            server.complete(prompt(seed))
        assert outcome(server.complete(prompt(1)))[1] == text
        assert server.is_healthy()
        assert server.server.stop() == 0
        assert len(server.warnings("disk tier")) <= 1
    finally:
        for place in (folder, inner):
            place.chmod(0o700)


def check_full_disk(server) -> None:
    text = served_and_evicted(server)
    assert outcome(server.complete(prompt(1)))[1] == text
    assert sum(value for name, value in faults(server).items() if 'kind="disk_full"' in name) >= 1
    assert len(server.warnings("disk tier", "the disk is full; blocks are not kept")) == 1
    assert server.is_healthy()
    assert server.server.stop() == 0


def test_a_file_that_may_not_grow_is_a_full_disk(start, folder):
    check_full_disk(start(*FLAGS, "--disk-cache", f"{folder}:64MiB", file_size_limit=1 << 20))


@pytest.fixture
def small_file_system(tmp_path):
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount_point)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)


def test_a_full_disk_is_survived(start, small_file_system):
    server = start(*FLAGS, "--disk-cache", f"{small_file_system}:64MiB")
    check_full_disk(server)
    assert len(server.warnings("disk tier", "may take 67,108,864 bytes, but the file system has")) == 1
    assert len(server.warnings("disk tier")) == 2


@pytest.fixture
def failing_disk(tmp_path):
    """A file system on a block device, and a function after which its sectors beyond the first MiB fail with EIO."""
    if os.geteuid() or not all(shutil.which(tool) for tool in ("losetup", "mkfs.ext4", "mount")):
        pytest.skip("a device whose sectors fail needs root, losetup and mkfs.ext4")
    backing, mount_point = tmp_path / "device", tmp_path / "failing"
    backing.touch()
    os.truncate(backing, 64 << 20)
    mount_point.mkdir()
    attached = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop device can be attached: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", device], check=True, capture_output=True)
        mounted = subprocess.run(["mount", device, str(mount_point)], capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"ext4 cannot be mounted: {mounted.stderr.strip()}")
        try:
            yield mount_point, lambda: os.truncate(backing, 1 << 20)
        finally:
            subprocess.run(["umount", "-l", str(mount_point)], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=False)


def test_a_device_whose_sectors_fail_costs_its_blocks_only(start, failing_disk):
    mount_point, fail = failing_disk
    server = start(*FLAGS, "--disk-cache", f"{mount_point}:16MiB")
    text = served_and_evicted(server)
    os.sync()
    fail()
    assert outcome(server.complete(prompt(1)))[1] == text
    counted = faults(server)
    assert sum(value for name, value in counted.items() if 'kind="io_error"' in name) >= 1
    assert sum(value for name, value in counted.items() if 'reason="unreadable"' in name) >= 1
    assert len(server.warnings("disk tier")) <= 2  # one for the blocks, and one for the index that lies there too
    for seed in range(2, 5):
        server.complete(prompt(seed))
    assert outcome(server.complete(prompt(1)))[1] == text
    assert server.is_healthy()


def test_a_read_only_disk_costs_the_disk_tier_only(start, small_file_system):
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_file_system)], check=True)
    server = start(*FLAGS, "--disk-cache", f"{small_file_system}:8MiB")
    text = served_and_evicted(server)
    server.server.stop()  # files open for writing forbid the remount
    subprocess.run(["mount", "-o", "remount,ro", str(small_file_system)], check=True)
    server = start(*FLAGS, "--disk-cache", f"{small_file_system}:8MiB")
    assert outcome(server.complete(prompt(1))) == (0, text)
    assert faults(server) == {'dynamo_kvcache_tier_faults_total{kind="unavailable",tier="disk"}': 1}
    assert len(server.warnings("going on without a disk tier")) == 1
    assert server.is_healthy()


def test_the_second_server_on_one_folder_goes_on_without_it(start, folder):
    first = start(*FLAGS, "--disk-cache", f"{folder}:64MiB")
    text = served_and_evicted(first)
    second = start(*FLAGS, "--disk-cache", f"{folder}:64MiB")
    assert outcome(second.complete(prompt(1))) == (0, text)
    assert faults(second) == {'dynamo_kvcache_tier_faults_total{kind="busy",tier="disk"}': 1}
    assert len(second.warnings("going on without a disk tier", f"process {first.server.process.pid}")) == 1
    assert outcome(first.complete(prompt(1))) == (CACHED, text)


JUMPING_CLOCK = """
import signal, time
offset = 0.0
real_time = time.time
def jump(number, frame):
    global offset
    offset += 400 * 86400.0 if number == signal.SIGUSR1 else -800 * 86400.0
time.time = lambda: real_time() + offset
signal.signal(signal.SIGUSR1, jump)
signal.signal(signal.SIGUSR2, jump)
"""


def test_jumps_of_the_wall_clock_change_nothing(start, folder, tmp_path):
    # Python runs a module of this name before all others: the machine's clock, which is everybody's, stays as it is.
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)
    path = os.pathsep.join([str(tmp_path / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = start(
        *FLAGS, "--disk-cache", f"{folder}:64MiB", "--disk-write-budget", "1TB", environment={"PYTHONPATH": path}
    )
    text = served_and_evicted(server)
    created = server.complete(prompt(5))["created"]
    for jump, direction in ((signal.SIGUSR1, 1), (signal.SIGUSR2, -1)):
        server.server.process.send_signal(jump)
        assert outcome(server.complete(prompt(1))) == (CACHED, text)
        for seed in range(2, 5):
            assert outcome(server.complete(prompt(seed)))[0] == CACHED
        assert direction * (server.complete(prompt(5))["created"] - created) > 300 * 86400
    assert faults(server) == {}
    assert server.warnings() == []
    assert server.server.stop() == 0


def test_tiers_are_resized_while_requests_run(start, folder):
    server = start(*FLAGS, "--disk-cache", f"{folder}:64MiB", "--host-cache-max", "8MiB", "--admin")
    seeds = range(1, 5)
    texts = {seed: outcome(server.complete(prompt(seed)))[1] for seed in seeds}
    wrong: list[int] = []
    done = threading.Event()

    def ask(seed: int) -> None:
        while not done.is_set():
            if outcome(server.complete(prompt(seed)))[1] != texts[seed]:
                wrong.append(seed)

    clients = [threading.Thread(target=ask, args=(seed,)) for seed in seeds]
    for client in clients:
        client.start()
    try:
        for host, disk in (("8MiB", "16MiB"), ("512KiB", "64MiB"), ("4MiB", "2MiB"), ("1MiB", "64MiB")):
            for tier, size in (("host", host), ("disk", disk)):
                assert server.administer("resize", {"tier": tier, "size": size})["num_slots"] > 0
    finally:
        done.set()
        for client in clients:
            client.join(60)
    assert not any(client.is_alive() for client in clients)
    assert wrong == []
    assert faults(server) == {}
    assert server.is_healthy()
    assert server.server.stop() == 0
