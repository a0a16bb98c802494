"""From the bytes of a body to a request of the right shape, or to an error that says what was wrong and what is accepted."""

import re
from typing import Generic, TypeVar

import msgspec
from msgspec import inspect

from dynamo.serve.errors import RequestError

__all__ = ["RequestDecoder"]

RequestT = TypeVar("RequestT", bound=msgspec.Struct)

_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*)`")
_PATH_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_CONTENT_PART = re.compile(r"messages\[\d+\]\.content\[\d+\]")
_MAX_SHOWN_CHARS = 80
_NO_VALUE = object()

# Fields of which only what changes nothing is supported: any other value is refused as unsupported, not as malformed.
_HARMLESS_ONLY = {
    "logit_bias": "biases are not supported; only {} is accepted",
    "parallel_tool_calls": "accepted are true and false, which change nothing without tools",
    "service_tier": 'only "auto" and "default" are accepted',
    "tool_choice": 'tools are not supported; only "none" and "auto" are accepted',
    "tools": "tools are not supported; only an empty list is accepted",
    "response_format": 'only {"type": "text"} is supported; JSON modes are not',
    "modalities": 'only ["text"] is supported',
}


class RequestDecoder(Generic[RequestT]):
    """Decodes the bodies of one endpoint; compiled once, used for every request."""

    def __init__(self, request_type: type[RequestT]) -> None:
        self._decoder = msgspec.json.Decoder(request_type)
        fields = inspect.type_info(request_type)
        assert isinstance(fields, inspect.StructType)
        self._field_names = {field.encode_name for field in fields.fields}
        self._accepted = {field.encode_name: _accepted_values(field.type) for field in fields.fields}
        self._unsupported = {field.encode_name for field in fields.fields if _is_unsupported(field.type)}

    def decode(self, body: bytes) -> RequestT:
        """The request in `body`.

        Raises:
            RequestError: 400; the body is no JSON, or a field is unknown, unsupported, missing, of the wrong type or range.
        """
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise self._translated(error, body) from None
        except UnicodeDecodeError as error:
            raise RequestError(
                f"the body is not valid UTF-8{_place_and_reason(body, error)}", code="invalid_json"
            ) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None

    def _translated(self, error: msgspec.ValidationError, body: bytes) -> RequestError:
        match = _MESSAGE.fullmatch(str(error))
        assert match is not None
        what, path = match["what"], (match["path"] or "").removeprefix(".")
        field = path.partition(".")[0].partition("[")[0]
        if _CONTENT_PART.match(path) and (part := self._content_part_type(path, body)) not in ("text", None):
            return RequestError(
                f"content parts of type {part!r} are not supported; send text",
                param=f"{path.removesuffix('.type')}.type",
                code="unsupported_parameter",
            )
        if field in _HARMLESS_ONLY:
            return RequestError(f"{field}: {_HARMLESS_ONLY[field]}", param=field, code="unsupported_parameter")
        if unknown := _UNKNOWN_FIELD.fullmatch(what):
            name = f"{path}.{unknown['name']}" if path else unknown["name"]
            return RequestError(
                f"unknown parameter {_shown(name)}; /docs lists what is accepted",
                param=name[:_MAX_SHOWN_CHARS],
                code="unknown_parameter",
            )
        if missing := _MISSING_FIELD.fullmatch(what):
            name = f"{path}.{missing['name']}" if path else missing["name"]
            return RequestError(f"parameter {name!r} is required", param=name, code="missing_required_parameter")
        if field in self._unsupported or what.startswith("Expected `null`"):
            return RequestError(
                f"parameter {path!r} is not supported by this server; leave it out",
                param=path,
                code="unsupported_parameter",
            )
        return self._wrong_value(what, path, field, body)

    def _wrong_value(self, what: str, path: str, field: str, body: bytes) -> RequestError:
        if not path:
            return RequestError(f"the body must be a JSON object: {what}", code="invalid_value")
        value = _value_at(body, path)
        shown = "" if value is _NO_VALUE else f" {_shown(value)}"
        accepted = self._accepted.get(field) if path == field else None
        wanted = f"accepted is {accepted}" if accepted else _lowered(what)
        code = "invalid_type" if ", got `" in what else "invalid_value"
        return RequestError(f"invalid value{shown} for {path!r}: {wanted}", param=path, code=code)

    def _content_part_type(self, path: str, body: bytes) -> object:
        match = _CONTENT_PART.match(path)
        assert match is not None
        part = _value_at(body, match[0])
        return part.get("type") if isinstance(part, dict) else None


def _place_and_reason(body: bytes, error: UnicodeDecodeError) -> str:
    """Where the body itself breaks; the decoder counts from the beginning of a string, and of what is escaped in it."""
    try:
        body.decode()
    except UnicodeDecodeError as exact:
        return f" at byte {exact.start}: {exact.reason}"
    return f" inside a string: {error.reason}"


def _is_unsupported(kind: inspect.Type) -> bool:
    return isinstance(kind.type if isinstance(kind, inspect.Metadata) else kind, inspect.NoneType)


def _accepted_values(kind: inspect.Type) -> str | None:
    """The range of a numeric field, or the words of one that takes few, in words; None for fields of other kinds."""
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    for option in kinds:
        if isinstance(option, inspect.Metadata):
            option = option.type
        if isinstance(option, inspect.LiteralType):
            return "one of " + ", ".join(str(value) for value in sorted(option.values, key=str))
        if isinstance(option, inspect.IntType):
            return f"an integer from {option.ge} to {option.le}"
        if isinstance(option, inspect.FloatType):
            low = f"above {option.gt:g}" if option.gt is not None else f"from {option.ge:g}"
            return f"a number {low} to {option.le:g}"
    return None


def _value_at(body: bytes, path: str) -> object:
    """What the client wrote at `path`; only on the way to an error, so decoding twice costs nothing that matters."""
    try:
        value = msgspec.json.decode(body)
        for name, index in _PATH_STEP.findall(path):
            value = value[name] if name else value[int(index)]
    except (msgspec.DecodeError, RecursionError, KeyError, IndexError, TypeError, ValueError):
        return _NO_VALUE
    result: object = value
    return result


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
