"""Writes blocks that lie in rows of host or device memory to disk.

    bounded queue ──► lane "write": rows ─► disk slots ─► journal ──► disk pool

A disk that is too slow for the queue holds its caller up once, and not again before it has written something; what finds no
place in the queue or on disk is dropped and counted.
"""

import logging
import threading
from dataclasses import dataclass
from functools import partial

import numpy as np

from dynamo.kvcache.device_path import DevicePaths, DirectPath, HostPath
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.reach import reachable
from dynamo.kvcache.shelf import Hold, Shelf
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.mover import Mover, Part, Priority
from dynamo.tiers.slot_digests import Digests
from dynamo.tiers.tier import Outcomes, SlotIds

__all__ = ["DiskWriter"]

logger = logging.getLogger(__name__)

_QUEUE_TIMEOUT_S = 10.0
_MAX_QUEUED_WRITES = 8  # parts; bounds the host rows that are pinned for the disk


@dataclass(frozen=True, slots=True)
class _Write:
    """Blocks on their way to disk. `hold`, a shared one, has their host rows; staging rows come with a reference."""

    path: HostPath | DirectPath
    keys: list[BlockKey]
    parents: list[BlockKey | None]
    rows: SlotIds
    digests: Digests
    hold: Hold


class DiskWriter:
    """Writes one part after the other. `put` and `put_host_rows` belong to one thread; the rest is thread-safe."""

    def __init__(
        self, shelf: Shelf, disk: DiskTier, paths: DevicePaths, mover: Mover, *, part_blocks: int, block_bytes: int
    ) -> None:
        """Writes up to `part_blocks` blocks of `block_bytes` at a time, on `mover`. Owns none of what it is given."""
        self._shelf = shelf
        self._disk = disk
        self._paths = paths
        self._part_blocks = part_blocks
        self._block_bytes = block_bytes
        self._is_behind = False
        self._being_written: set[BlockKey] = set()  # guarded by the shelf's lock
        self._settled = threading.Condition()  # guards the counts; notified when one falls
        self._num_writing = 0
        self._num_queued = 0
        self._line = mover.line("write", Priority.OFFLOAD)

    @property
    def num_writing_blocks(self) -> int:
        """Blocks queued or being written."""
        return self._num_writing

    @property
    def is_behind(self) -> bool:
        """True from when the queue was full for too long until the disk has written something."""
        return self._is_behind

    def put_host_rows(self, chains: list[list[BlockKey]], hold: Hold) -> None:
        """Queues what the host tier has of `chains` and the disk tier lacks, be it new, lost or refused before.

        Args:
            hold: on `chains`; what it does not hold of them, since it came later, is left for another time.
        """
        seen: set[BlockKey] = set()
        for chain in chains:
            self._put_chain(chain, hold, seen)

    def _put_chain(self, chain: list[BlockKey], hold: Hold, seen: set[BlockKey]) -> None:
        shelf = self._shelf
        with shelf.changed:
            places = np.flatnonzero(shelf.disk.locate(chain) < 0)
            rows = shelf.host.locate([chain[place] for place in places.tolist()])
            is_held = np.isin(rows, hold.host)
            places, rows = places[is_held], rows[is_held]
            unwanted = [chain[place] in self._being_written or chain[place] in seen for place in places.tolist()]
        is_wanted = ~np.array(unwanted, dtype=np.bool_)
        places, rows = places[is_wanted].tolist(), rows[is_wanted]
        keys = [chain[place] for place in places]
        parents = [chain[place - 1] if place else None for place in places]
        seen.update(keys)
        size = self._part_blocks
        for start in range(0, len(keys), size):
            which = slice(start, start + size)
            self.put(hold, keys[which], parents[which], rows[which])

    def put(self, hold: Hold, keys: list[BlockKey], parents: list[BlockKey | None], rows: SlotIds) -> bool:
        """Queues blocks in rows that `hold` has; with staging rows, the caller's references on them go along.

        Returns:
            False when the queue is full: the blocks are dropped, and the references stay with the caller.
        """
        shelf = self._shelf
        # Of the rows as they are now: an equal block that came from disk meanwhile may be rounded otherwise.
        path = self._paths.of_rows(rows)
        digests = path.digest(rows, keys)
        with self._settled:
            wait_s = 0.0 if self._is_behind else _QUEUE_TIMEOUT_S
            if not self._settled.wait_for(lambda: self._num_queued < _MAX_QUEUED_WRITES, wait_s):
                self._is_behind = True
                shelf.counters.count_dropped("disk_queue_full", len(keys))
                return False
            self._num_writing += len(keys)
            self._num_queued += 1
        with shelf.changed:
            self._being_written.update(keys)
            shelf.share(hold)
        write = _Write(path, keys, parents, rows, digests, hold)
        # Never refused: the mover waits for the part that is calling.
        self._line.put(Part(partial(self._run, write), len(keys) * self._block_bytes))
        return True

    def wait_settled(self, timeout_s: float) -> bool:
        """Waits until nothing is queued or being written; False if that took longer than `timeout_s`."""
        with self._settled:
            return self._settled.wait_for(lambda: not self._num_writing, timeout_s)

    def _run(self, write: _Write) -> None:
        try:
            self._write(write)
        except Exception:
            logger.exception("writing KV blocks to disk failed; they stay in the tiers above")
            self._shelf.counters.count_dropped("disk_write_failed", len(write.keys))
        finally:
            self._is_behind = False
            if not self._shelf.is_host_row(write.rows):
                self._shelf.release_rows(write.rows)
            with self._shelf.changed:
                self._being_written.difference_update(write.keys)
            self._shelf.let_go(write.hold)
            with self._settled:
                self._num_queued -= 1
                self._num_writing -= len(write.keys)
                self._settled.notify_all()

    def _write(self, write: _Write) -> None:
        """Writes what the disk lacks; the references on its slots go to the write's hold."""
        shelf, disk, path = self._shelf, self._disk, write.path
        shelf.notice_lost_disk()
        generation = disk.generation
        fresh, num_absent = self._reachable(write)
        num_refused = len(fresh) - disk.affordable(len(fresh))
        shelf.counters.count_dropped("write_budget", num_refused)
        fresh = fresh[: len(fresh) - num_refused]
        room = shelf.take_disk_slots(len(fresh), write.hold)
        held = room.slots
        was_refused = False
        try:
            shelf.counters.count_dropped("no_disk_slot", num_absent - num_refused - len(held))
            # Recorded before the slots are overwritten, so that a crash in between leaves no name for other bytes.
            shelf.record_drop(room.evicted_keys, room.evicted_slots)
            stored = fresh[: len(held)]
            done = path.write(disk, held, write.rows[stored])
            failed = ~done & (held < disk.num_allocated_slots)  # the others had no room
            if failed.any():
                done[failed] = path.write(disk, held[failed], write.rows[stored[failed]])
            was_refused = not done.all()
            if was_refused:
                self._exclude_gaps(write, stored, done)
            slots, stored = held[done], stored[done]
            keys = [write.keys[i] for i in stored.tolist()]
            parents = [write.parents[i] for i in stored.tolist()]
            digests = write.digests[stored]
            names = [ROOT_NAME if parent is None else parent for parent in parents]
            recorded = not keys or (
                disk.journal.put(keys, names, slots, digests, path.digest_kind) and disk.generation == generation
            )
            shelf.counters.count_dropped("disk_write_failed", len(held) - (len(keys) if recorded else 0))
            if keys and recorded:
                hold = write.hold
                kept = shelf.keep_on_disk(keys, slots, parents, digests, path.digest_kind)
                hold.disk = np.concatenate((hold.disk, kept))
                held = held[~done]
        finally:
            with shelf.changed:
                shelf.disk.release(held)
            if was_refused:
                shelf.limit_disk()

    def _reachable(self, write: _Write) -> tuple[SlotIds, int]:
        """Positions of blocks that the disk lacks and whose parents it has, or gets with them; and how many it lacks."""
        disk = self._shelf.disk
        with self._shelf.changed:
            absent = disk.locate(write.keys) < 0
            has_prefix = reachable(disk, write.keys, write.parents)
        return np.flatnonzero(absent & has_prefix), int(np.count_nonzero(absent))

    def _exclude_gaps(self, write: _Write, stored: SlotIds, done: Outcomes) -> None:
        """Counts those of the blocks at `stored` as failed that follow a failed one: nobody would find them."""
        good = np.flatnonzero(done)
        keys = [write.keys[i] for i in stored[good].tolist()]
        parents = [write.parents[i] for i in stored[good].tolist()]
        with self._shelf.changed:
            done[good[~reachable(self._shelf.disk, keys, parents)]] = False
