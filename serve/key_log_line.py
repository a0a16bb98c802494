"""A line of the key log: the one declaration of its format, for the server that writes it and for whoever replays it."""

from collections.abc import Sequence

import msgspec
import numpy as np

from dynamo.kvcache.hashing import BlockKey

__all__ = ["KeyLogLine", "key_digits"]

_WORD_BYTES = 8


class KeyLogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request, without any of its text.

    Attributes:
        time_s: when it ended, seconds since 1970.
        cached_tokens: prompt tokens that were not computed; None where a line does not say.
        block_size: tokens of a block.
        keys: the `lo` half of each block's key, 16 hexadecimal digits each, from the prompt's first block on; those of the
            answer follow.
    """

    time_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    cached_tokens: int | None = None
    block_size: int
    keys: str

    def words(self) -> tuple[int, ...]:
        """The keys as numbers. Equal ones mean an equal block and an equal prefix.

        Raises:
            ValueError: the line is no key log's.
        """
        raw = bytes.fromhex(self.keys)
        if self.block_size < 1 or len(raw) % _WORD_BYTES:
            raise ValueError("block_size must be positive, and keys a multiple of 16 hex digits")
        return tuple(np.frombuffer(raw, dtype="<u8").tolist())


def key_digits(keys: Sequence[BlockKey]) -> str:
    """What `KeyLogLine.keys` says of these blocks."""
    words = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 2 * _WORD_BYTES)[:, :_WORD_BYTES]
    return words.tobytes().hex()
