import json
import re
from typing import Any

import httpx
import jsonschema

from dynamo.serve.openapi import openapi_document


def test_every_reference_leads_somewhere() -> None:
    document = openapi_document()
    references = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    assert {"ChatCompletionRequest", "ErrorEnvelope"} <= references


def test_the_document_lists_what_is_served_and_every_operation_can_be_called() -> None:
    document = openapi_document()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/live",
        "/metrics",
    }
    operations: list[dict[str, Any]] = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all("200" in operation["responses"] for operation in operations)


def test_schemas_carry_the_ranges_that_are_checked() -> None:
    properties = openapi_document()["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"minimum": 1, "maximum": 16}.items() <= properties["n"]["anyOf"][0].items()
    assert properties["tools"]["type"] == "null"


def test_an_independent_reader_finds_the_document_valid(serve: Any) -> None:
    document = httpx.get(serve().url + "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
