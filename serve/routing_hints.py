"""What a client may say about where its request is served: in the body's field `dynamo`, or in headers.

| header | body field |
| --- | --- |
| `x-dynamo-worker` | `dynamo.worker` |
| `x-dynamo-exclude` (comma-separated) | `dynamo.exclude` |
| `x-dynamo-session-id` | `dynamo.session` |
| `x-dynamo-priority` | `dynamo.priority` |
| `x-dynamo-timing` | `dynamo.timing` |

Headers let proxies and clients that cannot add fields say the same. Both are checked against the same struct, and where
both speak of one thing they must agree.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from dynamo.serve.engine.request import RoutingHints
from dynamo.serve.errors import RequestError
from dynamo.serve.openai import MAX_PRIORITY, DynamoFields

__all__ = ["FIELD_OF_HEADER", "no_such_worker", "read_fields", "routing_hints"]

FIELD_OF_HEADER: Final = {
    "x-dynamo-worker": "worker",
    "x-dynamo-exclude": "exclude",
    "x-dynamo-session-id": "session",
    "x-dynamo-priority": "priority",
    "x-dynamo-timing": "timing",
}
_ACCEPTED: Final = {
    "priority": f"expected a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}",
    "timing": "expected 1 or 0, true or false",
}
_MAX_SHOWN_CHARS = 80


def read_fields(body: DynamoFields | None, headers: Mapping[str, str]) -> DynamoFields:
    """What body and headers say together.

    Args:
        headers: by lower-case name; one may be there several times.

    Raises:
        RequestError: 400; a header's value is not what its field accepts, or it and the body, or another of its name, differ.
    """
    fields = body or DynamoFields()
    given = _given(headers)
    if not given:
        return fields
    merged: dict[str, Any] = {name: getattr(fields, name) for name in fields.__struct_fields__}
    for header, text in given.items():
        name = FIELD_OF_HEADER[header]
        value = _header_value(header, name, text)
        if merged[name] is not None and merged[name] != value:
            raise RequestError(
                f"header {header} says {_shown(text)} and the body's dynamo.{name} {_shown(merged[name])}; send one",
                param=f"dynamo.{name}",
                code="invalid_value",
            )
        merged[name] = value
    return DynamoFields(**merged)


def routing_hints(fields: DynamoFields) -> RoutingHints:
    """The hints as the router takes them.

    Raises:
        RequestError: 400; the worker that is asked for is excluded as well.
    """
    exclude = frozenset(fields.exclude or ())
    if fields.worker in exclude:
        raise RequestError(
            f"worker {_shown(fields.worker)} is both asked for and excluded; leave one of the two out",
            param="dynamo.exclude",
            code="invalid_value",
        )
    return RoutingHints(worker=fields.worker, exclude=exclude, session=fields.session, priority=fields.priority or 0)


def no_such_worker(worker_id: str, why: str) -> RequestError:
    """The refusal of a request that asks for a worker that is not there."""
    return RequestError(
        f"there is no worker {_shown(worker_id)}: {why}; leave dynamo.worker out to let the server choose",
        status=404,
        param="dynamo.worker",
        code="worker_not_found",
    )


def _given(headers: Mapping[str, str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for header, text in headers.items():
        field = FIELD_OF_HEADER.get(header)
        if field == "exclude" and header in given:
            given[header] += f",{text}"  # a list may be spread over several (RFC 9110, 5.3)
        elif field is not None and given.setdefault(header, text) != text:
            raise RequestError(
                f"header {header} says both {_shown(given[header])} and {_shown(text)}; send one",
                param=header,
                code="invalid_value",
            )
    return given


def _header_value(header: str, name: str, text: str) -> Any:
    raw: str | list[str] = text.strip()
    if name == "exclude":
        raw = [part.strip() for part in text.split(",")]
    try:
        # Not strict: headers are text, so numbers and truth values are read from it.
        fields = msgspec.convert({name: raw}, DynamoFields, strict=False)
    except msgspec.ValidationError as error:
        what = _ACCEPTED.get(name) or str(error).partition(" - at ")[0].replace(" | null`", "`")
        raise RequestError(
            f"invalid value {_shown(text)} in header {header}: {what[:1].lower()}{what[1:]}",
            param=header,
            code="invalid_value",
        ) from None
    return getattr(fields, name)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"
