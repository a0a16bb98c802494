"""Results as people read them (a table) and as programs do (JSON lines)."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dynamo.perf.machine import MachineRecord

__all__ = ["MEASURED", "Report", "Result", "print_report", "write_report"]

MEASURED = "measured"
"""Source of a result that this very run measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One number.

    Attributes:
        case: what was done, such as "cold".
        subject: who did it, such as "dynamo-kv" or "raw O_DIRECT".
        metric: what was measured; with `subject`, names a column of the table.
        samples: runs the value is the median of; None where it is no median.
        source: MEASURED, or where a number that was measured elsewhere comes from.
    """

    case: str
    subject: str
    metric: str
    value: float
    unit: str
    samples: int | None = None
    source: str = MEASURED


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of one benchmark.

    Attributes:
        parameters: what the run was asked to do; no paths, so that results can be published.
        notes: what a reader must know to read the numbers right.
        epilogue: lines printed after all else, never written to a file: they may name paths.
        exit_status: of the command that made this report.
    """

    benchmark: str
    title: str
    machine: MachineRecord
    parameters: dict[str, str | int | float]
    results: Sequence[Result]
    notes: Sequence[str] = ()
    epilogue: Sequence[str] = ()
    exit_status: int = 0


def print_report(report: Report, console: Console) -> None:
    """One row for each case and subject, one column for each metric, then sources and notes."""
    columns = list(dict.fromkeys((result.metric, result.unit) for result in report.results))
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for result in report.results:
        rows.setdefault((result.case, result.subject, result.source), {})[result.metric] = result.value
    sources = list(dict.fromkeys(source for _, _, source in rows if source != MEASURED))
    table = Table(title=report.title, title_justify="left", title_style="bold")
    table.add_column("case")
    table.add_column("subject")
    for metric, unit in columns:
        table.add_column(f"{metric}\n{unit}", justify="right")
    previous = None
    for (case, subject, source), values in rows.items():
        mark = f" [{sources.index(source) + 1}]" if source in sources else ""
        cells = [_number(values[metric]) if metric in values else "" for metric, _ in columns]
        if previous not in (None, case):
            table.add_section()
        table.add_row("" if case == previous else case, (subject + mark).replace("[", r"\["), *cells)
        previous = case
    console.print(table)
    for number, source in enumerate(sources, 1):
        console.print(f"[{number}] {source}", markup=False, highlight=False)
    for note in report.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    machine = report.machine
    console.print(
        f"{machine.cpu}, {machine.cpus} CPUs, load {machine.load}, Linux {machine.kernel}, Python {machine.python}, "
        f"torch {machine.versions.get('torch', 'absent')}, commit {machine.commit or 'unknown'}, {machine.started}",
        markup=False,
        highlight=False,
    )
    for line in report.epilogue:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_report(report: Report, folder: Path) -> Path:
    """Writes `<benchmark>-<UTC time>.jsonl` into `folder`, which is made if need be.

    The first line is the run: machine, versions, commit, parameters, notes. Each further line is one result. A file of this
    run that was there before is replaced as a whole, so that being killed meanwhile loses nothing.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.fromisoformat(report.machine.started).strftime("%Y%m%dT%H%M%SZ")
    path = folder / f"{report.benchmark}-{stamp}.jsonl"
    run = {
        "record": "run",
        "benchmark": report.benchmark,
        "title": report.title,
        **dataclasses.asdict(report.machine),
        "parameters": report.parameters,
        "notes": list(report.notes),
    }
    results = [
        {"record": "result", "benchmark": report.benchmark, "started": report.machine.started}
        | dataclasses.asdict(result)
        for result in report.results
    ]
    new = path.with_suffix(".part")
    new.write_text("".join(json.dumps(line) + "\n" for line in (run, *results)))
    return new.replace(path)


def _number(value: float) -> str:
    """Three significant digits or, from 1000 on, whole numbers with separators."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
