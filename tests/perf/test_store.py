"""The save and load benchmark, on small sizes."""

import argparse
import errno
import io
import json
import os
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.store import SHAPES, add_arguments, run

QUIET = Console(file=io.StringIO())


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder whose file system has direct I/O."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip("the temporary folder has no O_DIRECT")
        raise
    (tmp_path / "probe").unlink()
    return tmp_path


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_block_sizes_are_those_promised() -> None:
    assert {name: shape.spec.layout.slot_bytes for name, shape in SHAPES.items()} == {
        "8b": 2 << 20,
        "small": 64 << 10,
        "demo": 32 << 10,
    }


def test_the_demo_shape_is_the_demo_models() -> None:
    config = json.loads((files("dynamo.serve.demo") / "model" / "config.json").read_text())
    shape = SHAPES["demo"]
    assert shape.num_layers == config["num_hidden_layers"]
    assert shape.num_kv_heads == config["num_key_value_heads"]
    assert shape.head_dim == config["head_dim"]


def test_every_tier_stands_beside_its_ceiling(disk: Path) -> None:
    report = run(options("--shape", "demo", "--size", "2MiB", "--repeats", "1", "--path", str(disk)), QUIET)
    rates = {(r.subject.split(",")[0], r.metric): r.value for r in report.results if r.unit == "GB/s"}
    subjects = {subject for subject, _ in rates}
    assert {"host tier", "memcpy", "raw O_DIRECT"} < subjects
    assert len([subject for subject in subjects if subject.startswith("disk tier (")]) == 1
    assert all(rates[subject, metric] > 0 for subject in subjects for metric in ("save", "load"))
    shares = [r for r in report.results if r.unit == "%"]
    assert {(r.subject.split(" (")[0], r.metric) for r in shares} == {
        (tier, metric) for tier in ("host tier", "disk tier") for metric in ("save share", "load share")
    }
    assert list(disk.iterdir()) == [], "everything written is removed"
    assert str(disk) not in json.dumps(report.parameters)


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="measure less, or give another --path"):
        run(options("--size", "1000000GiB", "--path", str(tmp_path)), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_size_below_two_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="fewer than 2 blocks of 2 MiB"):
        run(options("--shape", "8b", "--size", "2MiB", "--path", str(tmp_path)), QUIET)
