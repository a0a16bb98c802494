"""Writes blocks that lie in host rows to disk, on a thread of its own.

    bounded queue ──► disk thread: host rows ─► disk slots ─► journal ──► disk pool

A disk that is too slow for the queue holds its caller up once, and not again before it has written something; what finds no
place in the queue or on disk is dropped and counted.
"""

import contextlib
import logging
import queue
import threading
import time
from dataclasses import dataclass

import numpy as np

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.shelf import Digests, Hold, Shelf, digest_seeds
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.tier import SlotIds

__all__ = ["DiskWriter"]

logger = logging.getLogger(__name__)

_QUEUE_TIMEOUT_S = 10.0
_MAX_QUEUED_WRITES = 8  # parts; bounds the host rows that are pinned for the disk


@dataclass(frozen=True, slots=True)
class _Write:
    """Blocks on their way to disk. `hold`, a shared one, has their host rows; staging rows come with a reference."""

    keys: list[BlockKey]
    parents: list[BlockKey | None]
    rows: SlotIds
    digests: Digests
    hold: Hold


class DiskWriter:
    """Owns the disk thread. `put` and `put_host_rows` belong to one other thread; the rest is thread-safe."""

    def __init__(self, shelf: Shelf, disk: DiskTier, *, part_blocks: int, block_bytes: int) -> None:
        """Starts the thread, which writes up to `part_blocks` blocks of `block_bytes` at a time."""
        self._shelf = shelf
        self._disk = disk
        self._part_blocks = part_blocks
        self._block_bytes = block_bytes
        self._is_behind = False
        self._being_written: set[BlockKey] = set()  # guarded by the shelf's lock
        self._settled = threading.Condition()  # guards the count; notified when it falls
        self._num_writing = 0
        self._writes: queue.Queue[_Write | None] = queue.Queue(maxsize=_MAX_QUEUED_WRITES)
        self._thread = threading.Thread(target=self._run, name="kv-disk-write", daemon=True)
        self._thread.start()

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
        shelf = self._shelf
        parent_of = {key: parent for chain in chains for key, parent in zip(chain, (None, *chain), strict=False)}
        held = set(hold.host.tolist())
        with shelf.changed:
            lacking = [key for key in parent_of if key not in shelf.disk and key not in self._being_written]
            lacking = [key for key in lacking if shelf.host.find(key) in held]
            rows = shelf.host.find_any(lacking)
        for start in range(0, len(lacking), self._part_blocks):
            keys = lacking[start : start + self._part_blocks]
            self.put(hold, keys, [parent_of[key] for key in keys], rows[start : start + len(keys)])

    def put(self, hold: Hold, keys: list[BlockKey], parents: list[BlockKey | None], rows: SlotIds) -> bool:
        """Queues blocks in rows that `hold` has; with staging rows, the caller's references on them go along.

        Returns:
            False when the queue is full: the blocks are dropped, and the references stay with the caller.
        """
        shelf = self._shelf
        # Of the rows as they are now: an equal block that came from disk meanwhile may be rounded otherwise.
        digests = digest_rows(shelf.rows, rows, digest_seeds(keys), self._block_bytes)
        with self._settled:
            self._num_writing += len(keys)
        with shelf.changed:
            self._being_written.update(keys)
            shelf.share(hold)
        write = _Write(keys, parents, rows, digests, hold)
        try:
            self._writes.put(write, timeout=0.0 if self._is_behind else _QUEUE_TIMEOUT_S)
        except queue.Full:
            self._is_behind = True
            shelf.counters.count_dropped("disk_queue_full", len(keys))
            self._settle(write)
            return False
        return True

    def wait_settled(self, timeout_s: float) -> bool:
        """Waits until nothing is queued or being written; False if that took longer than `timeout_s`."""
        with self._settled:
            return self._settled.wait_for(lambda: not self._num_writing, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Ends the thread after what is queued, within `timeout_s`; a thread that hangs is left behind."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):  # the thread hangs, or it would have made room
            self._writes.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.error("KV blocks are still being written to disk after %g s; going on without them", timeout_s)

    def _settle(self, write: _Write) -> None:
        with self._shelf.changed:
            self._being_written.difference_update(write.keys)
        self._shelf.let_go(write.hold)
        with self._settled:
            self._num_writing -= len(write.keys)
            self._settled.notify_all()

    def _run(self) -> None:
        while (write := self._writes.get()) is not None:
            try:
                self._write(write)
            except Exception:
                logger.exception("writing KV blocks to disk failed; they stay in the tiers above")
                self._shelf.counters.count_dropped("disk_write_failed", len(write.keys))
            finally:
                self._is_behind = False
                if not self._shelf.is_host_row(write.rows):
                    self._shelf.release_rows(write.rows)
                self._settle(write)

    def _write(self, write: _Write) -> None:
        """Writes what the disk lacks; the references on its slots go to the write's hold."""
        shelf, disk = self._shelf, self._disk
        shelf.notice_lost_disk()
        generation = disk.generation
        fresh, num_absent = self._reachable(write)
        room = shelf.take_disk_slots(len(fresh), write.hold)
        held = room.slots
        was_refused = False
        try:
            shelf.counters.count_dropped("no_disk_slot", num_absent - len(held))
            # Recorded before the slots are overwritten, so that a crash in between leaves no name for other bytes.
            shelf.record_drop(room.evicted_keys, room.evicted_slots)
            stored = fresh[: len(held)]
            done = disk.write(held, shelf.rows, write.rows[stored])
            was_refused = not done.all()
            slots, stored = held[done], stored[done]
            keys = [write.keys[i] for i in stored.tolist()]
            parents = [write.parents[i] for i in stored.tolist()]
            digests = write.digests[stored]
            names = [ROOT_NAME if parent is None else parent for parent in parents]
            recorded = not keys or (disk.journal.put(keys, names, slots, digests) and disk.generation == generation)
            shelf.counters.count_dropped("disk_write_failed", len(held) - (len(keys) if recorded else 0))
            if keys and recorded:
                hold = write.hold
                hold.disk = np.concatenate((hold.disk, shelf.keep_on_disk(keys, slots, parents, digests)))
                held = held[~done]
        finally:
            with shelf.changed:
                shelf.disk.release(held)
            if was_refused:
                shelf.limit_disk()

    def _reachable(self, write: _Write) -> tuple[SlotIds, int]:
        """Positions of blocks that the disk lacks and whose parents it has, or gets with them; and how many it lacks."""
        disk = self._shelf.disk
        reachable: set[BlockKey | None] = {None}
        wanted: list[int] = []
        with self._shelf.changed:
            for i, (key, parent) in enumerate(zip(write.keys, write.parents, strict=True)):
                if parent in reachable or parent in disk:
                    reachable.add(key)
                    if key not in disk:
                        wanted.append(i)
            num_absent = sum(key not in disk for key in write.keys)
        return np.array(wanted, dtype=np.int64), num_absent
