"""Durability of the disk tier on this storage: a process is killed again and again while it loads and saves.

A worker process opens a cache over one folder, loads and compares every block that survived, and then goes on opening,
writing and committing sequences until it is killed with SIGKILL at a random moment. In the second half of the rounds files are
damaged as well: bits are flipped, sectors zeroed, the end cut off. A folder that is refused then is emptied, as the refusal
asks for. What a block must contain follows from its key, so every byte that comes back is checked. Nothing here is a stub:
real processes, real files, the cache's public face.
"""

import argparse
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from dynamo.kvcache.hashing import BlockKey
from dynamo.perf.crash_worker import Message, Recovered, Workload, work
from dynamo.perf.harness import BenchmarkError, median
from dynamo.perf.interrupts import put_off
from dynamo.perf.machine import machine_record
from dynamo.perf.option_checks import check_folder
from dynamo.perf.report import Report, Result

__all__ = ["SUMMARY", "Tally", "add_arguments", "crash_rounds", "damage", "run"]

SUMMARY = "kill -9 during loads and saves, with damaged files: wrong bytes, lost blocks, restarts"

Damage = Literal["flipped bits", "zeroed sector", "cut"]

_ANSWER_TIMEOUT_S = 60.0
_EARLY_SHARE = 0.15  # of the kills that fall into the opening of the cache or the check of what survived
_EARLY_KILL_S = 0.2
_LATE_KILL_S = 0.3
_SECTOR_BYTES = 512


@dataclass(slots=True)
class Tally:
    """What came of the rounds.

    Attributes:
        num_checked: blocks whose bytes were compared, over all rounds.
        num_wrong: blocks with other bytes than were once written.
        num_early: kills before everything that survived was checked.
        num_damaged: rounds after which files were damaged.
        num_refused: restarts that found the folder damaged so that it passed for another program's.
        num_unusable: blocks found by a restart before any damage that could not be loaded. After damage, blocks whose prefix
            was lost lie there unusable until it is computed again.
        lost: blocks known to be on disk before a kill and not there after it, for each kill before any damage.
        survivors: blocks found by each restart.
        restart_s: seconds that the opening of the cache took.
    """

    num_checked: int = 0
    num_wrong: int = 0
    num_early: int = 0
    num_damaged: int = 0
    num_refused: int = 0
    num_unusable: int = 0
    lost: list[int] = field(default_factory=list)
    survivors: list[int] = field(default_factory=list)
    restart_s: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    workload = parser.add_argument_group("workload")
    workload.add_argument("--path", metavar="DIR", default=".", help="where the disk tier's folder is made")
    workload.add_argument("--rounds", type=int, default=100, help="processes that are killed")
    workload.add_argument("--blocks", type=int, default=512, help="blocks the disk tier has room for")
    workload.add_argument("--block-kib", type=int, default=16, help="KiB of a block, a multiple of 8")
    workload.add_argument(
        "--damage", type=float, default=50.0, help="per cent of the rounds of the second half that also damage files"
    )
    workload.add_argument("--seed", type=int, default=0, help="of everything that is random")


def run(options: argparse.Namespace, console: Console) -> Report:
    """Runs all rounds.

    Raises:
        BenchmarkError: options are out of range, the worker does not start, or a block came back wrong or unusable.
    """
    if options.rounds < 1 or options.blocks < 32 or options.block_kib < 8 or options.block_kib % 8:
        raise BenchmarkError("--rounds must be at least 1, --blocks at least 32, --block-kib a multiple of 8")
    if not 0 <= options.damage <= 100:
        raise BenchmarkError(f"--damage is {options.damage:g}; it is a percentage, from 0 to 100")
    check_folder(Path(options.path), 1024 * options.block_kib * options.blocks)
    machine = machine_record()
    with tempfile.TemporaryDirectory(prefix="dynamo-crash-", dir=options.path) as folder:
        workload = Workload(Path(folder), options.blocks, options.block_kib, options.seed)
        tally = crash_rounds(
            workload,
            options.rounds,
            options.damage / 100,
            lambda rounds: track(rounds, description="rounds", console=console, transient=True),
        )
    if tally.num_wrong or tally.num_unusable:
        raise BenchmarkError(
            f"{tally.num_wrong} of {tally.num_checked} blocks came back with wrong bytes, and {tally.num_unusable} were "
            f"found but not usable; --seed {options.seed} shows it again"
        )
    return Report(
        benchmark="crash",
        title=f"{options.rounds} rounds of kill -9 while blocks are loaded and saved",
        machine=machine,
        parameters={name: getattr(options, name) for name in ("rounds", "blocks", "block_kib", "damage", "seed")},
        results=list(_results(tally)),
        notes=(
            "lost: blocks that the disk tier had announced and that a restart did not find, before any damage; those evicted "
            "in the last moment before the kill are among them",
            "every block's bytes follow from its key and were compared whenever it came from any tier",
        ),
    )


def crash_rounds(
    workload: Workload, num_rounds: int, damage_share: float, watch: Callable[[range], Iterable[int]] = iter
) -> Tally:
    """Runs and kills `num_rounds` workers one after the other.

    Args:
        damage_share: of the rounds of the second half, those after which files are damaged.
        watch: wraps the rounds, to show progress.

    Raises:
        BenchmarkError: a worker died by itself or does not answer within a minute, or refused an undamaged folder.
    """
    chance = random.Random(workload.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dynamo.perf.crash_worker"])
    forkserver.ensure_running()
    tally = Tally()
    known: set[BlockKey] = set()
    is_clean = True
    for number in watch(range(num_rounds)):
        num_refused = tally.num_refused
        known = _round(context, workload, number, chance, tally, known if is_clean else None)
        if tally.num_refused > num_refused:
            if is_clean:
                raise BenchmarkError(
                    f"the worker of round {number} found the disk tier's folder refused without damage"
                )
            _empty(workload.folder)  # or all rounds from here on would be without a disk tier
        elif number >= num_rounds // 2 and chance.random() < damage_share and damage(workload.folder, chance):
            tally.num_damaged += 1
            is_clean = False
    return tally


def _round(
    context: ForkServerContext,
    workload: Workload,
    number: int,
    chance: random.Random,
    tally: Tally,
    known: set[BlockKey] | None,
) -> set[BlockKey]:
    """One worker's life. `known`: what is on disk at its start, None if files were damaged; returns what is at its end."""
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(workload, number, far), daemon=True)
    on_disk: set[BlockKey] | None = None
    is_early = chance.random() < _EARLY_SHARE
    try:
        with put_off():  # until its id is known: it could not be killed
            process.start()
        far.close()
        if is_early:
            time.sleep(chance.uniform(0, _EARLY_KILL_S))
        else:
            recovered = _receive(near, process.is_alive)
            if not isinstance(recovered, Recovered):
                raise BenchmarkError(f"the worker of round {number} began with {recovered!r}")
            _count(recovered, tally, known)
            on_disk = set(recovered.usable)
            time.sleep(chance.uniform(0, _LATE_KILL_S))
    finally:
        if process.pid is not None:
            process.kill()
            process.join(_ANSWER_TIMEOUT_S)
    for message in _rest(near):
        if isinstance(message, Recovered):  # it was faster than the kill
            _count(message, tally, known)
            on_disk = set(message.usable)
            is_early = False
        else:
            tally.num_checked += message.num_checked
            tally.num_wrong += message.num_wrong
            if on_disk is not None:
                on_disk = (on_disk | message.stored) - message.removed
    near.close()
    tally.num_early += is_early
    return (known or set()) if on_disk is None else on_disk


def _count(recovered: Recovered, tally: Tally, known: set[BlockKey] | None) -> None:
    tally.num_checked += len(recovered.usable)
    tally.num_wrong += recovered.num_wrong
    tally.num_refused += recovered.is_refused
    tally.survivors.append(recovered.num_found)
    tally.restart_s.append(recovered.open_s)
    if known is not None:
        tally.lost.append(len(known - recovered.usable))
        tally.num_unusable += recovered.num_found - len(recovered.usable)


def _receive(connection: Connection, is_alive: Callable[[], bool]) -> Message:
    try:
        if connection.poll(_ANSWER_TIMEOUT_S):
            message: Message = connection.recv()
            return message
    except EOFError:
        raise BenchmarkError("the worker died by itself; its output above says why") from None
    state = "is still running" if is_alive() else "has ended"
    raise BenchmarkError(f"the worker said nothing for {_ANSWER_TIMEOUT_S:g} s and {state}")


def _rest(connection: Connection) -> Iterator[Message]:
    """What a killed worker had sent. A message that the kill cut short ends it."""
    try:
        while connection.poll(0):
            yield connection.recv()
    except (EOFError, OSError):
        return


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def damage(folder: Path, chance: random.Random) -> Damage | None:
    """Damages one file of a disk tier that no process has open, somewhere, as failing storage would; None without any."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if not paths:
        return None
    path = chance.choice(paths)
    size_bytes = path.stat().st_size
    kinds: tuple[Damage, ...] = ("flipped bits", "zeroed sector", "cut")
    kind = chance.choice(kinds)
    with path.open("r+b") as file:
        if kind == "cut":
            file.truncate(chance.randrange(size_bytes))
        elif kind == "zeroed sector":
            file.seek(chance.randrange(size_bytes) // _SECTOR_BYTES * _SECTOR_BYTES)
            file.write(bytes(_SECTOR_BYTES))
        else:
            for _ in range(chance.randint(1, 8)):
                place = chance.randrange(size_bytes)
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return kind


def _results(tally: Tally) -> Iterator[Result]:
    for case, total in (
        ("kills before everything was checked", tally.num_early),
        ("kills followed by damage", tally.num_damaged),
        ("restarts that refused the folder", tally.num_refused),
        ("blocks compared", tally.num_checked),
        ("blocks with wrong bytes", tally.num_wrong),
        ("blocks found but not usable", tally.num_unusable),
    ):
        yield Result(case=case, subject="dynamo-kv", metric="total", value=total, unit="")
    for case, values in (
        ("blocks that survived", tally.survivors),
        ("blocks lost per kill", tally.lost),
        ("restart, ms", [1e3 * seconds for seconds in tally.restart_s]),
    ):
        if values:
            middle, mean = median(values), sum(values) / len(values)
            for metric, value in (("median", middle), ("mean", mean), ("worst", max(values))):
                yield Result(case=case, subject="dynamo-kv", metric=metric, value=value, unit="", samples=len(values))
