"""`python -m dynamo.kvcache verify PATH...` checks a disk tier's blocks; it changes nothing."""

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dynamo.tiers.errors import TierBusyError, TierUnavailableError
from dynamo.tiers.verify import NamespaceReport, verify_directories

_EXIT_BAD = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 when all is well, 1 when something is bad, 2 when there was nothing to check."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have any bytes, and a terminal any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        return _verify(options.path)
    except (TierBusyError, TierUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dynamo.kvcache", description="Looks after a KV cache on disk.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser(
        "verify",
        help="check every block of a disk tier against its digest; changes nothing",
        description="Checks identities, index and every block of a disk tier that no process uses. Changes nothing. "
        "Exit status: 0 all is well, 1 something is bad, 2 nothing could be checked.",
    )
    verify.add_argument(
        "path",
        type=Path,
        nargs="+",
        help="directory of the disk tier, or one model's folder in it; all directories, in their order, if it has several",
    )
    return parser


def _verify(directories: list[Path]) -> int:
    console = Console()
    with Progress(
        TextColumn("checking blocks"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("", total=None)
        reports = verify_directories(
            directories, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if not reports:
        print(
            f"error: {directories[0]} holds no disk tier; give the directory of --disk-cache, with several all of them",
            file=sys.stderr,
        )
        return _EXIT_USAGE
    console.print(_table(reports))
    for report in reports:
        for problem in report.problems:
            console.print(f"{report.folder.name}: {problem}", markup=False, soft_wrap=True)
    return _EXIT_BAD if any(report.problems for report in reports) else 0


def _table(reports: list[NamespaceReport]) -> Table:
    table = Table(collapse_padding=True)  # eighty columns must do
    table.add_column("model's folder", no_wrap=True)
    for name in ("blocks", "good", "corrupt", "unreadable", "GB", "GB/s"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for report in reports:
        gigabytes = report.read_bytes / 1e9
        table.add_row(
            report.folder.name,
            *(
                f"{count:,}"
                for count in (report.num_blocks, report.num_good, report.num_corrupt, report.num_unreadable)
            ),
            f"{gigabytes:.2f}",
            f"{gigabytes / report.seconds:.2f}" if report.seconds and gigabytes else "-",
            "bad" if report.problems else "ok",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
