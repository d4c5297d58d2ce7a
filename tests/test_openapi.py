"""openapi/openapi.json is the contract: up to date, whole, and honest about errors."""

import ast
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import ERROR_BY_CODE, PROBLEM_MEDIA_TYPE, leaves
from service.export_openapi import document

ROOT = Path(__file__).parents[1]
STORED = json.loads((ROOT / "openapi" / "openapi.json").read_text())
SERVICE = ROOT / "service"

# These two are about finding the route, so no route declares them.
OF_THE_ROUTER = {"not_found", "method_not_allowed"}
OF_TRAINING = {
    SERVICE / "api" / "adapters.py",
    SERVICE / "api" / "finetune.py",
    *(SERVICE / "jobs").glob("*.py"),
    SERVICE / "worker" / "adapter_files.py",
    SERVICE / "worker" / "training_preparation.py",
}
OF_SCORES = {SERVICE / "api" / "score.py", SERVICE / "worker" / "score_desk.py"}


def test_the_stored_document_is_the_one_that_the_application_makes():
    made = json.loads(json.dumps(document()))

    assert made == STORED, "run: make openapi, and read the diff"


def findings(contract: dict[str, Any]) -> list[str]:
    """What is wrong with the structure of an OpenAPI 3.1 document."""
    found = []
    if not str(contract.get("openapi", "")).startswith("3.1."):
        found.append("not OpenAPI 3.1")
    if not {"title", "version"} <= contract.get("info", {}).keys():
        found.append("info lacks title or version")
    found += [
        f"$ref leads nowhere: {ref}" for ref in _references(contract) if not _at(contract, ref)
    ]
    identifiers = []
    for path, operations in contract.get("paths", {}).items():
        if not path.startswith("/"):
            found.append(f"a path does not begin with a slash: {path}")
        for method, operation in operations.items():
            where = f"{method} {path}"
            identifiers.append(operation.get("operationId"))
            if not operation.get("responses"):
                found.append(f"{where} has no responses")
            for status, response in operation.get("responses", {}).items():
                if "description" not in response:
                    found.append(f"{where} {status} has no description")
    if len(set(identifiers)) < len(identifiers):
        found.append("an operationId occurs twice")
    return found


def _references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [ref for item in node for ref in _references(item)]
    if not isinstance(node, dict):
        return []
    own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
    return own + [ref for value in node.values() for ref in _references(value)]


def _at(contract: dict[str, Any], reference: str) -> Any:
    """The node that a local reference names; None if there is none."""
    node: Any = contract
    for part in reference.removeprefix("#/").split("/"):
        node = node.get(part.replace("~1", "/").replace("~0", "~"))
        if node is None:
            return None
    return node


def test_the_document_is_well_formed():
    assert findings(STORED) == []


@pytest.mark.parametrize(
    ("place", "value", "finding"),
    [
        (("openapi",), "2.0", "not OpenAPI 3.1"),
        (("info",), {}, "info lacks title or version"),
        (("components", "schemas"), {}, "$ref leads nowhere"),
        (("paths", "/generate", "post", "responses"), {}, "post /generate has no responses"),
        (("paths", "/health", "get", "responses", "200"), {}, "200 has no description"),
        (("paths", "ready"), {}, "does not begin with a slash"),
        (("paths", "/twice"), STORED["paths"]["/health"], "an operationId occurs twice"),
    ],
)
def test_a_broken_document_is_found(place, value, finding):
    broken = copy.deepcopy(STORED)
    node = broken
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value

    assert any(finding in line for line in findings(broken))


# --- errors -----------------------------------------------------------------------------------


def raised_codes(source: str) -> set[str]:
    """Codes that a module can give a caller: of classes it calls, and those it hands to a call."""
    code_by_class = {error.__name__: error.code for error in leaves()}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    arguments = {
        argument.value
        for call in calls
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    return {code_by_class[name] for name in called & code_by_class.keys()} | {
        code for code in ERROR_BY_CODE if code in arguments
    }


def declared_codes(path: str, method: str) -> set[str]:
    responses = STORED["paths"][path][method]["responses"]
    problems = [
        response["content"][PROBLEM_MEDIA_TYPE]["schema"]
        for response in responses.values()
        if PROBLEM_MEDIA_TYPE in response.get("content", {})
    ]
    return {code for schema in problems for code in schema["properties"]["code"]["enum"]}


def test_generate_declares_every_error_that_anything_raises():
    others = {SERVICE / "api" / "requests.py", *OF_SCORES, *OF_TRAINING}
    paths = set(SERVICE.rglob("*.py")) - others
    raised = set().union(*(raised_codes(path.read_text()) for path in paths))

    missing = raised - OF_THE_ROUTER - declared_codes("/generate", "post")

    assert not missing, "name the class in the route's responses; then make openapi"


def test_score_declares_every_error_that_it_or_anything_shared_raises():
    others = {SERVICE / "api" / "requests.py", SERVICE / "api" / "generate.py", *OF_TRAINING}
    paths = set(SERVICE.rglob("*.py")) - others
    raised = set().union(*(raised_codes(path.read_text()) for path in paths))

    missing = raised - OF_THE_ROUTER - declared_codes("/score", "post")

    assert not missing, "name the class in the route's responses; then make openapi"
    assert {"model_not_found", "request_cancelled"} <= raised


def test_jobs_and_adapters_declare_between_them_every_error_that_is_theirs():
    raised = set().union(*(raised_codes(path.read_text()) for path in OF_TRAINING))
    declared = set()
    for path, operations in STORED["paths"].items():
        if path.startswith(("/finetune", "/adapters")):
            declared |= set().union(*(declared_codes(path, method) for method in operations))

    assert {"job_limit", "storage_full", "adapter_busy", "version_conflict"} <= raised
    assert raised <= declared


def test_a_cancel_declares_every_error_that_its_route_raises():
    raised = raised_codes((SERVICE / "api" / "requests.py").read_text())

    assert "request_not_found" in raised
    assert raised <= declared_codes("/requests/{id}", "delete")


def test_every_declared_problem_has_the_status_of_its_codes():
    for path, operations in STORED["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                problem = response.get("content", {}).get(PROBLEM_MEDIA_TYPE)
                for code in problem["schema"]["properties"]["code"]["enum"] if problem else ():
                    assert ERROR_BY_CODE[code].status == int(status), f"{method} {path} {code}"


def test_a_raised_code_is_found_in_either_spelling():
    assert raised_codes("raise QueueFull('x')") == {"queue_full"}
    assert raised_codes("self.fail(request, 'numerical', 'x')") == {"numerical"}
    assert raised_codes("x: Literal['draining'] = 'draining'; raise ValueError('queue')") == set()
