"""Replays of one trace on all cores: they share nothing but the trace, so each core takes the next one that is left."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.trace_replay import Replay

__all__ = ["replay_all"]

Task = Callable[[], Replay]


def replay_all(tasks: Sequence[Task], num_processes: int | None = None) -> list[Replay]:
    """Runs all `tasks`, in forked children that see the trace as it lies in this process's memory.

    Args:
        num_processes: None: one for each core that this process may use.

    Raises:
        BenchmarkError: a child ended before its replay did, such as for want of memory.
    """
    num_processes = min(len(tasks), num_processes or len(os.sched_getaffinity(0)))
    if num_processes <= 1:
        return [task() for task in tasks]
    context = multiprocessing.get_context("fork")
    next_task = context.Value("i", 0)

    def work(results: Connection) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's handlers end a run; these just end
            signal.signal(number, signal.SIG_DFL)
        while True:
            with next_task.get_lock():
                index = next_task.value
                next_task.value += 1
            if index >= len(tasks):
                return
            results.send((index, tasks[index]()))

    done: dict[int, Replay] = {}
    readers: list[Connection] = []
    children = []
    try:
        for _ in range(num_processes):
            reader, writer = context.Pipe(duplex=False)
            readers.append(reader)
            child = context.Process(target=work, args=(writer,), daemon=True)
            children.append(child)
            with warnings.catch_warnings():
                # Newer Pythons warn of forking beside threads. These children take none of the locks that numpy's or torch's
                # threads could hold: they run the pool's books, and then end.
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            writer.close()
        open_readers = list(readers)
        while open_readers:
            for ready in wait(open_readers):
                assert isinstance(ready, Connection)
                try:
                    index, replay = ready.recv()
                except EOFError:
                    open_readers.remove(ready)
                else:
                    done[index] = replay
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
            if child.pid is not None:
                child.join()
        for reader in readers:
            reader.close()
    if len(done) < len(tasks):
        codes = ", ".join(str(child.exitcode) for child in children)
        raise BenchmarkError(f"{len(tasks) - len(done)} of {len(tasks)} replays did not end (exit codes {codes})")
    return [done[index] for index in range(len(tasks))]
