"""Frames on a byte stream: u32 little-endian length, then as many bytes. How the stream was cut into pieces means nothing."""

import struct
from collections.abc import Iterator

__all__ = ["MAX_FRAME_BYTES", "FrameError", "FrameParser", "frame"]

MAX_FRAME_BYTES = 32 << 20
"""Longer frames are an error at both ends: no peer can make the other one hold more than this for a single frame."""

_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """The stream is no stream of frames, or holds one that is too long; nothing after it can be read."""


def frame(payload: bytes) -> bytes:
    """The frame that carries `payload`.

    Raises:
        FrameError: it is longer than `MAX_FRAME_BYTES`.
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(payload)} bytes is longer than the {MAX_FRAME_BYTES} allowed")
    return _LENGTH.pack(len(payload)) + payload


class FrameParser:
    """Cuts a stream into frames. Keeps what is incomplete, which is less than one frame of `max_frame_bytes`."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._rest = bytearray()
        self._wanted = 0  # bytes of it that let another frame be read

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here."""
        return not self._rest

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The payloads that are complete with `data`, in order; to be taken all, each before the next.

        Raises:
            FrameError: while iterating; the next frame is too long.
        """
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < self._wanted:
                return  # a long frame comes in many pieces, and is not copied with each of them
            data, self._rest = bytes(rest), bytearray()
        view = memoryview(data)
        start, end = 0, len(view)
        self._wanted = 4
        while end - start >= 4:
            (length,) = _LENGTH.unpack_from(view, start)
            if length > self._max_frame_bytes:
                raise FrameError(
                    f"a frame of {length} bytes is announced, longer than the {self._max_frame_bytes} allowed; "
                    "the peer speaks another protocol or is damaged"
                )
            if end - start - 4 < length:
                self._wanted = 4 + length
                break
            yield view[start + 4 : start + 4 + length]
            start += 4 + length
        if start < end:
            self._rest += view[start:]
