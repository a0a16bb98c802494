"""Text to token ids and back: a Hugging Face tokenizer.json, its chat template, and text that streams token by token."""

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from dynamo.serve.engine.chat_template import ChatTemplate
from dynamo.serve.engine.stop_strings import StopMatcher
from dynamo.serve.errors import ModelLoadError, RequestError
from dynamo.serve.path_refusal import path_refusal

__all__ = ["IncrementalDetokenizer", "TokenSpelling", "Tokenizer"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "\u2581"  # how sentencepiece writes a space


class Tokenizer:
    """A byte-level BPE or sentencepiece-style vocabulary with byte fallback. All methods are thread-safe.

    Args:
        text: content of tokenizer.json.
        path: where it came from, for messages.
        eos_token_ids: ids that end a generation, beside the tokenizer's own end-of-sequence token.
        num_embeddings: rows of the model's embedding; tokens beyond them do not exist for the model.

    Raises:
        ModelLoadError: the content does not parse, or its decoder is of another family.
    """

    def __init__(
        self,
        text: str,
        path: Path,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        num_embeddings: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        try:
            raw = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # tokenizers raises bare Exception
            raise ModelLoadError(f"{path} is not a tokenizer of the tokenizers library: {e}") from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._path = path
        self._is_byte_level = _is_byte_level(raw.get("decoder"), path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        num_tokens = max(vocabulary.values(), default=-1) + 1
        self._vocab_size = num_tokens if num_embeddings is None else min(num_tokens, num_embeddings)
        self._may_exceed = num_tokens > self._vocab_size
        # `encode` holds the interpreter's lock to its end, a batch of one does not; older releases have only the slower batch.
        self._encode_batch = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        self._token_strings = {token_id: token for token, token_id in vocabulary.items()}
        added = raw.get("added_tokens") or []
        self._special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self._eos_token_ids = eos_token_ids
        self._chat_template = chat_template
        self._bytes: dict[int, bytes] = {}
        # A character of the byte alphabet is one byte of text, even where it takes two itself; added tokens are as written.
        written = map(len, vocabulary) if self._is_byte_level else (len(token.encode()) for token in vocabulary)
        self._max_token_bytes = max([*written, *(len(token["content"].encode()) for token in added)], default=0)

    @classmethod
    def from_folder(
        cls, folder: Path, *, eos_token_ids: frozenset[int] = frozenset(), num_embeddings: int | None = None
    ) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and the chat template of a Hugging Face folder.

        Raises:
            ModelLoadError: tokenizer.json is missing, or one of the files is damaged.
        """
        path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        try:
            text = path.read_text(encoding="utf-8")
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
        except FileNotFoundError as e:
            raise ModelLoadError(
                f"{path} is missing; convert the tokenizer with transformers' AutoTokenizer(...).save_pretrained"
            ) from e
        except OSError as e:
            raise ModelLoadError(f"{e.filename or path}: {path_refusal(Path(e.filename or path), e, 'read')}") from e
        except ValueError as e:
            raise ModelLoadError(f"the tokenizer files of {folder} cannot be read: {e}; download them again") from e
        if not isinstance(config, dict):
            raise ModelLoadError(f"{config_path} does not hold a JSON object")
        template = ChatTemplate.from_folder(folder, config)
        tokenizer = cls(text, path, eos_token_ids=eos_token_ids, num_embeddings=num_embeddings, chat_template=template)
        eos = config.get("eos_token")
        eos_id = tokenizer._tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos) if eos else None
        if eos_id is not None:
            tokenizer._eos_token_ids |= {eos_id}
        return tokenizer

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a generation."""
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that both tokenizer and model know."""
        return self._vocab_size

    @property
    def max_token_bytes(self) -> int:
        """The most bytes of UTF-8 that one token can stand for."""
        return self._max_token_bytes

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Encodes text; special tokens written out in it become their ids. Other threads run meanwhile.

        Args:
            max_tokens: text too long for so many tokens, were all of them the longest, is not even encoded.

        Raises:
            RequestError: the text is too long, or contains an added token for which the model has no embedding.
        """
        if max_tokens is not None:
            self._check_length(text, max_tokens)
        ids: list[int] = self._encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        if self._may_exceed and ids and max(ids) >= self._vocab_size:
            unknown = self._token_strings[max(ids)]
            raise RequestError(f"the text contains {unknown!r}, a token this model has no embedding for; remove it")
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decodes a whole text without its special tokens; invalid UTF-8 becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for inside a text; empty for ids without a token. Not always whole characters."""
        cached = self._bytes.get(token_id)
        if cached is None:
            cached = self._bytes[token_id] = self._spell(self._token_strings.get(token_id, ""))
        return cached

    def token_text(self, token_id: int) -> str:
        """The token as shown in logprobs: its text, or `bytes:\\xe2\\x80` where it is no whole UTF-8 text."""
        spelled = self.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is markup that does not belong to the text."""
        return token_id in self._special_ids

    def apply_chat_template(self, messages: list[dict[str, Any]], max_tokens: int | None = None) -> list[int]:
        """Encodes a conversation of `{"role": ..., "content": ...}` messages, up to where the next reply begins.

        Args:
            max_tokens: as for `encode`.

        Raises:
            RequestError: the model has no chat template, its template refuses the messages, or they are too long.
        """
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or put a chat_template.jinja into "
                f"{self._path.parent}",
                code="chat_template_missing",
            )
        return self.encode(self._chat_template.render(messages), add_special_tokens=False, max_tokens=max_tokens)

    def _check_length(self, text: str, max_tokens: int) -> None:
        max_bytes = max_tokens * self._max_token_bytes
        if len(text) * 4 <= max_bytes:  # no character takes more than four bytes
            return
        if (num_bytes := len(text.encode())) > max_bytes:
            # Clients recognise this error by the words OpenAI uses for it.
            raise RequestError(
                f"this model's maximum context length is {max_tokens} tokens, but the prompt has {num_bytes} bytes, "
                f"which is more than {max_tokens} tokens can hold; send a shorter prompt",
                code="context_length_exceeded",
            )

    def _spell(self, token: str) -> bytes:
        if self._is_byte_level:
            # Added tokens may hold characters outside the byte alphabet; those stand for themselves.
            spelled = [BYTE_OF_CHAR.get(char) for char in token]
            known = [byte for byte in spelled if byte is not None]
            return bytes(known) if len(known) == len(spelled) else token.encode()
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(SPACE_MARK, " ").encode()


class TokenSpelling(Protocol):
    """The part of `Tokenizer` that turning tokens into text needs."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...


class IncrementalDetokenizer:
    """Text of one generated sequence, token by token.

    Holds back incomplete UTF-8 characters and whatever may still become a stop string; its memory does not grow with
    the text. Special tokens have no text. The text continues a prompt: a sentencepiece token's leading space is kept.

    Args:
        stop: strings that end the text and are not part of it.
        min_tokens: stop strings completed by an earlier token than this one, counting from 1, do not end the text.
    """

    def __init__(self, tokenizer: TokenSpelling, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop) if any(stop) else None
        self._num_tokens = 0
        self._held = ""

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Takes the next token.

        Returns:
            Text that is now certain, and the stop string that ended the text, if one did; then nothing may be pushed.
        """
        self._num_tokens += 1
        if self._tokenizer.is_special(token_id):
            return "", None
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        if self._matcher is None:
            return text, None
        match = self._matcher.feed(text, ignore=self._num_tokens < self._min_tokens)
        if match is not None:
            end, stop = match
            certain = (self._held + text[:end])[: -len(stop)]
            self._held = ""
            self._decoder.reset()
            return certain, stop
        text = self._held + text
        num_certain = len(text) - self._matcher.num_held
        self._held = text[num_certain:]
        return text[:num_certain], None

    def finish(self) -> str:
        """Returns what was held back; an incomplete character becomes U+FFFD. Empty after a stop string."""
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return text


def _byte_of_char() -> dict[str, int]:
    """The byte-level BPE alphabet of GPT-2: printable Latin-1 stands for itself, other bytes for characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def _is_byte_level(decoder: dict[str, Any] | None, path: Path) -> bool:
    """True for byte-level BPE, false for sentencepiece-style decoders."""
    parts = [decoder or {}]
    kinds = set()
    while parts:
        part = parts.pop()
        parts += part.get("decoders", [])
        kinds.add(part.get("type"))
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise ModelLoadError(
        f"{path}: decoder {sorted(str(kind) for kind in kinds)} is not supported; supported are byte-level BPE "
        "(ByteLevel) and sentencepiece style (ByteFallback or Metaspace)"
    )
