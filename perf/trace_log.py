"""Reading request traces: Mooncake's format, and the key log that a server of ours records."""

import gzip
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, cast

import msgspec

from dynamo.perf.harness import BenchmarkError
from dynamo.serve.key_log_line import KeyLogLine

__all__ = ["MOONCAKE_BLOCK_TOKENS", "TracedRequest", "read_trace"]

logger = logging.getLogger(__name__)

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request.

    Attributes:
        time_s: when it came; the trace's first request comes at 0.
        keys: of its blocks, from the first on. Equal keys mean an equal block and an equal prefix.
        num_prompt_blocks: those of them that the prompt fills; the others hold the answer or are not full.
        block_tokens: tokens of a block.
    """

    time_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    keys: tuple[int, ...]
    num_prompt_blocks: int
    block_tokens: int


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_HashId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: _Count
    output_length: _Count
    hash_ids: tuple[_HashId, ...]


def read_trace(path: Path) -> list[TracedRequest]:
    """All requests of a JSONL file, plain or gzipped, in order of time.

    A server that is killed leaves the line it was writing incomplete, and the next one goes on behind it: such lines of a
    key log are left out, which the log says.

    Raises:
        BenchmarkError: a line is in neither format, or there is none, or blocks have different sizes. The message names the
            line.
        OSError: the file cannot be read.
    """
    kind: type[_MooncakeLine | KeyLogLine] = _MooncakeLine
    requests: list[TracedRequest] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if not requests:
            kind = _MooncakeLine if b'"hash_ids"' in line else KeyLogLine
        try:
            request = _request_of(msgspec.json.decode(line, type=kind))
        except (ValueError, msgspec.DecodeError) as error:
            if requests and kind is KeyLogLine and not isinstance(error, msgspec.ValidationError) and _is_torn(line):
                logger.warning("%s:%d is incomplete, as a killed server leaves it behind; left out", path.name, number)
                continue
            raise BenchmarkError(
                f"{path.name}:{number}: {error}; expected a line of Mooncake's format (timestamp in ms, input_length, "
                "output_length, hash_ids) or of a key log (time_s, num_prompt_tokens, num_output_tokens, block_size, keys)"
            ) from None
        if requests and request.block_tokens != requests[0].block_tokens:
            raise BenchmarkError(
                f"{path.name}:{number}: blocks of {request.block_tokens} tokens, and of {requests[0].block_tokens} before; "
                "keys of different block sizes cannot be compared, so split the file there"
            )
        requests.append(request)
    if not requests:
        raise BenchmarkError(f"{path.name} holds no request")
    requests.sort(key=lambda request: request.time_s)
    return requests


def _request_of(line: _MooncakeLine | KeyLogLine) -> TracedRequest:
    if isinstance(line, _MooncakeLine):
        full = min(line.input_length // MOONCAKE_BLOCK_TOKENS, len(line.hash_ids))
        return TracedRequest(
            line.timestamp / 1000, line.input_length, line.output_length, line.hash_ids, full, MOONCAKE_BLOCK_TOKENS
        )
    keys = line.words()
    full = min(line.num_prompt_tokens // line.block_size, len(keys))
    return TracedRequest(line.time_s, line.num_prompt_tokens, line.num_output_tokens, keys, full, line.block_size)


def _is_torn(line: bytes) -> bool:
    return not line.rstrip().endswith(b"}")


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw
        try:
            yield from file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BenchmarkError(f"{path.name} is no complete gzip file: {error}") from None
