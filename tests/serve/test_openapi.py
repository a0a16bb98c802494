import json
import re
from typing import Any

import httpx
import jsonschema
from starlette.routing import Route

from dynamo.serve.openapi import openapi_document

ABOUT_THE_API = ("/", "/docs", "/openapi.json")


def test_every_reference_leads_somewhere() -> None:
    document = openapi_document()
    references = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    assert {"ChatCompletionRequest", "ErrorEnvelope"} <= references


def operations_of(route: Route) -> set[tuple[str, str]]:
    path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
    return {(method.lower(), path) for method in route.methods or () if method != "HEAD"}


def test_the_document_lists_what_is_served(serve: Any) -> None:
    served = {operation for route in serve().frontend.routes for operation in operations_of(route)}
    documented = {(method, path) for path, methods in openapi_document()["paths"].items() for method in methods}
    assert served - documented == {("get", path) for path in ABOUT_THE_API}
    assert documented <= served


def test_every_operation_has_a_name_of_its_own_and_a_good_answer() -> None:
    document = openapi_document()
    operations: list[dict[str, Any]] = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all("200" in operation["responses"] for operation in operations)


def test_schemas_carry_the_ranges_that_are_checked() -> None:
    properties = openapi_document()["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"minimum": 1, "maximum": 16}.items() <= properties["n"]["anyOf"][0].items()
    assert properties["functions"]["type"] == "null"
    assert properties["tools"]["anyOf"][0]["maxItems"] == 0


def test_an_independent_reader_finds_the_document_valid(serve: Any) -> None:
    document = httpx.get(serve().url + "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
