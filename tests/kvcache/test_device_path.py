"""Which path blocks take between disk and device, and that one hop gives the same bytes, or none, as two.

Here the device is host memory, and a stand-in for kvikio proves GPUDirect Storage between it and the disk.
"""

import errno
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.device_path import find_device_path
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierMemoryError
from dynamo.tiers.fake_kvikio import FakeKvikio
from dynamo.tiers.kvikio_io import GdsProof
from dynamo.tiers.slot_digests import DigestKind
from dynamo.tiers.verify import verify_directories

TOKENS = list(range(33))  # eight full blocks and one token to compute
LONGER = list(range(65))
TIMEOUT_S = 20.0


@pytest.fixture
def gds(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    """Proves GPUDirect Storage for every disk tier that is opened."""
    kvikio = FakeKvikio()
    monkeypatch.setattr(DiskTier, "open", classmethod(proven(kvikio)))
    return kvikio


def proven(kvikio: FakeKvikio) -> Callable[..., DiskTier]:
    open_tier = DiskTier.open.__func__  # type: ignore[attr-defined]

    def open_proven(cls: type[DiskTier], *args: Any, **options: Any) -> DiskTier:
        tier = open_tier(cls, *args, **options)
        assert all(proof.ok for proof in tier.prove_gds(torch.device("cpu"), kvikio))
        return tier

    return open_proven


@pytest.fixture
def through_host(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that move blocks between disk and host memory."""
    calls: list[str] = []
    for name in ("read", "write"):
        move = getattr(DiskTier, name)

        def noted(*args: Any, name: str = name, move: Any = move) -> Any:
            calls.append(name)
            return move(*args)

        monkeypatch.setattr(DiskTier, name, noted)
    return calls


@pytest.fixture
def place(tmp_path: Path) -> str:
    return f"{tmp_path / 'kv'}:4MiB"


@pytest.fixture
def on_disk(gds: FakeKvikio, make_cache: Callable[..., KVCache], content: Any, place: str) -> KVCache:
    """A cache that has TOKENS on disk only, written by one hop."""
    cache = make_cache(disk=place)
    content.run(cache, TOKENS)
    forget_memory(cache)
    return cache


def forget_memory(cache: KVCache) -> None:
    assert cache.flush()
    cache.clear("device")
    cache.clear("host")


def path_of(cache: KVCache) -> str:
    (path,) = [tier.device_path for tier in cache.status().tiers if tier.tier == "disk"]
    assert path is not None
    return path


def flip_in_file(directory: Path, block: int, slot_bytes: int = 4096) -> None:
    (path,) = directory.rglob("blocks.dat")
    with path.open("r+b") as file:
        file.seek(block * slot_bytes + 100)
        byte = file.read(1)[0]
        file.seek(block * slot_bytes + 100)
        file.write(bytes([byte ^ 0x10]))


# --- which path


def test_without_a_gpu_the_log_and_the_status_say_so(
    make_cache: Callable[..., KVCache], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache = make_cache(disk=place, host="64KiB")
    paths = {tier.tier: tier.device_path for tier in cache.status().tiers}
    assert paths == {"device": None, "host": None, "disk": "two hops through host memory: no CUDA device"}
    assert [record.message for record in caplog.records if "no CUDA device" in record.message]


def test_where_it_is_proven_blocks_take_one_hop_and_the_log_says_so(
    gds: FakeKvikio, make_cache: Callable[..., KVCache], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = path_of(make_cache(disk=place))
    assert path.startswith("one hop: GPUDirect Storage")
    assert path in caplog.text


def test_with_a_host_tier_blocks_go_through_it(
    gds: FakeKvikio, make_cache: Callable[..., KVCache], content: Any, place: str, through_host: list[str]
) -> None:
    cache = make_cache(disk=place, host="1MiB")
    assert path_of(cache).startswith("two hops through host memory: GPUDirect Storage works here, but blocks are kept")
    content.run(cache, TOKENS)
    forget_memory(cache)
    assert content.run(cache, TOKENS) == 32
    assert set(through_host) == {"read", "write"}
    assert cache.lookup(TOKENS).host_tokens == 32


class UnprovenDisk(DiskTier):
    """Tells of GPUDirect Storage what it was given."""

    def prove_gds(self, device: torch.device, kvikio: object = None) -> list[GdsProof]:
        return [GdsProof(True, "compared"), GdsProof(False, "kvikio is not there")]


class CudaByName(DeviceTier):
    """Says that it is a GPU."""

    def __init__(self, spec: KVSpec) -> None:
        super().__init__(spec.layout, torch.float32, 1, "cpu")
        self.device = torch.device("cuda:0")


def test_on_a_gpu_without_a_proof_the_reason_is_told(spec: KVSpec, tmp_path: Path) -> None:
    disk = UnprovenDisk.open(tmp_path, spec.layout, 4 * spec.layout.slot_bytes, spec.fingerprint)
    path = find_device_path(disk, CudaByName(spec), keeps_in_host=False, num_rows=4)
    disk.close()
    assert path.staging is None
    assert path.description == "two hops through host memory: kvikio is not there"


def no_memory(*_: object) -> DeviceTier:
    raise TierMemoryError("4 device blocks need 4 bytes", needed_bytes=4, available_bytes=3)


def no_kernels(*_: object) -> np.ndarray:
    raise RuntimeError("no kernel image")


def no_compiler(*_: object) -> np.ndarray:
    raise pytest.importorskip("triton.errors").TritonError("no ptxas")


@pytest.mark.parametrize(
    ("method", "stand_in", "reason"),
    [
        ("new_like", no_memory, "device memory does not suffice for it: 4 device blocks need 4 bytes"),
        ("digest", no_kernels, "the device makes no digests: no kernel image"),
        ("digest", no_compiler, "the device makes no digests: no ptxas"),
        ("digest", lambda *_: np.zeros(1, dtype=np.uint64), "the device makes other digests than the CPU"),
    ],
)
def test_a_device_that_cannot_take_part_is_no_reason_to_fail(
    gds: FakeKvikio,
    make_cache: Callable[..., KVCache],
    content: Any,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    stand_in: Callable[..., Any],
    reason: str,
) -> None:
    monkeypatch.setattr(DeviceTier, method, stand_in)
    cache = make_cache(disk=place)
    assert reason in path_of(cache)
    content.run(cache, TOKENS)
    forget_memory(cache)
    assert content.run(cache, TOKENS) == 32


# --- what comes of it


def test_blocks_go_to_disk_and_back_without_host_memory(
    on_disk: KVCache, content: Any, through_host: list[str]
) -> None:
    assert content.run(on_disk, TOKENS) == 32
    stats = on_disk.stats()
    assert through_host == []
    assert (stats.tier("disk").hit_blocks, stats.load_faults, stats.dropped_blocks) == (8, {}, {})


@pytest.mark.parametrize("order", ["direct, then host", "host, then direct"])
def test_a_directory_may_hold_digests_of_both_kinds(
    gds: FakeKvikio, make_cache: Callable[..., KVCache], content: Any, place: str, tmp_path: Path, order: str
) -> None:
    hosts: list[str | None] = [None, "1MiB"] if order.startswith("direct") else ["1MiB", None]
    for host, tokens, num_cached in zip(hosts, (TOKENS, LONGER), (0, 32), strict=True):
        with make_cache(device_blocks=20, disk=place, host=host) as cache:
            assert content.run(cache, tokens) == num_cached
    for host in hosts:
        with make_cache(device_blocks=20, disk=place, host=host) as cache:
            assert content.run(cache, LONGER) == 64
            assert cache.verify().num_checked == 16
            assert cache.stats().verify_faults == cache.stats().load_faults == {}
    (report,) = verify_directories([tmp_path / "kv"])
    assert (report.num_blocks, report.num_good) == (16, 16)


def test_what_is_written_by_one_hop_has_digests_that_gpus_make(on_disk: KVCache, spec: KVSpec, tmp_path: Path) -> None:
    on_disk.close()
    disk = DiskTier.open(tmp_path / "kv", spec.layout, 4 << 20, spec.fingerprint)
    assert disk.recovered.digest_kinds.tolist() == [DigestKind.LINES] * 8
    disk.close()


@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_flipped_bit_is_noticed_on_the_device_and_computed_again(
    on_disk: KVCache, content: Any, tmp_path: Path, position: int, through_host: list[str]
) -> None:
    flip_in_file(tmp_path, position)
    assert content.run(on_disk, TOKENS) == 4 * position
    assert on_disk.stats().load_faults == {"corrupt": 1}
    forget_memory(on_disk)
    assert content.run(on_disk, TOKENS) == 32
    assert through_host == []


def test_a_check_of_the_tier_finds_it_as_well(on_disk: KVCache, content: Any, tmp_path: Path) -> None:
    flip_in_file(tmp_path, 3)
    found = on_disk.verify()
    assert (found.num_checked, found.num_corrupt) == (8, 1)
    assert content.run(on_disk, TOKENS) == 12
    assert on_disk.stats().load_faults == {}


def test_so_does_the_check_of_a_closed_one(on_disk: KVCache, tmp_path: Path) -> None:
    on_disk.close()
    flip_in_file(tmp_path, 5)
    (report,) = verify_directories([tmp_path / "kv"])
    assert (report.num_good, report.num_corrupt) == (7, 1)


@pytest.mark.parametrize(("num_faults", "num_cached", "faults"), [(1, 32, {}), (2, 0, {"unreadable": 1})])
def test_a_block_that_cannot_be_read_is_read_once_more(
    on_disk: KVCache,
    content: Any,
    monkeypatch: pytest.MonkeyPatch,
    num_faults: int,
    num_cached: int,
    faults: dict[str, int],
) -> None:
    sizes: list[int] = []
    read = DiskTier.read_device

    def fail(tier: DiskTier, slots: Any, rows: Any, row_ids: Any) -> Any:
        outcomes = read(tier, slots, rows, row_ids)
        sizes.append(len(slots))
        if len(sizes) <= num_faults:
            outcomes[0] = False
        return outcomes

    monkeypatch.setattr(DiskTier, "read_device", fail)
    assert content.run(on_disk, TOKENS) == num_cached
    assert sizes == [8, 1]
    assert on_disk.stats().load_faults == faults


def test_a_disk_that_fails_costs_its_blocks_and_nothing_else(
    gds: FakeKvikio, make_cache: Callable[..., KVCache], content: Any, place: str
) -> None:
    cache = make_cache(disk=place)

    def fail(what: str, memory: torch.Tensor) -> None:
        raise OSError(errno.EIO, "no such luck")

    gds.spoil = fail
    content.run(cache, TOKENS)
    assert cache.flush()
    stats = cache.stats()
    assert stats.dropped_blocks == {"disk_write_failed": 8}
    assert stats.tier("disk").faults["io_error"] >= 8
    assert cache.lookup(TOKENS).disk_tokens == 0

    gds.spoil = lambda what, memory: None
    cache.clear("device")
    content.run(cache, TOKENS)
    forget_memory(cache)
    gds.spoil = fail
    assert content.run(cache, TOKENS) == 0
    assert cache.stats().load_faults == {"unreadable": 8}


def test_a_file_that_is_deleted_takes_its_blocks_along(on_disk: KVCache, content: Any, tmp_path: Path) -> None:
    (path,) = tmp_path.rglob("blocks.dat")
    path.unlink()
    assert content.run(on_disk, TOKENS) == 0
    assert on_disk.stats().tier("disk").faults["deleted"] >= 1
    forget_memory(on_disk)
    assert content.run(on_disk, TOKENS) == 32


def test_a_write_that_the_disk_refuses_is_dropped_and_counted(
    gds: FakeKvikio, make_cache: Callable[..., KVCache], content: Any, place: str
) -> None:
    cache = make_cache(disk=place)
    gds.spoil = lambda what, memory: 3 * 4096 if what == "write" and len(memory) > 3 else None
    content.run(cache, TOKENS)
    forget_memory(cache)
    gds.spoil = lambda what, memory: None
    assert content.run(cache, TOKENS) == 24  # three at the first try, three of the others at the second
    stats = cache.stats()
    assert stats.dropped_blocks == {"disk_write_failed": 2}
    assert stats.load_faults == {}


# --- who gives up


class HeldReads:
    """Reads of a `FakeKvikio` wait, with their bytes in place, until they are let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, what: str, memory: torch.Tensor) -> None:
        if what == "read":
            self.begun.set()
            assert self.go_on.wait(TIMEOUT_S)


def blank(cache: KVCache) -> None:
    for layer in range(2):
        for plane in cache.layer(layer):
            plane.zero_()


def wait_for_loads(cache: KVCache, eventually: Callable[..., None]) -> None:
    eventually(lambda: not cache.stats().num_loads)


@pytest.mark.parametrize("end", ["deadline", "cancel"])
def test_nobody_waits_for_a_read_that_hangs_and_it_writes_to_no_slot_afterwards(
    on_disk: KVCache, gds: FakeKvikio, content: Any, eventually: Callable[..., None], end: str
) -> None:
    held = gds.spoil = HeldReads()
    try:
        with on_disk.open(TOKENS) as sequence:
            assert held.begun.wait(TIMEOUT_S)
            if end == "deadline":
                sequence.wait(0.01)
                assert sequence.num_cached_tokens == 0
        assert on_disk.stats().num_loads == 1
        blank(on_disk)
    finally:
        held.go_on.set()
    wait_for_loads(on_disk, eventually)
    assert not any(plane.any() for layer in range(2) for plane in on_disk.layer(layer))
    assert content.run(on_disk, TOKENS) == 32


def test_what_was_computed_meanwhile_is_not_overwritten(
    on_disk: KVCache, gds: FakeKvikio, content: Any, eventually: Callable[..., None]
) -> None:
    held = gds.spoil = HeldReads()
    try:
        with on_disk.open(TOKENS, overlap=True) as sequence:
            start, end = sequence.next_span(0, 16)
            assert (start, end) == (0, 16)
            assert held.begun.wait(TIMEOUT_S)
            blank(on_disk)
            held.go_on.set()
            wait_for_loads(on_disk, eventually)
            table = sequence.block_table
            for layer in range(2):
                for plane in on_disk.layer(layer):
                    assert not plane[torch.as_tensor(table[:4])].any()
            for i, block in enumerate(content.of_blocks(TOKENS)[4:], start=4):
                assert torch.equal(on_disk.layer(0)[0][int(table[i])], block[0, 0])
    finally:
        held.go_on.set()


# --- who is killed

WRITER = """
import sys
import torch
from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.hashing import block_keys, chain_root
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.fake_kvikio import FakeKvikio
open_tier = DiskTier.open.__func__
def open_proven(cls, *args, **options):
    tier = open_tier(cls, *args, **options)
    tier.prove_gds(torch.device("cpu"), FakeKvikio())
    return tier
DiskTier.open = classmethod(open_proven)
spec = KVSpec(model="test", num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32, block_size=4)
root = chain_root(spec.fingerprint, spec.block_size, salt="")
with KVCache(spec, device="cpu", device_blocks=64, disk=sys.argv[1], scrub_bytes_per_s=0) as cache:
    number = 0
    while True:
        tokens = list(range(100 * number, 100 * number + 33))
        with cache.open(tokens) as sequence:
            sequence.wait()
            first = sequence.num_cached_tokens // 4
            for i, key in enumerate(block_keys(tokens, 4, root)):
                if i >= first:
                    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
                    block = torch.rand((2, 2, 4, 2, 8), generator=generator)
                    for layer in range(2):
                        k, v = cache.layer(layer)
                        k[int(sequence.block_table[i])], v[int(sequence.block_table[i])] = block[layer]
            sequence.commit()
        number = (number + 1) % 40
        print(number, flush=True)
"""


@pytest.mark.slow
def test_kill_9_during_writes_leaves_blocks_that_are_right_or_found_out(
    gds: FakeKvikio, make_cache: Callable[..., KVCache], content: Any, tmp_path: Path
) -> None:
    place = f"{tmp_path / 'kv'}:512KiB"  # less than is written, so that slots are written over
    num_found = 0
    for num_lines in (5, 60):
        writer = subprocess.Popen([sys.executable, "-P", "-c", WRITER, place], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(num_lines):
            assert writer.stdout.readline(), "the writer ended by itself"
        writer.send_signal(signal.SIGKILL)
        writer.stdout.close()
        writer.wait(30)
        with make_cache(device_blocks=64, disk=place) as cache:
            for number in range(40):
                num_found += content.run(cache, list(range(100 * number, 100 * number + 33)))
                cache.clear("device")
    assert num_found > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_takes_one_hop_or_says_why(
    make_cache: Callable[..., KVCache], content: Any, place: str, through_host: list[str]
) -> None:
    cache = make_cache(device="cuda", disk=place)
    if not path_of(cache).startswith("one hop"):
        pytest.skip(path_of(cache))

    def run() -> int:
        with cache.open(TOKENS) as sequence:
            sequence.wait()
            cached = sequence.num_cached_tokens
            for i, block in enumerate(content.of_blocks(TOKENS)):
                slot = int(sequence.block_table[i])
                for layer in range(2):
                    for plane, wanted in zip(cache.layer(layer), block[layer].cuda(), strict=True):
                        if 4 * i < cached:
                            assert torch.equal(plane[slot], wanted)
                        else:
                            plane[slot] = wanted
            sequence.commit()
        return int(cached)

    assert run() == 0
    forget_memory(cache)
    assert run() == 32
    assert through_host == []
