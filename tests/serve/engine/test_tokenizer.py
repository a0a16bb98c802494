"""Text to tokens and back: chat templates, token bytes, and streaming that never breaks characters or stop strings."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from dynamo.serve.engine.chat_template import ChatTemplate
from dynamo.serve.engine.stop_strings import StopMatcher
from dynamo.serve.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from dynamo.serve.errors import ModelLoadError, RequestError

WriteTokenizer = Callable[[Path], None]
TEXTS = ["hello world", "naïve café 日本語 ✅👩‍👩‍👧", "  two  spaces\n\n\ttab", "größer <|end|>", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: WriteTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary as Llama 2 has it: spaces as U+2581, bytes as <0xXX>."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "ly", "é", "▁"]
    tokenizer = HFTokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(tokenizer.to_str(), tmp_path_factory.mktemp("sp") / "tokenizer.json")


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0) -> list[str]:
    """The pieces a client sees; after a stop string nothing more is pushed."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop, min_tokens)
    pieces = []
    for token_id in ids:
        text, matched = detokenizer.push(token_id)
        pieces.append(text)
        if matched is not None:
            assert detokenizer.finish() == ""
            return [*pieces, f"[stop {matched}]"]
    return [*pieces, detokenizer.finish()]


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Their text with that of special tokens."""
    return b"".join(tokenizer.token_bytes(i) for i in ids).decode()


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_round_trip(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert spelled(byte_level, ids) == text
    assert byte_level.decode(ids) == spelled(byte_level, [i for i in ids if not byte_level.is_special(i)])


def test_special_tokens_are_no_part_of_the_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|end|>b")
    assert byte_level.decode(ids) == "ab"
    assert "".join(stream(byte_level, ids)) == "ab"


def test_end_tokens_and_vocabulary_size_come_from_the_folder(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder, eos_token_ids=frozenset({3}))
    assert tokenizer.eos_token_ids == {1, 3}
    assert tokenizer.vocab_size == 320
    assert tokenizer.token_bytes(320) == b""


def test_text_with_tokens_the_model_has_no_embedding_for_is_refused(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder, num_embeddings=3)
    assert tokenizer.vocab_size == 3
    with pytest.raises(RequestError, match=r"'<\|im_end\|>', a token this model has no embedding for"):
        tokenizer.encode("<|im_end|>")


def test_tokens_that_are_no_whole_characters_are_shown_as_bytes(
    byte_level: Tokenizer, sentencepiece: Tokenizer
) -> None:
    first, *_ = byte_level.encode("\U0001f600")
    assert byte_level.token_bytes(first) == b"\xf0"
    assert byte_level.token_text(first) == "bytes:\\xf0"
    assert sentencepiece.token_text(3 + 0xE2) == "bytes:\\xe2"
    assert sentencepiece.token_text(259) == " Hello"
    assert byte_level.token_text(0) == "<|begin|>"


def test_a_sentencepiece_vocabulary_streams_spaces_and_bytes(sentencepiece: Tokenizer) -> None:
    ids = [1, 259, 261, 260, 3 + 0xC3, 3 + 0xA9, 262, 3 + 0x0A]
    assert "".join(stream(sentencepiece, ids)) == " Helloly worldéé\n"
    assert "".join(stream(sentencepiece, ids))[1:] == sentencepiece.decode(ids)


def test_characters_split_over_tokens_arrive_whole(byte_level: Tokenizer) -> None:
    ids = [i for char in "a👍é" for i in byte_level.encode(char)]
    pieces = stream(byte_level, ids)
    assert "".join(pieces) == "a👍é"
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_incomplete_character_shows_only_at_the_end(byte_level: Tokenizer) -> None:
    pieces = stream(byte_level, byte_level.encode("a\U0001f600")[:-1])
    assert "".join(pieces[:-1]) == "a"
    assert pieces[-1] == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=30))
def test_streamed_text_of_any_tokens_equals_their_decoding(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)


def test_a_stop_string_over_token_borders_ends_the_text_and_never_leaks(byte_level: Tokenizer) -> None:
    ids = [i for char in "the end. More" for i in byte_level.encode(char)]
    pieces = stream(byte_level, ids, stop=("end. M",))
    assert pieces[-1] == "[stop end. M]"
    assert "".join(pieces[:-1]) == "the "


def test_text_held_for_a_stop_string_is_released_when_it_does_not_come(byte_level: Tokenizer) -> None:
    ids = [i for char in "a STO b" for i in byte_level.encode(char)]
    assert "".join(stream(byte_level, ids, stop=("STOP",))) == "a STO b"
    assert "".join(stream(byte_level, byte_level.encode("a STO"), stop=("STOP",))) == "a STO"


def test_a_stop_inside_one_token_cuts_the_token(byte_level: Tokenizer) -> None:
    words = ((i, byte_level.token_text(i)) for i in range(4, 320))
    token_id, word = next((i, text) for i, text in words if text.isalpha() and len(text) > 3)
    assert stream(byte_level, [token_id], stop=(word[2:],)) == [word[:2], f"[stop {word[2:]}]"]


def test_stops_completed_before_min_tokens_do_not_end_the_text(byte_level: Tokenizer) -> None:
    ids = [i for char in "xx.yy.zz" for i in byte_level.encode(char)]
    assert "".join(stream(byte_level, ids, (".",), min_tokens=3)) == "xx[stop .]"
    assert "".join(stream(byte_level, ids, (".",), min_tokens=4)) == "xx.yy[stop .]"
    assert "".join(stream(byte_level, ids, (".",), min_tokens=7)) == "xx.yy.zz"


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_stop_matching_does_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], random: Any) -> None:
    ends = [(end, s) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    first_end = min((end for end, _ in ends), default=None)
    matcher = StopMatcher(tuple(stops))
    fed = 0
    while fed < len(text):
        piece = text[fed : fed + random.randint(1, 4)]
        match = matcher.feed(piece)
        if match is not None:
            assert fed + match[0] == first_end
            assert match[1] == max((s for end, s in ends if end == first_end), key=len)
            return
        fed += len(piece)
        beginnings = [s[:n] for s in stops for n in range(len(s)) if text[:fed].endswith(s[:n])]
        assert matcher.num_held == max(map(len, beginnings))
    assert first_end is None


def test_the_chat_template_writes_its_own_special_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.apply_chat_template([{"role": "user", "content": "Hi ✅"}])
    assert spelled(byte_level, ids) == "<|begin|><|im_start|>user\nHi ✅<|im_end|>\n<|im_start|>assistant\n"


def render(source: str, messages: list[dict[str, Any]], **special: str) -> str:
    return ChatTemplate(source, special, Path("chat_template.jinja")).render(messages)


def test_templates_have_the_tools_that_published_ones_use() -> None:
    messages = [{"role": "user", "content": "<é>"}]
    assert render("{{ messages | tojson }}", messages) == '[{"role": "user", "content": "<é>"}]'
    assert render("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}", messages) == ""
    assert len(render("{{ strftime_now('%Y-%m-%d') }}", messages)) == 10
    assert render("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}", messages) == "<é>"
    assert (
        render("{{ eos_token }}{{ bos_token is defined }}{{ tools is none }}", messages, eos_token="E") == "EFalseTrue"
    )
    assert render("{% if true %}\n  {% if true %}\na{% endif %}\n{% endif %}", messages) == "a"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_refuses_or_fails_is_the_requests_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses these messages") as caught:
        render(source, [{"role": "user", "content": "x"}])
    assert caught.value.status == 400
    assert caught.value.param == "messages"


def test_a_template_that_does_not_parse_fails_at_load() -> None:
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja: the chat template does not parse"):
        render("{% if %}", [])


def copy_with_config(folder: Path, target: Path, **changes: Any) -> Path:
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (target / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def test_a_folder_without_chat_template_refuses_conversations(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(copy_with_config(folder, tmp_path, chat_template=None))
    with pytest.raises(RequestError, match="no chat template; use /v1/completions"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_template_files_and_named_templates_are_found(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "the {{ bos_token }}"}]
    bos = {"content": "<|end|>", "special": True}
    target = copy_with_config(folder, tmp_path, chat_template=named, bos_token=bos)
    tokenizer = Tokenizer.from_folder(target)
    assert tokenizer.apply_chat_template([]) == tokenizer.encode("the <|end|>")
    (target / "chat_template.jinja").write_text("over")
    tokenizer = Tokenizer.from_folder(target)
    assert tokenizer.apply_chat_template([]) == tokenizer.encode("over")


def test_truncation_and_padding_of_the_file_are_switched_off(folder: Path, tmp_path: Path) -> None:
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("z" * 50)) == 50
    assert len(Tokenizer.from_folder(tmp_path).encode("z")) == 1


def test_a_decoder_of_another_family_is_refused(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadError, match=r"decoder \['WordPiece'\] is not supported"):
        Tokenizer(tokenizer.to_str(), tmp_path / "tokenizer.json")


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: Tokenizer) -> None:
    """Encoding must not hold the interpreter's lock: a second thread then makes many steps, and else about one."""
    text = "hello world, this is text. " * 20_000
    done = threading.Event()
    encoder = threading.Thread(target=lambda: (byte_level.encode(text), done.set()))
    pause = threading.Event()
    num_steps = 0
    encoder.start()
    while not done.is_set():
        pause.wait(0.001)
        num_steps += 1
    encoder.join()
    assert num_steps > 10


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    longest = max(len(byte_level.token_bytes(i)) for i in range(byte_level.vocab_size))
    assert byte_level.max_token_bytes == longest
    assert sentencepiece.max_token_bytes >= len(b" Hello")
    assert byte_level.encode("z" * 10 * longest, max_tokens=10)
    for text in ("z" * (10 * longest + 1), "é" * (5 * longest + 1)):
        with pytest.raises(RequestError, match=rf"maximum context length is 10 tokens.*{len(text.encode())}") as caught:
            byte_level.encode(text, max_tokens=10)
        assert caught.value.code == "context_length_exceeded"
    started = time.perf_counter()
    with pytest.raises(RequestError, match="maximum context length"):
        byte_level.apply_chat_template([{"role": "user", "content": "a b " * 2_000_000}], max_tokens=1000)
    assert time.perf_counter() - started < 1  # encoding takes several times as long
