"""Chat templates: the Jinja programs by which a model folder says how a conversation becomes a prompt."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dynamo.serve.errors import ModelLoadError, RequestError
from dynamo.serve.path_refusal import path_refusal

__all__ = ["ChatTemplate"]

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A compiled template. Rendering is sandboxed and thread-safe.

    Args:
        source: the Jinja program.
        special_tokens: names such as bos_token with their text, visible to the program.
        path: the file the program comes from, for messages.

    Raises:
        ModelLoadError: the program does not parse.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], path: Path) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise ModelLoadError(f"{path}: the chat template does not parse: {e}") from e
        self._special_tokens = special_tokens

    @classmethod
    def from_folder(cls, folder: Path, tokenizer_config: dict[str, Any]) -> "ChatTemplate | None":
        """Finds chat_template.jinja, or else the default template in tokenizer_config.json; None if there is neither."""
        path = folder / "chat_template.jinja"
        if path.exists():
            try:
                source: object = path.read_text(encoding="utf-8")
            except OSError as e:
                raise ModelLoadError(f"{path}: {path_refusal(path, e, 'read')}") from e
            except ValueError as e:
                raise ModelLoadError(f"{path} cannot be read: {e}") from e
        else:
            path = folder / "tokenizer_config.json"
            source = tokenizer_config.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelLoadError(f"{path}: chat_template is neither text nor a list of named templates")
        return cls(source, _special_tokens(tokenizer_config), path)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Renders a conversation and the beginning of the next reply, special tokens included.

        Raises:
            RequestError: the template refuses the conversation or fails on it.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        # What a program may raise on data it does not expect, beside its own refusals.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            message = f"the model's chat template refuses these messages: {e}"
            raise RequestError(message, param="messages", code="invalid_messages") from e


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, which marks assistant text for training, and renders its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_TOKENS:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON for prompts: unlike Jinja's own filter it escapes neither HTML nor non-ASCII characters."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)
