"""Calibration: measured once per GPU and driver, kept safely, interpolated sensibly."""

import itertools
import logging
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo.kernels.calibrate import calibrate, measure
from dynamo.kernels.calibration import (
    Calibration,
    Direction,
    Measurement,
    Route,
    default_calibration,
    load_calibration,
    save_calibration,
)
from dynamo.kernels.fake_driver import FakeDriver


def grid(seconds_at: dict[tuple[int, int], float], route: Route = Route.KERNEL) -> Calibration:
    points = [Measurement(route, Direction.ONBOARD, size, count, t) for (size, count), t in seconds_at.items()]
    return Calibration("GPU", 13000, tuple(points))


def expect(calibration: Calibration, run_bytes: int, count: int) -> float:
    seconds = calibration.seconds(Route.KERNEL, Direction.ONBOARD, run_bytes, count)
    assert seconds is not None
    return seconds


def test_measured_points_are_returned_as_they_are() -> None:
    calibration = grid({(512, 1): 1e-5, (512, 100): 2e-5, (4096, 1): 1.5e-5, (4096, 100): 9e-5})
    for m in calibration.measurements:
        assert expect(calibration, m.run_bytes, m.count) == pytest.approx(m.seconds)


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 17))
def test_a_fixed_cost_a_cost_per_piece_and_one_per_byte_are_recovered_exactly(run_bytes: int, count: int) -> None:
    def cost(size: int, n: int) -> float:
        return 5e-6 + n * (1e-7 + size / 50e9)

    sizes, counts = (1, 4096, 1 << 20), (1, 64, 4096)
    calibration = grid({(size, n): cost(size, n) for size, n in itertools.product(sizes, counts)})
    assert expect(calibration, run_bytes, count) == pytest.approx(cost(run_bytes, count))


@given(st.integers(1, 1 << 22), st.integers(1, 1 << 17), st.integers(1, 1 << 16))
def test_more_pieces_never_take_less_time(run_bytes: int, count: int, more: int) -> None:
    calibration = default_calibration()
    for route, direction in itertools.product((Route.COPY_ENGINE, Route.KERNEL), list(Direction)[:3]):
        fewer = calibration.seconds(route, direction, run_bytes, count)
        later = calibration.seconds(route, direction, run_bytes, count + more)
        assert fewer is not None
        assert later is not None
        assert fewer <= later


def test_sizes_left_out_for_some_counts_are_extrapolated() -> None:
    calibration = grid({(512, 1): 1e-5, (512, 1000): 1e-4, (1 << 20, 1): 3e-5})
    assert expect(calibration, 1 << 20, 1000) == pytest.approx(3e-2)
    assert expect(calibration, 64, 1) == pytest.approx(1e-5)  # smaller pieces cost no less than the smallest measured
    assert expect(calibration, 512, 1999) == pytest.approx(1e-4 + 9e-5)


def test_what_was_not_measured_is_unknown() -> None:
    calibration = grid({(512, 1): 1e-5})
    assert calibration.seconds(Route.STAGED, Direction.ONBOARD, 512, 1) is None
    assert calibration.seconds(Route.KERNEL, Direction.OFFLOAD, 512, 1) is None
    assert calibration.crossover(Route.KERNEL, Route.STAGED, Direction.ONBOARD, 10) is None


def test_the_crossover_is_where_a_route_wins_for_good() -> None:
    kernel = grid({(256, 1): 1e-6, (1 << 26, 1): 1.0}).measurements
    engine = grid({(256, 1): 1e-5, (1 << 26, 1): 0.5}, Route.COPY_ENGINE).measurements
    calibration = Calibration("GPU", 13000, (*kernel, *engine))
    found = calibration.crossover(Route.COPY_ENGINE, Route.KERNEL, Direction.ONBOARD, 1)
    assert found == 2048
    for size, wins in ((found, True), (found // 2, False)):
        ours = calibration.seconds(Route.COPY_ENGINE, Direction.ONBOARD, size, 1)
        theirs = calibration.seconds(Route.KERNEL, Direction.ONBOARD, size, 1)
        assert ours is not None
        assert theirs is not None
        assert (ours <= theirs) is wins
    assert calibration.crossover(Route.KERNEL, Route.COPY_ENGINE, Direction.ONBOARD, 1) is None


def test_it_is_measured_once_per_gpu_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def few(driver: FakeDriver, *, device: int) -> list[Measurement]:
        measured.append(driver.driver_version)
        return list(measure(driver, device=device, run_bytes=[512], counts=[4], max_bytes=4096))

    monkeypatch.setattr("dynamo.kernels.calibrate.measure", few)
    first = calibrate(FakeDriver(), folder=tmp_path)
    assert calibrate(FakeDriver(), folder=tmp_path) == first
    assert measured == [13000]
    calibrate(FakeDriver(version=12080), folder=tmp_path)
    calibrate(FakeDriver(), folder=tmp_path, refresh=True)
    assert measured == [13000, 12080, 13000]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration-fake-gpu-0-12080.json",
        "calibration-fake-gpu-0-13000.json",
    ]


def test_the_cache_is_below_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration("NVIDIA H200", 13000, ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert save_calibration(calibration) == tmp_path / "dynamo-kv" / "calibration-nvidia-h200-13000.json"
    assert load_calibration("NVIDIA H200", 13000) == calibration
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert save_calibration(calibration).parent == tmp_path / "home" / ".cache" / "dynamo-kv"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"device": "NVIDIA', id="cut-off"),
        pytest.param(b"[]", id="other-shape"),
        pytest.param(b'{"device": "other", "driver_version": 13000, "measurements": []}', id="other-gpu"),
        pytest.param(
            b'{"device": "GPU", "driver_version": 13000, "measurements": [], "format_version": 99}', id="other-format"
        ),
        pytest.param(
            msgspec.json.encode(grid({(512, 1): 1e-5})).replace(b"512", b"0"),
            id="impossible-size",
        ),
        pytest.param(msgspec.json.encode(grid({(512, 1): -1.0})), id="negative-time"),
        pytest.param(b"\xff\xfe", id="not-text"),
    ],
)
def test_a_file_that_cannot_be_used_is_logged_and_ignored(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_calibration(Calibration("GPU", 13000, ()), tmp_path)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load_calibration("GPU", 13000, tmp_path) is None
    assert str(path) in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dynamo.kernels.calibrate.measure", lambda driver, device: [])
    occupied = tmp_path / "file"
    occupied.write_text("")
    with caplog.at_level(logging.WARNING):
        assert calibrate(FakeDriver(), folder=occupied).device == "Fake GPU 0"
    assert "could not keep the calibration" in caplog.text


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = grid({(512, 1): 1e-5})
    save_calibration(old, tmp_path)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_calibration(grid({(512, 1): 2e-5}), tmp_path)
    assert load_calibration("GPU", 13000, tmp_path) == old
    assert len(list(tmp_path.iterdir())) == 1


def test_every_route_is_measured_in_every_direction_it_has() -> None:
    ticks = itertools.count()
    driver = FakeDriver(deferred=True)
    points = list(
        measure(
            driver,
            run_bytes=[64, 1024],
            counts=[1, 16, 512],
            max_bytes=1 << 16,
            clock=lambda: next(ticks) * 1e-3,
        )
    )
    routes = {(p.route, p.direction) for p in points}
    both_ways = itertools.product(
        (Route.COPY_ENGINE, Route.KERNEL, Route.STAGED), (Direction.ONBOARD, Direction.OFFLOAD)
    )
    on_device = [(Route.COPY_ENGINE, Direction.ON_DEVICE), (Route.KERNEL, Direction.ON_DEVICE)]
    assert routes == {*both_ways, *on_device}
    assert {(p.run_bytes, p.count) for p in points} == {(64, 1), (64, 16), (64, 512), (1024, 1), (1024, 16)}
    assert all(p.seconds == pytest.approx(1e-3) for p in points)
    assert driver.count("stream_destroy") == 2


def test_a_gpu_that_hangs_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.kernels.calibrate.TIMEOUT_S", 0.0)
    with pytest.raises(TimeoutError, match="did not finish within"):
        list(measure(FakeDriver(deferred=True), run_bytes=[64], counts=[16], max_bytes=4096))


def test_the_table_shows_rates_by_size_and_count() -> None:
    text = grid({(512, 1): 512e-9, (512, 64): 64 * 512e-9, (2 << 20, 1): 1e-3}).table().splitlines()
    assert text[0] == "GPU, CUDA 13000, measured; GB/s by number of pieces"
    assert text[1].split() == ["direction", "route", "piece", "1", "64"]
    assert text[2].split() == ["host", "to", "device", "kernel", "512", "B", "1", "1"]
    assert text[3].split() == ["host", "to", "device", "kernel", "2", "MiB", "2.097"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_can_be_calibrated(tmp_path: Path) -> None:
    from dynamo.kernels.cuda_runtime import cuda_driver

    calibration = calibrate(cuda_driver(), folder=tmp_path)
    assert load_calibration(calibration.device, calibration.driver_version, tmp_path) == calibration
    rates = {m.route: m.gigabytes_per_s for m in calibration.measurements if m.run_bytes * m.count == 64 << 20}
    assert rates.keys() == {Route.COPY_ENGINE, Route.KERNEL, Route.STAGED}
    assert min(rates.values()) > 0.1
