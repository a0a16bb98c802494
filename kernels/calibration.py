"""How long each way of copying takes: a table of measurements, interpolated; kept as JSON between runs.

A measurement is the time of `count` pieces of `run_bytes` each, scattered so that none can be joined, from submission to
completion. Between measured points time is linear in both, since a copy is a fixed cost, a cost per piece and a cost per
byte; beyond the last points it goes on as between them. Constants do not transfer between machines (vLLM,
https://github.com/vllm-project/vllm/pull/57555), so those that serve where nothing was measured are a fallback only.
"""

import bisect
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import msgspec

from dynamo.kernels.checks import KernelArgumentError

__all__ = [
    "Calibration",
    "Direction",
    "Measurement",
    "Route",
    "default_calibration",
    "load_calibration",
    "save_calibration",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SEARCHED_SIZES = tuple(1 << exponent for exponent in range(8, 27))


class Route(StrEnum):
    """A way of copying."""

    COPY_ENGINE = "copy engine"
    KERNEL = "kernel"
    """`copy_blocks`: zero-copy where one side is host memory."""
    STAGED = "staged"
    HOST = "host"
    """Both sides in host memory: numpy, done when the call returns. Never measured."""


class Direction(StrEnum):
    """Where the bytes go."""

    ONBOARD = "host to device"
    OFFLOAD = "device to host"
    ON_DEVICE = "device to device"
    ON_HOST = "host to host"


class Measurement(msgspec.Struct, frozen=True):
    """`count` scattered pieces of `run_bytes` took `seconds` from submission to completion."""

    route: Route
    direction: Direction
    run_bytes: int
    count: int
    seconds: float

    @property
    def gigabytes_per_s(self) -> float:
        """Payload per second."""
        return self.run_bytes * self.count / self.seconds / 1e9


class Calibration(msgspec.Struct, frozen=True, cache_hash=True):
    """Measurements of one GPU and driver; `device` is the GPU's name, `driver_version` its CUDA version.

    >>> from dynamo.kernels.calibration import Calibration, Direction, Measurement, Route
    >>> point = lambda route, run_bytes, seconds: Measurement(route, Direction.ONBOARD, run_bytes, 100, seconds)
    >>> engine = [point(Route.COPY_ENGINE, 4096, 8e-5), point(Route.COPY_ENGINE, 65536, 1.2e-4)]
    >>> kernel = [point(Route.KERNEL, 4096, 2e-5), point(Route.KERNEL, 65536, 1.4e-4)]
    >>> calibration = Calibration("some GPU", 13000, (*engine, *kernel))
    >>> round(calibration.seconds(Route.COPY_ENGINE, Direction.ONBOARD, 16384, 100), 6)
    8.8e-05
    >>> calibration.crossover(Route.COPY_ENGINE, Route.KERNEL, Direction.ONBOARD, 100)  # where engines begin to win
    65536
    """

    device: str
    driver_version: int
    measurements: tuple[Measurement, ...]
    is_measured: bool = True
    format_version: int = FORMAT_VERSION

    def seconds(self, route: Route, direction: Direction, run_bytes: int, count: int) -> float | None:
        """Expected time of a copy, or None where this route was not measured in this direction.

        Args:
            route: way of copying.
            direction: where the bytes go.
            run_bytes: mean bytes of a piece, at least 1.
            count: pieces, at least 1.
        """
        curves = _curves(self, route, direction)
        return None if not curves else _interpolate(curves, run_bytes, count)

    def crossover(self, route: Route, other: Route, direction: Direction, count: int) -> int | None:
        """Smallest power of two from which on `route` is at least as fast as `other` for `count` pieces; None if never."""
        found = None
        for run_bytes in SEARCHED_SIZES:
            ours, theirs = (self.seconds(r, direction, run_bytes, count) for r in (route, other))
            if ours is None or theirs is None:
                return None
            if ours > theirs:
                found = None
            elif found is None:
                found = run_bytes
        return found

    def table(self) -> str:
        """GB/s as text: one line per direction, route and piece size, one column per number of pieces."""
        counts = sorted({m.count for m in self.measurements})
        origin = "measured" if self.is_measured else "assumed, not measured"
        lines = [f"{self.device}, CUDA {self.driver_version}, {origin}; GB/s by number of pieces"]
        lines.append(f"{'direction':<17}{'route':<12}{'piece':>9}" + "".join(f"{count:>9}" for count in counts))
        cells = {(m.direction, m.route, m.run_bytes, m.count): f"{m.gigabytes_per_s:.4g}" for m in self.measurements}
        for direction, route, run_bytes in sorted({key[:3] for key in cells}):
            row = [cells.get((direction, route, run_bytes, count), "") for count in counts]
            lines.append(f"{direction:<17}{route:<12}{_size(run_bytes):>9}" + "".join(f"{cell:>9}" for cell in row))
        return "\n".join(lines)


def default_calibration() -> Calibration:
    """What is assumed of a GPU on PCIe Gen5 where nothing was measured.

    Copy engines win from runs of 64 KiB; below, a zero-copy kernel loads and staging offloads; a kernel copies on the GPU.
    The points are public reports of an H100's and H20's copy engines and the arithmetic of bytes in flight.

    >>> from dynamo.kernels.calibration import default_calibration, Direction, Route
    >>> calibration = default_calibration()
    >>> calibration.crossover(Route.COPY_ENGINE, Route.KERNEL, Direction.ONBOARD, 4096)
    65536
    >>> calibration.crossover(Route.COPY_ENGINE, Route.STAGED, Direction.OFFLOAD, 4096)
    65536
    >>> print(calibration.table().splitlines()[0])
    GPU, CUDA 0, assumed, not measured; GB/s by number of pieces
    """
    points = []
    for (route, direction), (fixed_s, rates) in ASSUMED.items():
        for run_bytes, gigabytes_per_s in rates.items():
            for count in (1, 64, 4096, 65536):
                seconds = fixed_s + run_bytes * count / (gigabytes_per_s * 1e9)
                points.append(Measurement(route, direction, run_bytes, count, seconds))
    return Calibration("GPU", 0, tuple(points), is_measured=False)


_ENGINE_RATES = {512: 0.16, 4096: 1.3, 24576: 6.3, 28672: 42.0, 32768: 44.0, 65536: 52.0, 1 << 20: 55.0}
ASSUMED: Mapping[tuple[Route, Direction], tuple[float, Mapping[int, float]]] = {
    # seconds per transfer, then GB/s by bytes of a piece
    (Route.COPY_ENGINE, Direction.ONBOARD): (6e-6, _ENGINE_RATES),
    (Route.COPY_ENGINE, Direction.OFFLOAD): (6e-6, _ENGINE_RATES),
    (Route.COPY_ENGINE, Direction.ON_DEVICE): (6e-6, {512: 0.2, 65536: 25.0, 1 << 20: 400.0, 1 << 26: 1600.0}),
    (Route.KERNEL, Direction.ONBOARD): (6e-6, {64: 20.0, 512: 45.0, 4096: 49.0, 1 << 20: 51.0}),
    (Route.KERNEL, Direction.OFFLOAD): (6e-6, {64: 15.0, 512: 30.0, 4096: 40.0, 1 << 20: 42.0}),
    (Route.KERNEL, Direction.ON_DEVICE): (5e-6, {64: 1500.0, 256: 1900.0, 1 << 20: 1950.0}),
    (Route.STAGED, Direction.ONBOARD): (6e-5, {64: 40.0, 256: 44.0, 1 << 20: 45.0}),
    (Route.STAGED, Direction.OFFLOAD): (2e-5, {64: 45.0, 256: 50.0, 65536: 51.0, 1 << 20: 51.0}),
}


def load_calibration(device: str, driver_version: int, folder: Path | None = None) -> Calibration | None:
    """What `save_calibration` wrote for this GPU and driver, or None; a file that cannot be used is logged and ignored.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from dynamo.kernels.calibration import Calibration, load_calibration, save_calibration
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_calibration(Calibration("NVIDIA H200", 13000, ()), Path(folder))
    ...     found = load_calibration("NVIDIA H200", 13000, Path(folder))
    ...     load_calibration("NVIDIA H200", 12080, Path(folder)) is None, found.device
    (True, 'NVIDIA H200')

    Args:
        device: name of the GPU.
        driver_version: its driver's CUDA version.
        folder: where to look; by default `dynamo-kv` below the user's cache folder.
    """
    path = _cache_path(device, driver_version, folder)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
        _check(found, device, driver_version)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, KernelArgumentError) as error:
        logger.warning("ignored the calibration in %s, which is measured again: %s", path, error)
        return None
    return found


def save_calibration(calibration: Calibration, folder: Path | None = None) -> Path:
    """Writes a calibration where `load_calibration` finds it, all or nothing, and returns the path.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from dynamo.kernels.calibration import Calibration, save_calibration
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_calibration(Calibration("NVIDIA H200", 13000, ()), Path(folder)).name
    'calibration-nvidia-h200-13000.json'

    Raises:
        OSError: the folder cannot be written.
    """
    path = _cache_path(calibration.device, calibration.driver_version, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(calibration), indent=1))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _size(num_bytes: int) -> str:
    unit = next((i for i, limit in enumerate((1 << 10, 1 << 20, 1 << 30)) if num_bytes < limit), 3)
    return f"{num_bytes / (1 << 10 * unit):g} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _cache_path(device: str, driver_version: int, folder: Path | None) -> Path:
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo-kv"
    return folder / f"calibration-{re.sub('[^a-z0-9]+', '-', device.lower())}-{driver_version}.json"


def _check(found: Calibration, device: str, driver_version: int) -> None:
    if found.format_version != FORMAT_VERSION or (found.device, found.driver_version) != (device, driver_version):
        raise KernelArgumentError(f"it is format {found.format_version} of {found.device}, CUDA {found.driver_version}")
    for m in found.measurements:
        if m.run_bytes < 1 or m.count < 1 or not 0 < m.seconds < math.inf:
            raise KernelArgumentError(f"{m} cannot have been measured")


Curves = list[tuple[int, list[tuple[int, float]]]]
"""By ascending bytes of a piece: (number of pieces, seconds) by ascending number."""


@lru_cache(maxsize=64)  # sorting costs as much as planning a small copy
def _curves(calibration: Calibration, route: Route, direction: Direction) -> Curves:
    by_size: dict[int, list[tuple[int, float]]] = {}
    for m in calibration.measurements:
        if m.route == route and m.direction == direction:
            by_size.setdefault(m.run_bytes, []).append((m.count, m.seconds))
    return sorted((size, sorted(points)) for size, points in by_size.items())


def _interpolate(curves: Curves, run_bytes: int, count: int) -> float:
    points = [(size, _along(counts, count)) for size, counts in curves]
    return _along(points, run_bytes)


def _along(points: list[tuple[int, float]], x: int) -> float:
    """Piecewise linear; constant before the first point, on the last line after the last, in proportion if there is one."""
    i = bisect.bisect_right(points, x, key=lambda point: point[0])
    if i == 0:
        return points[0][1]
    if len(points) == 1:
        return points[0][1] * (x / points[0][0])
    (low, at_low), (high, at_high) = points[i - 1 : i + 1] if i < len(points) else points[-2:]
    slope = (at_high - at_low) / (high - low)
    if i == len(points):
        return at_high + max(slope, 0.0) * (x - high)
    return at_low + slope * (x - low)
