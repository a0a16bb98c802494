"""The tuning run as a picture: GB/s over queue depth for each call size, and the tier beside the raw device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamo.kvcache.config import format_size
from dynamo.perf.disk_sweep import Measured
from dynamo.perf.report import Report

__all__ = ["draw_disk"]

_OURS, _RAW, _OTHERS = "#2f6f4f", "#444444", "#b9b4a8"


def draw_disk(report: Report, found: Sequence[Measured], path: Path) -> str | None:
    """Writes a PNG.

    Args:
        found: the sweep.

    Returns:
        None, or why there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed; pip install 'dynamo-kv[perf]' brings it"
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 2))
    sizes = sorted({each.way.call_bytes for each in found})
    for column, writes in enumerate((False, True)):
        axes = upper.add_subplot(1, 2, column + 1)
        for size in sizes:
            points = {
                each.way.depth: each.rate(writes=writes)
                for each in found
                if each.way.call_bytes == size and not each.change
            }
            depths = sorted(points)
            axes.plot(depths, [points[depth] for depth in depths], marker="o", label=f"{format_size(size)} calls")
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xlabel("calls in flight")
        axes.set_ylabel("GB/s")
        axes.set_ylim(bottom=0)
        axes.set_title(f"raw O_DIRECT {'writes' if writes else 'reads'}, shuffled", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _draw_shares(report, lower.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return None


def _draw_shares(report: Report, axes: Any) -> None:
    """Bars of what the tier, and its peers, reach of the raw device."""
    bars = [r for r in report.results if r.metric.endswith(" share") and r.case.endswith(" blocks")]
    labels = [f"{bar.case}, {bar.metric.removesuffix(' share')} · {bar.subject}" for bar in bars]
    colours = [_OURS if "tier" in b.subject else _RAW if b.subject.startswith("raw") else _OTHERS for b in bars]
    axes.barh(range(len(bars)), [bar.value for bar in bars], color=colours)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(90, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("% of the raw device at its best depth, measured in turn")
