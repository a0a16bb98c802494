"""The format of the key log, written and read."""

import msgspec
import pytest

from dynamo.kvcache.hashing import BlockKey
from dynamo.serve.key_log_line import KeyLogLine, key_digits

KEYS = [BlockKey(bytes(range(i, i + 16))) for i in (0, 200)]
LINE = {"time_s": 1.5, "num_prompt_tokens": 40, "num_output_tokens": 2, "block_size": 16}


def test_what_is_written_of_keys_is_read_as_their_lo_halves() -> None:
    line = KeyLogLine(
        time_s=1.5, num_prompt_tokens=40, num_output_tokens=2, cached_tokens=16, block_size=16, keys=key_digits(KEYS)
    )
    again = msgspec.json.decode(msgspec.json.encode(line), type=KeyLogLine)
    assert again == line
    assert again.words() == tuple(int.from_bytes(key[:8], "little") for key in KEYS)
    assert key_digits([]) == ""


def test_a_line_need_not_say_what_was_cached() -> None:
    assert msgspec.convert(LINE | {"keys": ""}, KeyLogLine).cached_tokens is None


@pytest.mark.parametrize("wrong", [{"keys": "00"}, {"keys": "xy" * 8}, {"keys": "", "block_size": 0}])
def test_a_line_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"hex|multiple"):
        msgspec.convert(LINE | wrong, KeyLogLine).words()
