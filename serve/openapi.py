"""The OpenAPI 3.1 description of the server, made from the very structs that check requests."""

from importlib.metadata import version
from typing import Any

import msgspec

from dynamo.serve.openai import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorEnvelope,
    ModelCard,
    ModelList,
)

__all__ = ["openapi_document"]

_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or wrong.",
    "404": "The model is not served here.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "429": "Too many requests wait already; Retry-After says when to come back.",
    "500": "The server made an error.",
    "503": "The server is shutting down, or its engine has stopped.",
}


def openapi_document() -> dict[str, Any]:
    """The whole document, ready to be encoded."""
    types = (ChatCompletionRequest, ChatCompletion, CompletionRequest, Completion, ModelList, ModelCard, ErrorEnvelope)
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
                        "503": _response("It drains, or its engine has stopped.", _status_schema("draining", "dead")),
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
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {
            "200": {
                "description": "The generated text.",
                "content": {"application/json": {"schema": answer}, "text/event-stream": {"schema": stream}},
            },
            **_error_responses(*_ERRORS),
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
