"""A trace replay as a picture: hit rate over size for each policy, and hit rate over bytes written."""

from pathlib import Path

from dynamo.perf.report import Report

__all__ = ["draw"]


def draw(report: Report, path: Path) -> str | None:
    """Writes a PNG.

    Returns:
        None, or why there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed; pip install 'dynamo-kv[perf]' brings it"
    rates = [r for r in report.results if r.metric == "prefix hits"]
    written = {(r.case, r.subject): r.value for r in report.results if r.metric == "written"}
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_size, by_bytes = figure.subplots(1, 2)
    one_tier = [r for r in rates if r.case.endswith("blocks")]
    for subject in dict.fromkeys(r.subject for r in one_tier):
        points = [(float(r.case.split(" %")[0]), r.value) for r in one_tier if r.subject == subject]
        by_size.plot(*zip(*points, strict=True), marker="o", label=subject)
    by_size.set_xscale("log")
    sizes = sorted({float(r.case.split(" %")[0]) for r in one_tier})
    by_size.set_xticks(sizes, [f"{size:g}" for size in sizes])
    by_size.minorticks_off()
    by_size.set_xlabel("capacity, % of the trace's different blocks")
    writing = [r for r in rates if r.case.startswith("writing")]
    for case in dict.fromkeys(r.case for r in writing):
        adaptive = sorted(
            (written[case, r.subject], r.value) for r in writing if r.case == case and r.subject.startswith("adaptive")
        )
        line = by_bytes.plot(*zip(*adaptive, strict=True), marker="o", label=f"adaptive, {case.split(', ')[1]}")[0]
        for subject, marker in (("second sighting", "x"), ("admit always", "s")):
            points = [(written[case, subject], r.value) for r in writing if (r.case, r.subject) == (case, subject)]
            by_bytes.scatter(*zip(*points, strict=True), marker=marker, color=line.get_color())
    by_bytes.set_xlabel("TB written a day; crosses: second sighting, squares: everything")
    for axes in (by_size, by_bytes):
        axes.set_ylabel("prefix hits, %")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(report.title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return None
