"""The OpenAPI 3.1 description of the server, made from the very structs that check requests."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from dynamo.serve.admin import OPERATIONS, Operation
from dynamo.serve.explain import EXPLAIN_PATH, ExplanationList
from dynamo.serve.openai import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorEnvelope,
    ModelCard,
    ModelList,
)
from dynamo.serve.routing_hints import FIELD_OF_HEADER
from dynamo.serve.worker_metrics import METRICS_OF_WORKERS_PATH

__all__ = ["openapi_document"]

_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or wrong.",
    "403": "Without an API key, only this machine is answered.",
    "404": "The model, or the pin, does not exist here.",
    "408": "The body did not arrive in time.",
    "409": "The cache refuses: pins would hold too much, memory does not suffice, or another long operation runs.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "429": "Too many requests wait already; Retry-After says when to come back.",
    "500": "The server made an error.",
    "503": "The server is shutting down, its engine has stopped, or no worker can take the request.",
    "504": "The operation has not ended in time; it goes on.",
}
_WORKER_HEADERS = {
    "x-dynamo-worker-id": {
        "description": "Who serves the request, where there are workers.",
        "schema": {"type": "string"},
    },
    "x-dynamo-overlap-blocks": {
        "description": "Blocks of the prompt that the router expects the worker to hold, where there are workers.",
        "schema": {"type": "integer"},
    },
}
_GENERATING_ERRORS = ("400", "401", "404", "408", "413", "415", "429", "500", "503")
_ADMIN_ERRORS = ("400", "401", "403", "408", "409", "413", "415", "429", "500", "503", "504")


def openapi_document(*, admin: bool = False, routed: bool = False) -> dict[str, Any]:
    """The whole document, ready to be encoded; with the admin endpoints if `admin`, with the router's if `routed`."""
    operations = OPERATIONS if admin else ()
    types: list[type[Any]] = [
        *(ChatCompletionRequest, ChatCompletion, CompletionRequest, Completion, ModelList, ModelCard, ErrorEnvelope),
        *((ExplanationList,) if routed else ()),
        *dict.fromkeys(kind for op in operations for kind in (op.body, op.answer) if kind is not None),
    ]
    refs, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    ref_of = dict(zip(types, refs, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Dynamo KV",
            "version": version("dynamo-kv"),
            "description": "An OpenAI-compatible server over a tiered KV cache.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _generating(
                    "createChatCompletion",
                    "Reply to a conversation",
                    ref_of[ChatCompletionRequest],
                    ref_of[ChatCompletion],
                )
            },
            "/v1/completions": {
                "post": _generating(
                    "createCompletion", "Continue one or more prompts", ref_of[CompletionRequest], ref_of[Completion]
                )
            },
            "/v1/models": {"get": _reading("listModels", "Which models are served", ref_of[ModelList], keyed=True)},
            "/v1/models/{model}": {
                "get": {
                    **_reading("getModel", "One served model", ref_of[ModelCard], keyed=True, errors=("401", "404")),
                    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/health": {
                "get": {
                    "operationId": "getHealth",
                    "summary": "Whether the server accepts requests",
                    "tags": ["Operation"],
                    "security": [],
                    "responses": {
                        "200": _response("It does.", _status_schema("ready")),
                        "503": _response(
                            "It drains, its engine has stopped, or it has no worker.",
                            _status_schema("draining", "dead", "no_worker"),
                        ),
                    },
                }
            },
            "/live": {"get": _reading("getLive", "Whether the process answers at all", _status_schema("live"))},
            "/metrics": {
                "get": {
                    "operationId": "getMetrics",
                    "summary": "Metrics for Prometheus",
                    "tags": ["Operation"],
                    "security": [],
                    "responses": {"200": _response("Metrics.", {"type": "string"}, "text/plain")},
                }
            },
            **(_router_paths(ref_of) if routed else {}),
            **_admin_paths(operations, ref_of),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "apiKey": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only where the server was started with a key.",
                }
            },
        },
    }


def _router_paths(ref_of: Mapping[type[Any], dict[str, Any]]) -> dict[str, Any]:
    either = {"anyOf": [ref_of[ChatCompletionRequest], ref_of[CompletionRequest]]}
    return {
        EXPLAIN_PATH: {
            "post": {
                "operationId": "explainRouting",
                "summary": "Which worker a request would go to, and why; nothing is generated",
                "tags": ["Operation"],
                "security": [{}, {"apiKey": []}],
                "parameters": _hint_headers(),
                "requestBody": {"required": True, "content": {"application/json": {"schema": either}}},
                "responses": {
                    "200": _response("The choice for each prompt.", ref_of[ExplanationList]),
                    **_error_responses(*_GENERATING_ERRORS),
                },
            }
        },
        METRICS_OF_WORKERS_PATH: {
            "get": {
                "operationId": "getMetricsOfWorkers",
                "summary": "The workers' own metrics for Prometheus, with a label worker",
                "tags": ["Operation"],
                "security": [],
                "responses": {"200": _response("Metrics.", {"type": "string"}, "text/plain")},
            }
        },
    }


def _hint_headers() -> list[dict[str, Any]]:
    """The headers that say what the body's field `dynamo` says."""
    return [
        {
            "name": header,
            "in": "header",
            "description": f"The same as dynamo.{field}{', separated by commas' if field == 'exclude' else ''}.",
            "schema": {"type": "string"},
        }
        for header, field in FIELD_OF_HEADER.items()
    ]


def _admin_paths(operations: Sequence[Operation], ref_of: Mapping[type[Any], dict[str, Any]]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for operation in operations:
        in_path = re.findall(r"{(\w+)}", operation.path)
        entry: dict[str, Any] = {
            "operationId": operation.operation_id,
            "summary": operation.summary,
            "tags": ["Administration"],
            "security": [{}, {"apiKey": []}],
            "responses": {
                "200": _response(f"{operation.summary}: what came of it.", ref_of[operation.answer]),
                **_error_responses(*_ADMIN_ERRORS, *(("404",) if in_path else ())),
            },
        }
        if operation.body is not None:
            content = {"application/json": {"schema": ref_of[operation.body]}}
            entry["requestBody"] = {"required": True, "content": content}
        if in_path:
            entry["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in in_path
            ]
        paths.setdefault(operation.path, {})[operation.method.lower()] = entry
    return paths


def _generating(operation_id: str, summary: str, request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    stream = {
        "type": "string",
        "description": 'With stream: true. Events `data: CHUNK`, then `data: [DONE]`; `data: {"error": …}` is the last one.',
    }
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["Generation"],
        "security": [{}, {"apiKey": []}],
        "parameters": _hint_headers(),
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {
            "200": {
                "description": "The generated text.",
                "headers": _WORKER_HEADERS,
                "content": {"application/json": {"schema": answer}, "text/event-stream": {"schema": stream}},
            },
            **_error_responses(*_GENERATING_ERRORS),
        },
    }


def _reading(
    operation_id: str, summary: str, schema: dict[str, Any], *, keyed: bool = False, errors: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["Models" if keyed else "Operation"],
        "security": [{}, {"apiKey": []}] if keyed else [],
        "responses": {
            "200": _response(f"{summary}.", schema),
            **_error_responses(*(errors or (("401",) if keyed else ()))),
        },
    }


def _error_responses(*statuses: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorEnvelope"}
    return {status: _response(_ERRORS[status], schema) for status in statuses}


def _response(description: str, schema: dict[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _status_schema(*values: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"status": {"enum": list(values)}}, "required": ["status"]}
