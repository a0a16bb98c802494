"""The kernel's asynchronous I/O: hundreds of reads or writes for one system call, and one more to wait for all of them.

Only with O_DIRECT are requests really asynchronous; on other files `submit` does the work itself. There is no library in
between: `io_submit` and its companions are called by number. https://man7.org/linux/man-pages/man2/io_submit.2.html
"""

import ctypes
import errno
import os
import platform

import numpy as np
import numpy.typing as npt

__all__ = ["READ", "WRITE", "Events", "RequestQueue", "Requests", "make_requests"]

READ, WRITE = 7, 8
"""Operations: IOCB_CMD_PREADV and IOCB_CMD_PWRITEV."""

_REQUEST = np.dtype(  # struct iocb of a little-endian machine
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<i4"),
        ("operation", "<u2"),
        ("priority", "<i2"),
        ("fd", "<u4"),
        ("vectors", "<u8"),
        ("num_vectors", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_fd", "<u4"),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("result2", "<i8")])  # struct io_event
_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}  # io_setup, io_destroy, io_getevents, io_submit

Requests = npt.NDArray[np.void]
"""Array of `struct iocb`, [n]. Its memory, and its vectors', must stay where they are until all are submitted."""

Events = npt.NDArray[np.void]
"""Array of `struct io_event`, [n]: "data" is the position of the request, "result" its bytes or a negative errno."""


def make_requests(
    fd: int,
    operation: int,
    vectors: npt.NDArray[np.uint64],
    cuts: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
) -> Requests:
    """One request for each stretch of memory vectors; its "data" is its position.

    Args:
        fd: file opened with O_DIRECT.
        operation: READ or WRITE.
        vectors: (address, bytes) each, uint64 [m, 2], C-contiguous.
        cuts: request i has `vectors[cuts[i]:cuts[i + 1]]`, at most 1024 of them; int64 [n + 1].
        offsets: where each begins in the file, int64 [n].
    """
    requests = np.zeros(len(offsets), dtype=_REQUEST)
    requests["data"] = np.arange(len(offsets))
    requests["operation"] = operation
    requests["fd"] = fd
    requests["vectors"] = vectors.ctypes.data + cuts[:-1] * vectors.itemsize * 2
    requests["num_vectors"] = np.diff(cuts)
    requests["offset"] = offsets
    return requests


class RequestQueue:
    """Up to `depth` requests under way. Owns a context of the kernel. One user at a time, from any thread."""

    def __init__(self, depth: int) -> None:
        """Makes room for `depth` requests, of which all processes together may have /proc/sys/fs/aio-max-nr.

        Raises:
            OSError: ENOSYS without asynchronous I/O here, EPERM where it is forbidden, EAGAIN when the room is used up.
        """
        self.depth = depth
        machine = platform.machine()
        if machine not in _NUMBERS or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError(errno.ENOSYS, f"no numbers of system calls are known for {machine}")
        self._setup, self._destroy, self._getevents, self._submit = map(ctypes.c_long, _NUMBERS[machine])
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall  # lets other Python threads run meanwhile
        self._syscall.restype = ctypes.c_long
        self._events = np.zeros(depth, dtype=_EVENT)
        self._context: ctypes.c_ulong | None = None
        context = ctypes.c_ulong(0)
        self._checked(self._setup, ctypes.c_long(depth), ctypes.byref(context))
        self._context = context

    def submit(self, requests: Requests, start: int, stop: int) -> int:
        """Hands `requests[start:stop]` to the kernel; no more than there is room for.

        Returns:
            How many it took, at least one.

        Raises:
            OSError: it did not take the first one. Errors of the file are events instead.
        """
        addresses = requests.ctypes.data + requests.itemsize * np.arange(start, stop, dtype=np.uint64)
        return self._checked(
            self._submit, self._context, ctypes.c_long(stop - start), ctypes.c_void_p(addresses.ctypes.data)
        )

    def wait(self, count: int) -> Events:
        """Blocks until `count` requests have ended; those that have, a view that the next call overwrites.

        Interrupted by signals only for as long as their handlers run.
        """
        while True:
            try:
                num_ended = self._checked(
                    self._getevents,
                    self._context,
                    ctypes.c_long(count),
                    ctypes.c_long(self.depth),
                    ctypes.c_void_p(self._events.ctypes.data),
                    None,
                )
            except InterruptedError:
                continue
            return self._events[:num_ended]

    def close(self) -> None:
        """Waits for what is under way and gives the context back, which takes the kernel some 10 ms. Idempotent."""
        context, self._context = self._context, None
        if context is not None:
            self._checked(self._destroy, context)

    def _checked(self, *arguments: object) -> int:
        result = int(self._syscall(*arguments))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
