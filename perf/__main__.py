"""`python -m dynamo.perf COMMAND`: benchmarks of this machine."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dynamo.kvcache import KVCacheError
from dynamo.perf import blocks, crash, disk, doctor, index, kernels, router, serve, soak, store, trace, ttft
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.interrupts import Interrupts
from dynamo.perf.report import Report, print_report, write_report
from dynamo.serve.path_refusal import path_refusal
from dynamo.tiers.errors import TierError


@dataclass(frozen=True, slots=True)
class _Command:
    """A benchmark: how it appears in the help, which options it takes, and what runs it."""

    group: str
    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], Report]


_COMMANDS = (
    _Command("cache", "blocks", blocks.SUMMARY, blocks.add_arguments, blocks.run),
    _Command("cache", "store", store.SUMMARY, store.add_arguments, store.run),
    _Command("cache", "crash", crash.SUMMARY, crash.add_arguments, crash.run),
    _Command("cache", "disk", disk.SUMMARY, disk.add_arguments, disk.run),
    _Command("cache", "doctor", doctor.SUMMARY, doctor.add_arguments, doctor.run),
    _Command("cache", "index", index.SUMMARY, index.add_arguments, index.run),
    _Command("cache", "kernels", kernels.SUMMARY, kernels.add_arguments, kernels.run),
    _Command("cache", "trace", trace.SUMMARY, trace.add_arguments, trace.run),
    _Command("router", "router", router.SUMMARY, router.add_arguments, router.run),
    _Command("router", "soak", soak.SUMMARY, soak.add_arguments, soak.run),
    _Command("server", "serve", serve.SUMMARY, serve.add_arguments, serve.run),
    _Command("server", "ttft", ttft.SUMMARY, ttft.add_arguments, ttft.run),
)

_FILE_WIDTH = 140  # columns where the output is no terminal


def _parser() -> argparse.ArgumentParser:
    lines = []
    for group in dict.fromkeys(command.group for command in _COMMANDS):
        lines.append(f"{group}:")
        lines += [f"  {c.name:<10}{c.summary}" for c in _COMMANDS if c.group == group]
    parser = argparse.ArgumentParser(
        prog="python -m dynamo.perf",
        description="Benchmarks of this machine. Ceilings are measured in the same run as what is compared with them.",
        epilog="\n".join((*lines, "", "python -m dynamo.perf COMMAND --help shows a command's options.")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = subparsers.add_parser(
            command.name, description=command.summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_arguments(subparser)
        output = subparser.add_argument_group("output")
        output.add_argument("--out", metavar="DIR", type=Path, help="also write the results there as JSON lines")
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    progress = Console(stderr=True)
    interrupts = Interrupts()
    try:
        with interrupts:
            return _run(options, console, progress)
    except (BenchmarkError, KVCacheError, TierError, OSError, MemoryError) as error:
        # What a user can put right: a path, a size, a peer or a server that does not start. Bugs keep their traceback.
        progress.print(f"error: {_sentence(error)}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        progress.print("interrupted; what was written for measuring is removed")
        return interrupts.exit_status


def _run(options: argparse.Namespace, console: Console, progress: Console) -> int:
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)  # before minutes are spent on what cannot be kept
        except OSError as error:
            raise BenchmarkError(f"--out {options.out}: {path_refusal(options.out, error, 'folder')}") from error
    report: Report = options.run(options, progress)
    print_report(report, console)
    if options.out is None:
        progress.print("results not written; --out DIR keeps them as JSON lines", style="dim")
    else:
        console.print(f"written to {write_report(report, options.out)}", markup=False, highlight=False)
    return report.exit_status


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError) and not isinstance(error, KVCacheError | TierError):  # Python's own, or numpy's
        return (
            f"there is not enough memory for a run of this size{f' ({error})' if str(error) else ''}; make it smaller"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
