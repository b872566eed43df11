"""The checks before a request is answered: its origin, its size, and a free slot."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dagster_prefs.access import REFUSAL_SECONDS, Right, Tokens
from dagster_prefs.errors import excerpt
from dagster_prefs.logs import REQUEST_ID
from dagster_prefs.serving.observing import RequestSpans
from dagster_prefs.serving.wire import MAX_BODY_BYTES, REQUEST, REQUEST_HEADER, Metrics, error_answer

logger = logging.getLogger(__name__)

_HEADER = REQUEST_HEADER.encode()
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# Orchestrators and scrapers must get a response however busy the server is.
OPERATIONAL = frozenset({"/healthz", "/readyz", "/metrics"})
# An orchestrator's probes have no token.
PROBES = frozenset({"/healthz", "/readyz"})
# Enough for a user id of 1,024 bytes with every byte escaped, and a cursor with a name of the same length.
MAX_TARGET_BYTES = 16 * 1024
# Number of requests to start per iteration of the event loop: a few milliseconds of work, so that a burst of
# hundreds does not block the other connections.
BEGUN_AT_ONCE = 16
# Key in a request's scope for the time (time.monotonic()) at which it had arrived completely.
ARRIVED = "prefs.arrived"
# Bytes of bodies that are still arriving, for all requests together.
MAX_ARRIVING_BYTES = 64 * 1024 * 1024


class Refusal(Exception):
    """A request that is rejected: status, code and sentence of the response."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Hosts:
    """The host names under which this server may be called, as a defence against DNS rebinding by websites.

    `localhost` and IP addresses are always allowed: a page in a browser only uses them if it comes from
    there. `*.example.com` allows every name below a domain, `*` any name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}
        self._domains = tuple(name[1:] for name in self._names if name.startswith("*."))

    def allow(self, authority: str) -> bool:
        """Return whether a Host header, with port, is allowed."""
        name = authority.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        name = name.rstrip(".")
        if name in self._names or "*" in self._names or name.endswith(self._domains):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Gate:
    """Admits requests that are complete, within the limits and not from foreign websites.

    At most `max_in_flight` requests run at a time. A request occupies a slot only after it has arrived
    completely, so that one which never ends occupies none.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_in_flight: int,
        hosts: Hosts,
        spans: RequestSpans | None = None,
    ) -> None:
        self._app = app
        self._spans = spans
        self._metrics = metrics
        self._most = max_in_flight
        self._hosts = hosts
        self._arriving = 0
        self._begun = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0
        request_id = scope[REQUEST] = _request_id(scope)
        # Never reset: the server runs each request in a task of its own, and logs its faults after this middleware.
        REQUEST_ID.set(request_id.decode())

        async def mark(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_HEADER, request_id)]
            await send(message)

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await mark(message)

        span = None
        try:
            self._check(scope)
            await self._require_token(scope)
            if scope["path"] in OPERATIONAL:
                await self._app(scope, receive, mark)
                return
            if self._spans is not None:
                span = self._spans.start(scope["method"], scope["headers"])
            body = await self._body(scope, receive)
            if body is not None:
                await self._answer(scope, _whole(body, receive), note)
        except Refusal as refused:
            await error_answer(refused.status, refused.code, str(refused))(scope, receive, note)
        except Exception:
            # Starlette responds to this error outside of this middleware.
            status = 500
            raise
        finally:
            route = scope.get("route")
            name = route.path_format if isinstance(route, Route) else "other"
            if span is not None:
                span.end(name, status)
            if status:
                seconds = time.monotonic() - started
                self._metrics.answered(name, status, seconds)
                logger.debug(
                    "answered %s with %d",
                    name,
                    status,
                    extra={"route": name, "status": status, "seconds": seconds},
                )

    async def _require_token(self, scope: Scope) -> None:
        """Refuse a request without a token that has the scope of its path, if the server has tokens."""
        tokens: Tokens | None = getattr(scope["app"].state, "tokens", None)
        if not tokens or scope["path"] in PROBES:
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            raise Refusal(
                401,
                "unauthorized",
                "this server needs a token: send the header `Authorization: Bearer TOKEN`",
            )
        grant = tokens.bearer(given[0]) if len(given) == 1 else None
        if grant is None:
            await asyncio.sleep(REFUSAL_SECONDS)
            raise Refusal(
                401,
                "unauthorized",
                "unknown token: use one whose hash the server has, as `prefs token` made it",
            )
        right = needed_right(scope["path"])
        if right is not None and right not in grant.rights:
            raise Refusal(403, "forbidden", grant.refusal(right))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._metrics
        if metrics.in_flight >= self._most:
            metrics.refused += 1
            raise Refusal(
                503, "busy", f"{self._most} requests are being answered: try again, or add a server"
            )
        metrics.in_flight += 1
        scope[ARRIVED] = time.monotonic()
        try:
            await self._turn()
            await self._app(scope, receive, send)
        finally:
            metrics.in_flight -= 1

    async def _turn(self) -> None:
        """Wait until fewer than BEGUN_AT_ONCE requests have started in this iteration of the event loop."""
        loop = asyncio.get_running_loop()
        if self._begun == 0:
            loop.call_soon(self._next_turn)
        if self._begun < BEGUN_AT_ONCE:
            self._begun += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < BEGUN_AT_ONCE:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._begun += 1
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _check(self, scope: Scope) -> None:
        given = [(name, value.decode("latin-1")) for name, value in scope["headers"] if name in _OF_BROWSERS]
        headers = dict(given)
        hosts = [value for name, value in given if name == b"host"]
        for host in hosts:
            if not self._hosts.allow(host):
                raise Refusal(
                    403,
                    "foreign_host",
                    f"this server does not have the name {excerpt(host)}: use its address, or start it with "
                    "--allowed-host and that name",
                )
        origin = headers.get(b"origin")
        if origin is not None and (not hosts or _authority(origin) != hosts[0].lower()):
            raise Refusal(
                403,
                "foreign_origin",
                f"web pages of {excerpt(origin)} may not call this server: call it from a service",
            )
        if headers.get(b"sec-fetch-site") == "cross-site" and headers.get(b"sec-fetch-mode") != "navigate":
            raise Refusal(403, "foreign_origin", "web pages of another site may not call this server")
        length = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if length > MAX_TARGET_BYTES:
            raise Refusal(
                414, "too_long", f"path and query are {length} bytes long, more than {MAX_TARGET_BYTES}"
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the whole body; None if the client has disconnected."""
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                body += chunk
                self._arriving += len(chunk)
                if len(body) > MAX_BODY_BYTES:
                    raise Refusal(
                        413, "too_large", f"the body is longer than {MAX_BODY_BYTES} bytes: split the request"
                    )
                if self._arriving > MAX_ARRIVING_BYTES:
                    self._metrics.refused += 1
                    raise Refusal(503, "busy", "too many large requests are arriving: try again")
                if not message.get("more_body", False):
                    return bytes(body)
        finally:
            self._arriving -= len(body)


def needed_right(path: str) -> Right | None:
    """Return the scope that a path needs; None for the description of the server, which any token may read."""
    if path == "/openapi.json":
        return None
    if path == "/metrics":
        return "inspect"
    return "shop" if path.startswith("/v1/users/") else "domains"


def _request_id(scope: Scope) -> bytes:
    """The id that the caller gave the request in one X-Request-Id that a log may show, or else a new one."""
    given = [value for name, value in scope["headers"] if name == _HEADER]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return bytes(given[0])
    return os.urandom(16).hex().encode()


_OF_BROWSERS = frozenset({b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode"})


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _whole(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
