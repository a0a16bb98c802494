from typing import Any

from dynamo.serve.engine.request import TokenLogprob
from dynamo.serve.logprobs import LegacyLogprobs


def test_special_tokens_do_not_move_the_offset_for_they_are_no_part_of_the_text(codec: Any) -> None:
    class Spelling(type(codec)):  # type: ignore[misc]
        def token_bytes(self, token_id: int) -> bytes:
            return bytes([token_id]) if token_id < 256 else b"<|end|>"

    entries = [TokenLogprob(token_id, -0.5) for token_id in (97, 257, 98, 256, 99)]
    logprobs = LegacyLogprobs(Spelling()).entries(entries, 0)
    assert logprobs.tokens == ["a", "<|end|>", "b", "<|end|>", "c"]
    assert logprobs.text_offset == [0, 1, 1, 2, 2]
