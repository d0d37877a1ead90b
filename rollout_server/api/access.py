"""Who may call which route: API keys are checked on arrival, their scopes at the route.

Two steps, each closed by default. ``Authentication`` refuses whatever has no key, whether or not a
route is there. ``needs`` stands at every route, or at the router of a whole plane, and names the
scopes of which the key must have one; ``check_every_route_has_a_scope`` stops the server from
coming up with a route that nobody thought about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, Request
from fastapi.params import Depends as DependsMarker
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.api.errors import slipstream_error_response
from shared.api_keys import ApiKey, ApiKeys
from shared.errors import AuthenticationError, ForbiddenError
from shared.types import ApiScope

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/dashboard"})
"""For load balancers and Kubernetes: they say whether the service is up, and nothing else. And the
dashboard's page: browsers send no key for a page, and this one holds no data, only asks for it."""
PUBLIC_FOLDER = "/dashboard/"
"""Scripts and style of that page."""
ANY_KEY_PATHS = frozenset({"/openapi.json"})
"""Routes FastAPI adds itself, where a scope cannot stand: any key will do."""

SECURITY_SCHEME = "api_key"
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1
_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([\x21-\x7e]+)")


@dataclass(frozen=True)
class Needs:
    """A dependency: the caller's key has at least one of the scopes, if keys are in use."""

    scopes: tuple[ApiScope, ...]

    async def __call__(self, request: Request) -> None:
        """
        Raises:
            ForbiddenError: it has none of them.
        """
        keys: ApiKeys = request.app.state.api_keys
        if not keys:
            return
        key: ApiKey | None = getattr(request.state, "api_key", None)
        if key is None:  # only if this app were served without its middleware
            raise _unauthenticated()
        if key.scopes.isdisjoint(self.scopes):
            raise ForbiddenError(
                f"API key {key.name!r} has the scopes {', '.join(sorted(key.scopes))}; this route "
                f"needs {' or '.join(self.scopes)} (the keys of the server: server.api_keys_file)"
            )


def needs(*scopes: ApiScope) -> list[DependsMarker]:
    """``dependencies`` of a route or router whose callers need one of ``scopes``."""
    return [Depends(Needs(scopes))]


def scopes_of(route: BaseRoute) -> tuple[ApiScope, ...]:
    """The scopes that stand at a route; none when somebody forgot."""
    if not isinstance(route, APIRoute):
        return ()
    calls = [dependency.call for dependency in route.dependant.dependencies]
    return tuple(scope for call in calls if isinstance(call, Needs) for scope in call.scopes)


def check_every_route_has_a_scope(routes: Iterable[BaseRoute]) -> None:
    """
    Raises:
        AssertionError: a route can be called with any key whatever, and was not meant to.
    """
    for route in routes:
        path = getattr(route, "path", None)
        if path is None or not (_is_public_path(path) or path in ANY_KEY_PATHS or scopes_of(route)):
            # Not an assert statement: those are gone under ``python -O``.
            raise AssertionError(f"route {path} has no scope: add dependencies=needs(...)")


class Authentication:
    """Finds the key of every request but those to public paths, or answers 401."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        # Routes are matched on the very same path, so there is no spelling to slip through.
        if not self._keys or scope["type"] == "lifespan" or _is_public(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        try:
            scope.setdefault("state", {})["api_key"] = self._key_of(scope)
        except AuthenticationError as exc:
            await slipstream_error_response(exc)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _key_of(self, scope: Scope) -> ApiKey:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        # Two of them would leave it to each reader which one counts.
        match = _BEARER.fullmatch(values[0]) if len(values) == 1 else None
        if match is None:
            raise _unauthenticated()
        key = self._keys.find(match[1])
        if key is None:
            error = AuthenticationError("the API key is not one that this server knows")
            error.code = "invalid_api_key"
            raise error
        return key


def describe_security(schema: dict[str, Any], routes: Iterable[BaseRoute]) -> None:
    """Add the keys to an OpenAPI document of a server that asks for them."""
    components = schema.setdefault("components", {})
    components["securitySchemes"] = {
        SECURITY_SCHEME: {"type": "http", "scheme": "bearer", "description": "An API key."}
    }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for route in routes:
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        if _is_public_path(route.path_format):
            continue
        allowed = " or ".join(scopes_of(route))
        for method in route.methods:
            operation = schema["paths"][route.path_format][method.lower()]
            operation["security"] = [{SECURITY_SCHEME: []}]
            operation["responses"] |= {
                "401": {"description": "No API key, or an unknown one", "content": error},
                "403": {"description": f"The key lacks the scope: {allowed}", "content": error},
            }


def _is_public(scope: Scope) -> bool:
    if scope["type"] != "http" or scope.get("root_path"):
        return False
    return _is_public_path(scope["path"])


def _is_public_path(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return path in PUBLIC_PATHS or (f"{folder}/" == PUBLIC_FOLDER and bool(name))


def _unauthenticated() -> AuthenticationError:
    return AuthenticationError(
        "this server needs an API key, as `Authorization: Bearer KEY` (clients of ours read it "
        "from SLIPSTREAM_API_KEY, SLIPSTREAM_API_KEY_FILE or --api-key-file)"
    )
