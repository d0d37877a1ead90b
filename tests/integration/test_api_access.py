"""API keys on the real app: who is let in, where, and what the others are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from rollout_server.api.access import (
    ANY_KEY_PATHS,
    PUBLIC_FOLDER,
    PUBLIC_PATHS,
    Authentication,
    check_every_route_has_a_scope,
    needs,
    scopes_of,
)
from rollout_server.api.app import create_app
from shared.api_keys import ApiKeys, parse_api_keys
from shared.cli.api_client import ApiClient
from shared.credentials import ClientCredentials, load_credentials
from shared.errors import RequestError, SlipstreamError
from shared.schemas.base import ErrorResponse
from shared.schemas.engines import EnginesResponse
from shared.types import ApiScope
from tests.fakes.engine import FakeEngine
from tests.fakes.http_server import serving
from tests.fakes.service import fake_service, running
from tests.support.certificates import make_certificate
from trainer.rollout_client import RolloutClient

SECRETS = {scope.value: f"{scope.value}-f00d-f00d-f00d" for scope in ApiScope}
BODY = {"prompts": [{"prompt": "a"}]}
EXPECTED = {
    "/v1/rollouts": {"rollout"},
    "/v1/rollouts/{request_id:path}": {"rollout"},
    "/v1/models": {"rollout"},
    "/v1/models/{model:path}": {"rollout"},
    "/v1/completions": {"rollout"},
    "/v1/chat/completions": {"rollout"},
    "/v1/weights": {"admin"},
    "/v1/weights/audit": {"admin"},
    "/v1/engines": {"admin"},
    "/v1/engines/{engine_id}": {"admin"},
    "/v1/engines/{engine_id}/drain": {"admin"},
    "/v1/pause": {"admin"},
    "/v1/resume": {"admin"},
    "/v1/speculation": {"admin"},
    "/v1/events": {"admin"},
    "/v1/events/groups/{number}": {"admin"},
    "/metrics": {"metrics", "admin"},
    "/version": {"rollout", "admin", "metrics"},
}
"""What every route needs; a new one is added here by whoever adds it."""


def keys() -> ApiKeys:
    """One key per scope, named like it."""
    return ApiKeys(parse_api_keys([f"{s} {s} {key}" for s, key in SECRETS.items()], "test"))


def bearer(scope: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[scope]}"}


def routes() -> Iterator[tuple[str, str, set[str]]]:
    """Method, path and scopes of every route with a scope."""
    for route in create_app(fake_service()).routes:
        is_public = route.path in PUBLIC_PATHS or route.path.startswith(PUBLIC_FOLDER)  # type: ignore[attr-defined]
        if isinstance(route, APIRoute) and not is_public:
            for method in route.methods:
                yield method, route.path, {scope.value for scope in scopes_of(route)}


def test_every_route_has_the_scope_that_is_written_here() -> None:
    found = {path: scopes for _, path, scopes in routes()}
    assert found == EXPECTED


def test_only_probes_and_the_empty_dashboard_are_public_and_one_path_is_for_any_key() -> None:
    assert {"/livez", "/readyz", "/dashboard"} == PUBLIC_PATHS
    assert PUBLIC_FOLDER == "/dashboard/"
    assert {"/openapi.json"} == ANY_KEY_PATHS


def test_an_app_with_a_route_that_nobody_gave_a_scope_does_not_come_up() -> None:
    router = APIRouter()
    router.add_api_route("/v1/forgotten", lambda: None)
    with pytest.raises(AssertionError, match="/v1/forgotten"):
        check_every_route_has_a_scope(router.routes)


@pytest.mark.parametrize(("method", "path", "scopes"), list(routes()))
async def test_each_route_lets_in_its_scopes_only(method: str, path: str, scopes: set[str]) -> None:
    url = path.replace("{request_id:path}", "x").replace("{model:path}", "x")
    async with running(fake_service(), keys()) as client:
        for scope in SECRETS:
            if path == "/v1/events" and scope in scopes:
                continue  # never ends: test_api_dashboard.py reads it
            answer = await client.request(method, url, headers=bearer(scope))
            if scope in scopes:
                assert answer.status_code not in (401, 403), answer.text
                continue
            assert answer.status_code == 403
            assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
            error = ErrorResponse.model_validate_json(answer.content).error
            assert (error.code, error.type) == ("forbidden", "permission_error")
            assert all(name in error.message for name in (scope, *scopes))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer unknown-f00d-f00d",
        f"Basic {SECRETS['admin']}",
        f"Bearer {SECRETS['admin']} {SECRETS['admin']}",
        f"Bearer {SECRETS['admin'][:-1]}",
        f"Bearer {SECRETS['admin']}x",
        SECRETS["admin"],
    ],
)
async def test_without_a_known_key_every_path_answers_401_in_the_usual_body(
    header: str | None,
) -> None:
    engine = FakeEngine("a")
    headers = {} if header is None else {"Authorization": header}
    paths = ["/v1/nothing", "/openapi.json", "/", "/livez/", "//livez", "/livez/../v1/weights"]
    paths += ["/dashboard/", "/dashboard/../v1/weights", "/dashboard/x/y", "/dashboardx"]
    async with running(fake_service([engine]), keys()) as client:
        for method, path, _ in [*routes(), *(("GET", path, set()) for path in paths)]:
            answer = await client.request(method, path, headers=headers, json=BODY)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"].startswith('Bearer realm="slipstream"')
            assert answer.headers["x-request-id"]
            error = ErrorResponse.model_validate_json(answer.content).error
            known_form = header is not None and header.count(" ") == 1 and "Bearer " in header[:7]
            named = known_form and header != "Bearer "
            assert error.code == ("invalid_api_key" if named else "unauthenticated")
            assert error.type == "authentication_error"
            assert "f00d" not in answer.text
    assert engine.requests == []


async def test_two_authorization_headers_are_refused() -> None:
    both = [("authorization", f"Bearer {SECRETS[scope]}") for scope in ("rollout", "admin")]
    async with running(fake_service(), keys()) as client:
        assert (await client.get("/v1/weights", headers=both)).status_code == 401


async def test_the_public_routes_and_a_server_without_keys_ask_for_nothing() -> None:
    async with running(fake_service(), keys()) as client:
        for path in PUBLIC_PATHS:
            assert (await client.get(path)).status_code == 200
    async with running(fake_service()) as client:
        assert (await client.post("/v1/rollouts", json=BODY)).status_code == 200
        assert (await client.get("/v1/weights", headers=bearer("metrics"))).status_code == 200


async def test_nobody_is_let_in_when_the_middleware_is_missing() -> None:
    app = create_app(fake_service(), keys())
    app.user_middleware = [m for m in app.user_middleware if m.cls is not Authentication]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/v1/weights", headers=bearer("admin"))
    assert answer.status_code == 401


async def test_a_web_socket_is_closed_unheard() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> Any:
        raise AssertionError("the app was called")

    scope = {"type": "websocket", "path": "/livez", "headers": []}
    await Authentication(never, keys())(scope, never, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_body_is_not_read_before_the_key_is_known() -> None:
    async def endless() -> Any:
        yield b" " * 1024
        raise AssertionError("the body was read")

    async with running(fake_service(), keys()) as client:
        answer = await client.post("/v1/rollouts", content=endless())
    assert answer.status_code == 401


async def test_openapi_says_what_is_needed_and_holds_no_key() -> None:
    async with running(fake_service(), keys()) as client:
        answer = await client.get("/openapi.json", headers=bearer("metrics"))
    document = answer.json()
    assert "f00d" not in answer.text
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) is (path not in PUBLIC_PATHS)
            assert ("401" in operation["responses"]) is (path not in PUBLIC_PATHS)
    assert "admin" in document["paths"]["/v1/weights"]["post"]["responses"]["403"]["description"]
    async with running(fake_service()) as client:
        assert "securitySchemes" not in (await client.get("/openapi.json")).text


async def test_the_log_names_the_key_and_never_holds_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(fake_service(), keys()) as client:
        for scope in SECRETS:
            change = {"num_speculative_tokens": 2}
            await client.patch("/v1/speculation", json=change, headers=bearer(scope))
    assert "with API key 'admin'" in caplog.text
    assert "f00d" not in caplog.text


@pytest.mark.parametrize("tls", [False, True])
async def test_our_clients_bring_key_and_certificates(tmp_path: Path, tls: bool) -> None:
    server: dict[str, object] = {}
    trusted = None
    if tls:
        trusted, key = make_certificate(tmp_path)
        server = {"tls_certificate_file": str(trusted), "tls_key_file": str(key)}
    lines = ["trainer rollout,admin trainer-f00d-f00d-f00d"]
    both = ApiKeys(parse_api_keys(lines, "test"))
    environment = {"SLIPSTREAM_API_KEY": "trainer-f00d-f00d-f00d"}
    credentials = load_credentials(None, trusted, environment)

    def call(url: str) -> None:
        with RolloutClient(url, timeout_s=10, credentials=credentials) as client:
            client.wait_until_ready()
            assert client.weights().committed_version == 0
        with ApiClient(url, 10, credentials) as cli:
            assert cli.get("/v1/engines", EnginesResponse).target_count == 1
        keyless = ClientCredentials(ca_certificates=credentials.ca_certificates)
        refused = pytest.raises(RequestError, match="401 unauthenticated")
        with ApiClient(url, 10, keyless) as cli, refused:
            cli.get("/v1/engines", EnginesResponse)
        if not tls:
            return
        # Whom they do not trust they do not talk to, nor try again.
        distrusting = ClientCredentials(api_key=credentials.api_key)
        refused = pytest.raises(SlipstreamError, match=r"not trusted.*--ca-file")
        with ApiClient(url, 10, distrusting) as cli, refused:
            cli.get("/v1/engines", EnginesResponse)
        refused = pytest.raises(SlipstreamError, match=r"not trusted.*trainer\.ca_file")
        with RolloutClient(url, timeout_s=10, credentials=distrusting) as client, refused:
            client.weights()

    async with serving(fake_service(server=server), both) as url:
        assert url.startswith("https" if tls else "http:")
        await asyncio.to_thread(call, url)


def test_needs_is_found_on_routes_of_a_router() -> None:
    router = APIRouter(dependencies=needs(ApiScope.ADMIN))
    router.add_api_route("/a", lambda: None)
    app = FastAPI()
    app.include_router(router)
    assert [scopes_of(r) for r in app.routes if getattr(r, "path", "") == "/a"] == [("admin",)]
