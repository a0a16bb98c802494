"""The offline check of a disk tier, and its command line."""

import io
import os
from pathlib import Path

import numpy as np
import pytest

from dynamo.kernels.checks import Rows
from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.__main__ import main
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierBusyError, TierUnavailableError
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.verify import verify_directories

NUM_SLOTS = 192


def fill(places: list[Path], layout: BlockLayout, rows: Rows, fingerprint: bytes = b"model-a.") -> DiskTier:
    """A tier with blocks in its first 30 slots, still open."""
    tier = DiskTier.open(places, layout, NUM_SLOTS * layout.slot_bytes, fingerprint)
    slots = np.arange(30)
    assert tier.write(slots, rows, slots).all()
    digests = digest_rows(rows, slots, np.arange(1, 31, dtype=np.uint64), layout.block_bytes)
    names = [(slot + 1).to_bytes(8, "little") + b"the rest" for slot in range(30)]
    assert tier.journal.put(names, [ROOT_NAME] * 30, slots, digests)
    return tier


def contents(place: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [1, 3])
def test_a_whole_tier_is_good_and_stays_as_it_is(tmp_path: Path, layout: BlockLayout, rows: Rows, count: int) -> None:
    places = [tmp_path / str(i) for i in range(count)]
    fill(places, layout, rows).close()
    fill(places, layout, rows, b"model-b.").close()
    before = contents(tmp_path)
    progress: list[tuple[int, int]] = []
    reports = verify_directories(places, lambda done, total: progress.append((done, total)))
    assert [(report.num_blocks, report.num_good, report.problems) for report in reports] == [(30, 30, ())] * 2
    assert reports[0].read_bytes == 30 * layout.slot_bytes
    assert progress[-1] == (30, 30)
    assert contents(tmp_path) == before
    assert main(["verify", *map(str, places)]) == 0


def test_every_kind_of_damage_is_found(
    tmp_path: Path, layout: BlockLayout, rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    tier = fill([tmp_path], layout, rows)
    tier.close()
    blocks, index = tier.folder / "blocks.dat", tier.folder / "journal.log"
    data = bytearray(blocks.read_bytes())
    data[5 * layout.slot_bytes + 9] ^= 1
    data[6 * layout.slot_bytes + layout.block_bytes] ^= 1  # padding: nobody's bytes
    blocks.write_bytes(data)
    os.truncate(blocks, 28 * layout.slot_bytes + 10)
    records = bytearray(index.read_bytes())
    records[64 + 64 * 11 + 20] ^= 1
    index.write_bytes(records)
    (report,) = verify_directories([tmp_path])
    assert (report.num_blocks, report.num_good) == (29, 26)
    assert (report.num_corrupt, report.num_unreadable, report.num_damaged_records) == (1, 2, 1)
    assert main(["verify", str(tier.folder)]) == 1
    output = capsys.readouterr().out
    assert "slot 5 does not match its digest" in output
    assert "slot 29 cannot be read" in output
    assert "1 of 30 records of the index are damaged" in output


def test_a_missing_index_is_said_in_a_sentence(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = fill([tmp_path], layout, rows)
    tier.close()
    index = tier.folder / "journal.log"
    index.unlink()
    (report,) = verify_directories([tmp_path])
    assert report.problems == (f"{index} is missing; the tier starts empty there",)


def test_a_tier_in_use_is_refused(
    tmp_path: Path, layout: BlockLayout, rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    tier = fill([tmp_path], layout, rows)
    with pytest.raises(TierBusyError, match=f"process {os.getpid()}"):
        verify_directories([tmp_path])
    assert main(["verify", str(tmp_path)]) == 2
    assert f"error: {tier.folder / 'LOCK'} is held by process {os.getpid()}" in capsys.readouterr().err
    tier.close()


def test_wrong_paths_are_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TierUnavailableError, match="is no directory"):
        verify_directories([tmp_path / "nowhere"])
    (tmp_path / "0123456789abcdef").mkdir()
    (tmp_path / "0123456789abcdef" / "thesis.txt").write_text("x")
    (report,) = verify_directories([tmp_path])
    assert report.problems == (
        f"{tmp_path / '0123456789abcdef' / 'thesis.txt'} is no file of a disk tier; move it away",
    )
    assert main(["verify", str(tmp_path)]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 2
    assert "empty holds no disk tier; give the directory of --disk-cache" in capsys.readouterr().err


def test_a_model_that_cannot_be_used_does_not_hide_beside_one_that_can(
    tmp_path: Path, layout: BlockLayout, rows: Rows
) -> None:
    fill([tmp_path], layout, rows).close()
    other = fill([tmp_path], layout, rows, b"model-b.")
    other.close()
    (other.folder / "LOCK").unlink()
    reports = {report.folder: report.problems for report in verify_directories([tmp_path])}
    assert len(reports) == 2
    assert reports.pop(other.folder)[0].startswith(f"{other.folder / 'LOCK'} is missing")
    assert list(reports.values()) == [()]


@pytest.mark.parametrize("name", ["STRIPE", "LOCK", "journal.log", "blocks.dat", "budget.dat"])
def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(
    tmp_path: Path, layout: BlockLayout, rows: Rows, name: str
) -> None:
    tier = fill([tmp_path], layout, rows)
    tier.close()
    pipe = tier.folder / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    (report,) = verify_directories([tmp_path])
    assert report.problems[0].startswith(f"{pipe} is no plain file")
    if name == "budget.dat":  # nothing of value is in it
        assert verify_directories([tier.folder])[0].problems == ()
        DiskTier.open(tmp_path, layout, 64 * layout.slot_bytes, b"model-a.", write_bytes_per_day=1 << 30).close()
        return
    with pytest.raises(TierUnavailableError, match=f"{name}.* is no plain file"):
        verify_directories([tier.folder])
    with pytest.raises(TierUnavailableError, match=f"the disk tier cannot use {pipe}: is no plain file"):
        DiskTier.open(tmp_path, layout, 64 * layout.slot_bytes, b"model-a.")


def test_an_index_that_is_cut_short_is_said_so(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = fill([tmp_path], layout, rows)
    tier.close()
    os.truncate(tier.folder / "journal.log", 9)
    (report,) = verify_directories([tmp_path])
    assert report.problems == (f"{tier.folder / 'journal.log'} is cut short: 9 of its first 64 bytes are left",)


def test_a_tier_that_was_started_smaller_is_whole_and_grows_again_without_a_fault(
    tmp_path: Path, layout: BlockLayout, rows: Rows
) -> None:
    fill([tmp_path], layout, rows).close()
    DiskTier.open(tmp_path, layout, 4 * layout.slot_bytes, b"model-a.").close()
    (report,) = verify_directories([tmp_path])
    assert (report.num_blocks, report.num_good, report.problems) == (4, 4, ())
    tier = DiskTier.open(tmp_path, layout, NUM_SLOTS * layout.slot_bytes, b"model-a.")
    assert len(tier.recovered) == 4
    assert tier.stats().faults == {}
    tier.close()


def test_paths_of_any_bytes_are_named_in_any_encoding(
    tmp_path: Path, layout: BlockLayout, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / os.fsdecode(b"k\xff\xc3\xbc")
    tier = fill([place], layout, rows)
    tier.close()
    (tier.folder / "LOCK").unlink()
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["verify", str(place)]) == 1
    out.flush()
    assert b"k\\udcff\\xfc/6d6f64656c2d612e/LOCK is missing" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_into_eighty_columns(
    tmp_path: Path, layout: BlockLayout, rows: Rows, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill([tmp_path], layout, rows).close()
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["verify", str(tmp_path)]) == 0
    assert "unreadable" in capsys.readouterr().out


def test_directories_that_do_not_belong_together_are_said_so(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    fill(places, layout, rows).close()
    for given, sentence in (
        (places[:1], "is the first of 2 directories"),
        (places[1:], "is directory 2 of 2"),
        ([places[0], tmp_path / "c"], "is not directory 2 of the tier"),
    ):
        (report,) = verify_directories(given)
        assert sentence in report.problems[0]
        assert report.num_blocks == 0


@pytest.mark.parametrize("name", ["STRIPE", "journal.log"])
def test_a_damaged_header_is_a_problem_and_no_error(tmp_path: Path, layout: BlockLayout, rows: Rows, name: str) -> None:
    tier = fill([tmp_path], layout, rows)
    tier.close()
    path = tier.folder / name
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    (report,) = verify_directories([tmp_path])
    assert "damaged" in report.problems[0]
