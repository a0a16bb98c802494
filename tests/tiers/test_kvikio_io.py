"""GPUDirect Storage: proven or not, and what the tier does then. A stand-in for kvikio works on host tensors here."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo.kernels.checks import KernelArgumentError, Rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierConfigError
from dynamo.tiers.fake_kvikio import FakeKvikio, Spoil
from dynamo.tiers.kvikio_io import find_kvikio, prove_gds
from dynamo.tiers.layout import BlockLayout

NUM_SLOTS = 48
CPU = torch.device("cpu")


def open_disk(places: list[Path], layout: BlockLayout) -> DiskTier:
    return DiskTier.open(places, layout, NUM_SLOTS * layout.slot_bytes, b"model-a.")


def test_a_true_round_trip_is_a_proof_and_leaves_nothing_behind(tmp_path: Path) -> None:
    proof = prove_gds(tmp_path, CPU, FakeKvikio())
    assert proof.ok
    assert list(tmp_path.iterdir()) == []


def spoil_read(what: str, buf: torch.Tensor) -> None:
    if what == "read":
        buf.view(-1)[4000] ^= 1


def spoil_both(what: str, buf: torch.Tensor) -> None:
    """What a cache behind the caller's back does: the GPU sees its bytes, the file does not have them."""
    buf.view(-1)[4000] ^= 1


def short(what: str, buf: torch.Tensor) -> int:
    return 4096


def failing(what: str, buf: torch.Tensor) -> int:
    raise RuntimeError("cuFile: GPUDirect Storage is not supported on this file system")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_read, "did not get back what it wrote"),
        (spoil_both, "does not hold what the GPU wrote"),
        (short, "4096 were written and 4096 read back"),
        (failing, "it failed: cuFile: GPUDirect Storage is not supported"),
    ],
)
def test_anything_less_is_none(tmp_path: Path, spoil: Spoil, reason: str) -> None:
    proof = prove_gds(tmp_path, CPU, FakeKvikio(spoil))
    assert not proof.ok
    assert reason in proof.reason
    assert list(tmp_path.iterdir()) == []


def test_compatibility_mode_is_no_proof(tmp_path: Path) -> None:
    proof = prove_gds(tmp_path, CPU, FakeKvikio(compat=True))
    assert (proof.ok, proof.compat_mode) == (False, True)


def test_a_folder_that_cannot_be_written_is_no_proof(tmp_path: Path) -> None:
    assert "it failed" in prove_gds(tmp_path / "nowhere", CPU, FakeKvikio()).reason


@pytest.mark.parametrize("count", [1, 3])
def test_slots_move_between_device_rows_and_disk_both_ways(
    tmp_path: Path, layout: BlockLayout, rows: Rows, count: int
) -> None:
    tier = open_disk([tmp_path / str(i) for i in range(count)], layout)
    kvikio = FakeKvikio()
    assert all(proof.ok for proof in tier.prove_gds(CPU, kvikio))
    assert tier.has_device_io
    device_rows = torch.from_numpy(rows.copy())
    slots, row_ids = np.random.default_rng(0).permutation(NUM_SLOTS)[:20], np.random.default_rng(1).permutation(32)[:20]
    assert tier.write_device(slots, device_rows, row_ids).all()
    host_rows = rows.copy()
    host_rows = np.ascontiguousarray(rows)
    before = rows[row_ids].copy()
    rows[:] = 0
    assert tier.read(slots, host_rows, row_ids).all()
    assert (host_rows[row_ids] == before).all()
    device_rows.zero_()
    assert tier.read_device(slots, device_rows, row_ids).all()
    assert (device_rows.numpy()[row_ids] == before).all()
    assert (
        tier.read_device(np.setdiff1d(np.arange(NUM_SLOTS), slots), device_rows, np.zeros(28, dtype=np.int64)).sum()
        == 0
    )
    assert tier.stats().read.blocks == 40
    assert kvikio.num_open == 2 * count  # the proof and one for all calls
    tier.close()


def test_faults_of_device_calls_are_outcomes(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk([tmp_path], layout)
    kvikio = FakeKvikio()
    tier.prove_gds(CPU, kvikio)
    device_rows = torch.from_numpy(rows.copy())
    slots = np.arange(4)
    assert tier.write_device(slots, device_rows, slots).all()
    kvikio.spoil = lambda what, buf: 2 * layout.slot_bytes
    assert tier.read_device(slots, device_rows, slots).tolist() == [True, True, False, False]
    kvikio.spoil = failing
    assert not tier.read_device(slots, device_rows, slots).any()
    assert tier.stats().faults == {"truncated": 2, "io_error": 4}
    tier.close()


def test_a_file_made_anew_is_opened_anew(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk([tmp_path], layout)
    tier.prove_gds(CPU, FakeKvikio())
    device_rows = torch.from_numpy(rows.copy())
    slots = np.arange(4)
    assert tier.write_device(slots, device_rows, slots).all()
    (tier.folder / "blocks.dat").unlink()
    assert not tier.read_device(slots, device_rows, slots).any()
    assert tier.write_device(slots, device_rows, slots).all()
    assert tier.read(slots, rows, slots).all()
    tier.close()


def test_without_a_proof_in_every_directory_device_calls_are_refused_and_the_log_says_why(
    tmp_path: Path, layout: BlockLayout, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tier = open_disk([tmp_path / "a", tmp_path / "b"], layout)
    calls = 0

    def second_directory_fails(what: str, buf: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("no such luck")

    assert [proof.ok for proof in tier.prove_gds(CPU, FakeKvikio(second_directory_fails))] == [True, False]
    assert not tier.has_device_io
    with pytest.raises(TierConfigError, match="not proven"):
        tier.read_device(np.arange(1), torch.from_numpy(rows), np.arange(1))
    assert "GPUDirect Storage is proven" in caplog.text
    assert "GPUDirect Storage is not proven" in caplog.text
    assert "it failed: no such luck" in caplog.text
    tier.close()


def test_wrong_device_rows_are_refused(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk([tmp_path], layout)
    tier.prove_gds(CPU, FakeKvikio())
    slots = np.arange(2)
    good = torch.from_numpy(rows.copy())
    for wrong in (good[:, :2048], good.view(torch.int8), good[::2]):
        with pytest.raises(KernelArgumentError):
            tier.write_device(slots, wrong, slots)
    tier.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA driver")
def test_without_a_driver_kvikio_is_not_even_imported() -> None:
    assert find_kvikio() == "there is no CUDA driver"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_proves_or_says_why(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk([tmp_path], layout)
    (proof,) = tier.prove_gds(torch.device("cuda:0"))
    assert proof.reason
    if not proof.ok:
        pytest.skip(f"no GPUDirect Storage here: {proof.reason}")
    device_rows = torch.from_numpy(rows).cuda()
    slots = np.arange(32)
    assert tier.write_device(slots, device_rows, slots).all()
    back = torch.zeros_like(device_rows)
    assert tier.read_device(slots, back, slots).all()
    assert torch.equal(back, device_rows)
    tier.close()
