"""Rounds of kill -9: nothing wrong comes back, and the check notices what is wrong."""

import random
from pathlib import Path

import pytest
import torch

from dynamo.kvcache import KVCache
from dynamo.perf.__main__ import main
from dynamo.perf.crash import crash_rounds, damage
from dynamo.perf.crash_worker import Workload, conversation_tokens

BLOCK_SIZE = 16


def test_killed_workers_leave_nothing_wrong_and_little_is_lost(tmp_path: Path) -> None:
    workload = Workload(tmp_path / "kv", num_disk_blocks=64, block_kib=16, seed=1)
    tally = crash_rounds(workload, num_rounds=8, damage_share=0.0)
    assert tally.num_wrong == tally.num_unusable == 0
    assert tally.num_checked > 0
    assert len(tally.survivors) >= 2
    assert max(tally.survivors) > 0, "nothing was ever found again"


@pytest.mark.slow
def test_damaged_files_lose_blocks_but_give_no_wrong_ones(tmp_path: Path) -> None:
    workload = Workload(tmp_path / "kv", num_disk_blocks=64, block_kib=16, seed=2)
    tally = crash_rounds(workload, num_rounds=24, damage_share=0.7)
    assert tally.num_damaged > 0
    assert tally.num_wrong == tally.num_unusable == 0
    assert tally.num_checked > 0


@pytest.mark.slow
def test_a_folder_that_is_refused_is_emptied_for_the_rounds_that_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deface(folder: Path, chance: random.Random) -> str:
        for path in folder.rglob("STRIPE"):
            path.write_bytes(bytes(512))
        return "zeroed sector"

    monkeypatch.setattr("dynamo.perf.crash.damage", deface)
    tally = crash_rounds(Workload(tmp_path / "kv", num_disk_blocks=64, block_kib=16, seed=4), 16, damage_share=0.9)
    assert 0 < tally.num_refused <= tally.num_damaged, "a folder was refused again without new damage"


def test_blocks_with_other_bytes_than_their_keys_say_are_counted(tmp_path: Path) -> None:
    workload = Workload(tmp_path / "kv", num_disk_blocks=64, block_kib=16, seed=3)
    disk = f"{workload.folder}:{64 * workload.spec.layout.slot_bytes}"
    with KVCache(workload.spec, device="cpu", device_blocks=16, disk=disk) as cache:
        with cache.open(conversation_tokens(workload.seed, 0)[: 4 * BLOCK_SIZE]) as seq:
            seq.wait()
            for layer in range(workload.spec.num_layers):
                for tensor in cache.layer(layer):
                    tensor[torch.from_numpy(seq.block_table).long()] = 1.0
            seq.commit()
        assert cache.flush(10.0)
    tally = crash_rounds(workload, num_rounds=2, damage_share=0.0)
    assert tally.num_wrong > 0


@pytest.mark.parametrize("seed", range(6))
def test_damage_changes_exactly_one_file(seed: int, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(bytes(range(256)) * 16)
    before = [file.read_bytes() for file in files]
    damage(tmp_path, random.Random(seed))
    changed = [file.read_bytes() != old for file, old in zip(files, before, strict=True)]
    assert sum(changed) == 1


def test_an_empty_folder_has_nothing_to_damage(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert damage(tmp_path, random.Random(0)) is None


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--blocks", "1"], ["--block-kib", "12"], ["--damage", "120"]], ids=lambda a: a[0]
)
def test_options_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crash", *arguments]) == 1
    assert arguments[0] in capsys.readouterr().err
