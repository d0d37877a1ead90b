"""docs/api.md: it has every route and error code there is, and its examples run and are true."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from rollout_server.api.app import create_app
from shared import errors
from shared.errors import SlipstreamError, error_codes
from tests.fakes.docs_server import docs_server
from tests.fakes.service import fake_service
from tests.support.doc_pages import Section, difference, run_python, run_shell, sections

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
SECTIONS = [section for section in sections(PAGE) if section.blocks]
ERROR_ROW = re.compile(r"^\| `(\w+)` \| (\d+|any) \|", re.MULTILINE)
ERRORS_OF_THE_EDGE = {
    "invalid_api_key": 401,
    "malformed_json": 400,
    "malformed_msgpack": 400,
    "validation_failed": 422,
    "method_not_allowed": 405,
    "unsupported_media_type": 415,
    "client_closed": 499,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One server for all sections: examples build on those above them."""
    with docs_server() as found:
        yield found


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_the_examples_run_and_answers_have_the_shape_that_is_shown(
    section: Section, url: str, tmp_path: Path
) -> None:
    answer = ""
    for language, code in section.blocks:
        if language == "bash":
            answer = run_shell(code, url, tmp_path, may_fail=section.title == "Errors")
            assert answer
        elif language == "python":
            assert run_python(code, url)
        else:
            assert language == "json"
            assert difference(json.loads(code), json.loads(answer)) is None


def routes() -> set[tuple[str, str]]:
    """Of the app, those that are not in its OpenAPI document too."""
    found = set()
    for route in create_app(fake_service()).routes:
        assert isinstance(route, Route)
        path = route.path_format if isinstance(route, APIRoute) else route.path
        found |= {(method, path) for method in (route.methods or set()) - {"HEAD"}}
    return found


def test_the_page_has_every_route_and_no_other_with_curl_and_python() -> None:
    documented = {section.route: section for section in sections(PAGE) if section.route}
    assert documented.keys() == routes()
    for section in documented.values():
        languages = {language for language, _ in section.blocks}
        assert {"bash", "python"} <= languages, section.title


def test_every_route_of_the_openapi_document_is_there() -> None:
    paths = create_app(fake_service()).openapi()["paths"]
    documented = {section.route for section in sections(PAGE)}
    for path, operations in paths.items():
        assert {(method.upper(), path) for method in operations} <= documented


def test_the_page_has_every_error_code_with_its_status() -> None:
    rows = dict(ERROR_ROW.findall(PAGE))
    statuses = {kind.code: str(kind.status) for kind in error_classes(SlipstreamError)}
    statuses |= {code: str(status) for code, status in ERRORS_OF_THE_EDGE.items()}
    assert rows == statuses | {"http_error": "any"}


def test_codes_that_only_the_api_knows_are_those_of_its_source() -> None:
    found: set[str] = set()
    for path in (ROOT / "rollout_server/api").glob("*.py"):
        found |= codes_in(ast.parse(path.read_text(encoding="utf-8")))
    assert found - error_codes() == {*ERRORS_OF_THE_EDGE, "http_error"}


def error_classes(kind: type[SlipstreamError]) -> Iterator[type[SlipstreamError]]:
    yield kind
    for child in kind.__subclasses__():
        # Tests and commands have errors of their own, which no answer carries.
        if child.__module__ == errors.__name__:
            yield from error_classes(child)


def codes_in(tree: ast.Module) -> set[str]:
    """Strings that become the ``code`` of an error: assigned, passed by name, or to HttpError."""
    values: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            names = [getattr(target, "attr", getattr(target, "id", "")) for target in node.targets]
            values += [node.value] if "code" in names else []
        elif isinstance(node, ast.Call):
            values += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            if getattr(node.func, "id", "") == "HttpError":
                values.append(node.args[1])
    constants = (part for value in values for part in ast.walk(value))
    return {
        part.value
        for part in constants
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"a": [{"b": 1}]}, {"a": [{"c": 1}]}),
        ({"a": "1"}, {"a": 1}),
        ({"a": []}, {"a": [1]}),
        ([1], {"a": 1}),
    ],
)
def test_another_shape_is_noticed(shown: object, real: object) -> None:
    assert difference(shown, real) is not None  # type: ignore[arg-type]


def test_values_may_differ() -> None:
    assert difference({"a": [1, 2], "b": None}, {"a": [3.5], "b": "x"}) is None


def test_an_example_that_fails_is_noticed(url: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not_found"):
        run_shell("curl -sS http://127.0.0.1:8000/v1/nothing", url, tmp_path)
