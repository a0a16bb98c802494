"""What the index of a disk tier costs: to find it again after a restart, to keep it in memory, and to look prefixes up.

The index is made by the journal's own `put`, over a data file that is only as long as it must be, without bytes. Two cases:
*one by one*, each chain recorded whole before the next, and *interleaved*, block by block from many chains at a time, as many
sequences that decode record them: the worst order there is for finding parents.
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey, block_keys, chain_root
from dynamo.kvcache.shelf import Shelf
from dynamo.kvcache.stats import CacheCounters
from dynamo.perf.harness import BenchmarkError, Timing, median, quiet_collector, timed
from dynamo.perf.machine import machine_record
from dynamo.perf.option_checks import check_folder
from dynamo.perf.report import Report, Result
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host import HostTier
from dynamo.tiers.layout import BlockLayout

__all__ = ["CASES", "SUMMARY", "add_arguments", "run"]

SUMMARY = "start-up time, memory and look-ups of a disk tier's index of a million blocks"

CASES = {"one by one": 1, "interleaved": 64}
"""How many chains grow at a time."""

_FINGERPRINT = bytes(16)
_LAYOUT = BlockLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=1, itemsize=4)
_PUT_BLOCKS = 1 << 16
_LOOKUPS = 200


@dataclass(frozen=True, slots=True)
class _Sample:
    """One restart: times to read the journal, and to fill the pool from it; and what the process grew by.

    Attributes:
        lookup_s: to find out how much of a chain host and disk hold.
        hash_s: to make its keys from its tokens.
    """

    journal: Timing
    pool: Timing
    grown_bytes: int
    lookup_s: float
    hash_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    workload = parser.add_argument_group("workload")
    workload.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the index")
    workload.add_argument("--chain", type=int, default=2048, help="blocks of each chain, and of the prefix looked up")
    workload.add_argument("--repeats", type=int, default=5, help="restarts; medians are printed")
    place = parser.add_argument_group("place")
    place.add_argument(
        "--path", metavar="DIR", type=Path, help="where to put the index; default: the system's temporary folder"
    )


def run(options: argparse.Namespace, console: Console) -> Report:
    """Measures all cases.

    Raises:
        BenchmarkError: the sizes do not fit together.
    """
    if options.chain < 1 or options.blocks < options.chain or options.repeats < 1:
        raise BenchmarkError(
            f"--blocks {options.blocks} in chains of --chain {options.chain}, --repeats {options.repeats}: give at least "
            "one chain and one repeat"
        )
    if options.path is not None:
        check_folder(options.path)
    machine = machine_record()
    results: list[Result] = []
    for case, num_at_a_time in CASES.items():
        with tempfile.TemporaryDirectory(prefix="dynamo-perf-index-", dir=options.path) as made:
            folder = Path(made)
            console.print(f"{case}: recording {options.blocks:,} blocks ...", style="dim")
            chain = _record(folder, options.blocks, options.chain, num_at_a_time)
            console.print(f"{case}: {options.repeats} restarts ...", style="dim")
            with quiet_collector():
                samples = [_restart(folder, options.blocks, chain) for _ in range(options.repeats)]
        results += _results(case, samples, options.blocks, len(chain))
    return Report(
        benchmark="index",
        title=f"A disk tier's index of {options.blocks:,} blocks in chains of {options.chain:,}",
        machine=machine,
        parameters={"blocks": options.blocks, "chain": options.chain, "repeats": options.repeats},
        results=results,
        notes=(
            "with the journal in the page cache; start-up is DiskTier.open (journal) and the books above it (pool)",
            "memory: what the process grew by with the index open, in the first restart",
            "look-up: how many leading blocks host and disk hold, as KVCache.lookup asks them, without hashing the tokens",
        ),
    )


def _open(folder: Path, num_blocks: int) -> DiskTier:
    return DiskTier.open(folder, _LAYOUT, num_blocks * _LAYOUT.slot_bytes, _FINGERPRINT, io_threads=1)


def _record(folder: Path, num_blocks: int, chain_blocks: int, num_at_a_time: int) -> list[BlockKey]:
    """Leaves an index and an empty data file of full length; returns the keys of one chain."""
    names = np.frombuffer(np.random.default_rng(1).bytes(16 * num_blocks), dtype=np.uint8).reshape(-1, 16)
    parents, position = _parents(num_blocks, chain_blocks, num_at_a_time)
    parent_names = np.where((parents >= 0)[:, None], names[parents], np.uint8(0))
    tier = _open(folder, num_blocks)
    try:
        for start in range(0, num_blocks, _PUT_BLOCKS):
            some = slice(start, start + _PUT_BLOCKS)
            slots = np.arange(start, min(start + _PUT_BLOCKS, num_blocks))
            if not tier.journal.put(names[some], parent_names[some], slots, slots.astype(np.uint64)):
                raise BenchmarkError(f"the index in {folder} cannot be written; give a --path with more room")
    finally:
        tier.close()
    (data,) = folder.rglob("blocks.dat")
    os.truncate(data, num_blocks * _LAYOUT.slot_bytes)
    return [BlockKey(names[place].tobytes()) for place in position.tolist()]


def _parents(
    num_blocks: int, chain_blocks: int, num_at_a_time: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of all parents, -1 for none, and the positions of a chain's blocks."""
    place = np.arange(num_blocks)
    parents = np.where(place // num_at_a_time % chain_blocks == 0, -1, place - num_at_a_time)
    first = num_blocks // (chain_blocks * num_at_a_time) // 2 * chain_blocks * num_at_a_time
    chain = first + num_at_a_time * np.arange(chain_blocks)
    return parents, chain[chain < num_blocks]


def _restart(folder: Path, num_blocks: int, chain: list[BlockKey]) -> _Sample:
    gc.collect()
    before = _resident_bytes()
    made: list[DiskTier | Shelf] = []
    journal = timed(lambda: made.append(_open(folder, num_blocks)))
    tier = made[0]
    assert isinstance(tier, DiskTier)
    arena = HostTier(_LAYOUT, 0, num_staging=1)
    try:
        pool = timed(lambda: made.append(Shelf(arena, 0, tier, EventLog(), CacheCounters())))
        grown = _resident_bytes() - before
        shelf = made[1]
        assert isinstance(shelf, Shelf)
        if len(shelf.disk) != num_blocks or shelf.count_loadable(chain) != len(chain):
            raise RuntimeError(f"{len(shelf.disk)} of {num_blocks} blocks were found again")
        lookups = [timed(lambda: _look_up(shelf, chain)).wall_s for _ in range(_LOOKUPS)]
        tokens = np.arange(len(chain) * _LAYOUT.block_size, dtype=np.uint32)
        root = chain_root(_FINGERPRINT, _LAYOUT.block_size)
        hashes = [timed(lambda: block_keys(tokens, _LAYOUT.block_size, root)).wall_s for _ in range(_LOOKUPS)]
    finally:
        arena.close()
        tier.close()
    return _Sample(journal, pool, grown, median(lookups), median(hashes))


def _look_up(shelf: Shelf, chain: list[BlockKey]) -> int:
    """What `KVCache.lookup` asks the tiers below the device."""
    return shelf.count_loadable(chain, max(shelf.count_prefix(chain)))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _results(case: str, samples: list[_Sample], num_blocks: int, num_looked_up: int) -> Iterator[Result]:
    count = len(samples)
    seconds = {
        "journal": [sample.journal.wall_s for sample in samples],
        "pool": [sample.pool.wall_s for sample in samples],
        "start-up": [sample.journal.wall_s + sample.pool.wall_s for sample in samples],
        "CPU time": [sample.journal.cpu_s + sample.pool.cpu_s for sample in samples],
    }
    for metric, values in seconds.items():
        yield Result(
            case=case, subject="dynamo-kv", metric=metric, value=1000 * median(values), unit="ms", samples=count
        )
    yield Result(
        case=case, subject="dynamo-kv", metric="memory", value=samples[0].grown_bytes / num_blocks, unit="B/block"
    )
    for metric, values in (
        (f"look-up of {num_looked_up}", [sample.lookup_s for sample in samples]),
        ("its hashing", [sample.hash_s for sample in samples]),
    ):
        yield Result(
            case=case, subject="dynamo-kv", metric=metric, value=1e6 * median(values), unit="µs", samples=count
        )
