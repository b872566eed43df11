"""HTTP as the feature server speaks it: arguments, exact answers, errors, counts."""

from __future__ import annotations

import difflib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dagster_prefs import ids
from dagster_prefs.engine.connection import EngineUnavailable
from dagster_prefs.errors import PrefsError
from dagster_prefs.online.contract import ContractError
from dagster_prefs.online.transport import ReadError
from dagster_prefs.serving.pool import EngineBusy
from dagster_prefs.serving.preferences import PreferenceError, PreferencesUnavailable
from dagster_prefs.serving.profiles import ProfileError

T = TypeVar("T")

logger = logging.getLogger(__name__)

# 10,000 viewer ids of 20 digits, with room.
MAX_BODY_BYTES = 1024 * 1024
MAX_BUDGET_MS = 30_000
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# What an orchestrator and a scraper ask must be answered however busy the server is.
OPERATIONAL = frozenset({"/healthz", "/readyz", "/metrics"})


class RequestError(PrefsError):
    """A request asks for something impossible."""


class BudgetSpent(PrefsError):
    """An answer did not come within the request's budget."""


class Arguments:
    """The arguments of a request, from its query or its body; reading one raises RequestError."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    @classmethod
    def of_query(cls, request: Request, *known: str) -> Arguments:
        """The query's; raises RequestError for a name that is not known or given twice."""
        given = request.query_params
        _check_names(given, known, "parameter")
        for name in given:
            if len(given.getlist(name)) > 1:
                raise RequestError(f"{name} is given twice: give it once")
        return cls(dict(given))

    @classmethod
    async def of_body(cls, request: Request, *known: str) -> Arguments:
        """Those of a JSON object; raises RequestError for anything else and for names that are not known."""
        cls.of_query(request)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413)
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestError("the body is not valid JSON: send a JSON object") from None
        if not isinstance(given, dict):
            raise RequestError("the body is not a JSON object: send one")
        _check_names(given, known, "key")
        return cls(given)

    def budget_seconds(self) -> float | None:
        """budget_ms, in seconds."""
        given = self.number("budget_ms")
        if given is not None and not 0 < given <= MAX_BUDGET_MS:
            raise RequestError(f"budget_ms is {given:g}: give milliseconds above 0, at most {MAX_BUDGET_MS}")
        return None if given is None else given / 1000

    def viewer_ids(self) -> list[int]:
        """viewer_ids, numbers or text."""
        given = self._given.get("viewer_ids")
        if not isinstance(given, list):
            raise RequestError("viewer_ids is missing or no list: give a list of viewer ids")
        return [viewer_id(value) for value in given]

    def text(self, name: str) -> str | None:
        value = self._given.get(name)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name} is {value!r}: give a text")
        return value

    def domains(self) -> list[str] | None:
        value = self._given.get("domains")
        if isinstance(value, str):
            return [name.strip() for name in value.split(",")]
        if value is not None and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            raise RequestError(f"domains is {value!r}: give a list of names")
        return value

    def flag(self, name: str, default: T) -> bool | T:
        value = self._given.get(name)
        if value is None:
            return default
        known = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value not in known:
            raise RequestError(f"{name} is {value!r}: give true or false")
        return known[value]

    def number(self, name: str) -> float | None:
        value = self._given.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise RequestError(f"{name} is {value!r}: give a number") from None

    def whole(self, name: str, default: int) -> int:
        value = self._given.get(name, default)
        try:
            if isinstance(value, bool):
                raise ValueError
            return int(str(value))
        except ValueError:
            raise RequestError(f"{name} is {value!r}: give a whole number") from None


class Metrics:
    """Counts of the server; only the event loop touches them."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.refused = 0
        self.partial = 0
        self._answers: Counter[tuple[str, int]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._answers[route, status] += 1
        buckets = self._buckets.setdefault(route, [0] * (len(LATENCY_BUCKETS) + 1))
        for number, bound in enumerate((*LATENCY_BUCKETS, float("inf"))):
            buckets[number] += seconds <= bound
        self._seconds[route] += seconds  # type: ignore[assignment] # a Counter adds floats as well

    def lines(self, more: Sequence[tuple[str, str, str, float]]) -> Iterator[str]:
        """Prometheus' text format."""
        yield from _head("requests_total", "counter", "Answers by route and status.")
        for (route, status), count in sorted(self._answers.items()):
            yield f'prefs_server_requests_total{{route="{route}",status="{status}"}} {count}'
        yield from _head("request_seconds", "histogram", "Time to the answer by route.")
        for route, buckets in sorted(self._buckets.items()):
            for bound, count in zip((*map(str, LATENCY_BUCKETS), "+Inf"), buckets, strict=True):
                yield f'prefs_server_request_seconds_bucket{{route="{route}",le="{bound}"}} {count}'
            yield f'prefs_server_request_seconds_sum{{route="{route}"}} {self._seconds[route]:.6f}'
            yield f'prefs_server_request_seconds_count{{route="{route}"}} {buckets[-1]}'
        own = (
            ("in_flight", "gauge", "Requests that are being answered.", self.in_flight),
            ("refused_total", "counter", "Requests that were refused because too many ran.", self.refused),
            ("partial_profiles_total", "counter", "Profiles that lacked a domain.", self.partial),
        )
        for name, kind, told, value in (*own, *more):
            yield from _head(name, kind, told)
            yield f"prefs_server_{name} {value}"


def _head(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP prefs_server_{name} {told}"
    yield f"# TYPE prefs_server_{name} {kind}"


class Gate:
    """Counts requests, and refuses those that are more than `max_in_flight` at a time."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_in_flight: int) -> None:
        self._app = app
        self._metrics = metrics
        self._most = max_in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPERATIONAL:
            await self._app(scope, receive, send)
            return
        metrics = self._metrics
        if metrics.in_flight >= self._most:
            metrics.refused += 1
            error = f"{self._most} requests are being answered: try again, or add a server"
            await _error(503, "busy", error)(scope, receive, send)
            return
        started = time.monotonic()
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.in_flight += 1
        try:
            await self._app(scope, receive, note)
        finally:
            metrics.in_flight -= 1
            route = scope.get("route")
            name = route.path if isinstance(route, Route) else "other"
            metrics.answered(name, status, time.monotonic() - started)


class _Exact(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content, default=_plain, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "backslashreplace"
        )


def _plain(value: Any) -> str:
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def json_answer(content: Any, status: int = 200) -> Response:
    """Content with decimals as digits and times in UTC."""
    return _Exact(content, status)


def _error(status: int, code: str, message: str) -> Response:
    headers = {"retry-after": "1"} if status in (503, 504) else None
    return _Exact({"error": {"code": code, "message": message}}, status, headers)


def classify(error: PrefsError) -> tuple[int, str]:
    """The HTTP status and the code of an error: 400 for the caller's, 503 and 504 for what may pass, else 500."""
    if isinstance(error, ReadError):
        if error.kind == "timeout":
            return 504, "timeout"
        return (503, "unavailable") if error.transient else (500, error.kind)
    if isinstance(error, BudgetSpent):
        return 504, "timeout"
    if isinstance(error, (PreferencesUnavailable, EngineUnavailable)):
        return 503, "unavailable"
    if isinstance(error, EngineBusy):
        return 503, "busy"
    if isinstance(error, (RequestError, ProfileError, PreferenceError, ContractError)):
        return 400, "bad_request"
    return 500, "internal"


async def answer_error(_: Request, error: Exception) -> Response:
    """The answer to an expected failure."""
    status, code = classify(error) if isinstance(error, PrefsError) else (500, "internal")
    if status == 500:
        logger.error("%s", error)
    return _error(status, code, str(error))


async def answer_http_error(request: Request, error: Exception) -> Response:
    """The answer to what Starlette refuses: paths, methods, sizes."""
    if not isinstance(error, HTTPException):
        raise error
    known = {
        404: ("not_found", f"there is nothing at {request.url.path}: see the paths under /v1"),
        405: ("method_not_allowed", f"{request.url.path} does not take {request.method}"),
        413: ("too_large", f"the body is longer than {MAX_BODY_BYTES} bytes: split the request"),
    }
    code, message = known.get(error.status_code, ("bad_request", str(error.detail)))
    answer = _error(error.status_code, code, message)
    answer.headers.update(error.headers or {})
    return answer


async def answer_fault(_: Request, error: Exception) -> Response:
    """The answer to a fault of this server."""
    # Starlette raises it again, and uvicorn logs it; what is inside is not for the caller.
    return _error(500, "internal", "the server failed: its log says where")


def _check_names(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
            raise RequestError(f"unknown {what} {name!r}: {hint}")


def viewer_id(given: Any) -> int:
    """A viewer id, also as text: many languages cannot hold 64 bits in a JSON number."""
    try:
        return ids.viewer_id(given)
    except ids.BadId as error:
        raise RequestError(str(error)) from None
