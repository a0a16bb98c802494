"""The kernel benchmark as a picture: every measured share of its ceiling as a bar."""

from pathlib import Path

from dynamo.perf.report import Report

__all__ = ["SHARE_SUFFIX", "draw"]

SHARE_SUFFIX = "of ceiling"
"""Metrics that end so are percentages of a ceiling measured beside them."""

_BAR_INCHES = 0.24
_OURS, _OTHERS = "#2f6f4f", "#b9b4a8"


def draw(report: Report, path: Path) -> str | None:
    """Writes a PNG.

    Returns:
        None, or why there is none.
    """
    bars = [r for r in report.results if r.metric == f"payload {SHARE_SUFFIX}"]
    if not bars:
        return "no plot: nothing was measured against a ceiling"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed; pip install 'dynamo-kv[perf]' brings it"
    labels = [f"{bar.case} · {bar.subject}" for bar in bars]
    figure = Figure(figsize=(11, 1.5 + _BAR_INCHES * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = [_OURS if bar.subject.startswith("dynamo-kv") else _OTHERS for bar in bars]
    axes.barh(range(len(bars)), [bar.value for bar in bars], color=colours)
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of the ceiling measured in the same run")
    axes.set_title(report.title, fontsize=10)
    axes.margins(y=0.005)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return None
