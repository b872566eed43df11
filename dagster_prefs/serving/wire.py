"""The HTTP interface of the feature server: arguments, exact responses, errors, counts."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dagster_prefs.declarations.contract import ContractError
from dagster_prefs.declarations.registry import Key
from dagster_prefs.dynamodb.transport import ReadError
from dagster_prefs.engine.connection import EngineUnavailable
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.ids import BadId, Id, read_id
from dagster_prefs.serving.observing import Histogram, ReadCounts
from dagster_prefs.serving.pool import EngineBusy
from dagster_prefs.serving.preferences import PreferenceError, PreferencesUnavailable
from dagster_prefs.serving.profiles import MAX_IDS, ProfileError
from dagster_prefs.serving.prometheus import ReadCollector
from dagster_prefs.serving.served_log import LogError, checked_variant

T = TypeVar("T")
# Name, kind (gauge or counter), help and value of a metric.
Gauge = tuple[str, str, str, float]

logger = logging.getLogger(__name__)

# Key in a request's scope for its id, which is returned in the header and stands in each line of the log about it.
REQUEST = "prefs.request_id"
REQUEST_HEADER = "x-request-id"
# Enough for 10,000 ids of 100 bytes.
MAX_BODY_BYTES = 1024 * 1024
MAX_BUDGET_MS = 30_000
# The number of items in a ranking.
DEFAULT_LIMIT = 50
# A number as text, in the spellings that `dagster_prefs.ids` accepts.
NUMBER_ID = "[ \\t\\r\\n]*-?[0-9]{1,19}([.]0+)?[ \\t\\r\\n]*"
# The maximum length of an error message, whatever input it quotes.
MAX_MESSAGE_CHARACTERS = 2_000
# A longer name is not a typo, and the time to compare names grows with the square of their length.
MAX_NAME_CHARACTERS = 64
ERRORS = {
    400: "The request asks for something impossible.",
    403: "The request was called by a foreign host name, or by a page of another website.",
    408: "The request did not arrive in time.",
    413: "The body is too long.",
    414: "The path and query are too long.",
    500: "Only an operator can help; the code says what with.",
    503: "Not now: try again after Retry-After seconds.",
    504: "There was no answer within the budget.",
}
"""The statuses of errors that any request of /v1 can end with, and what they mean."""


class RequestError(PrefsError):
    """A request has invalid arguments."""


class BudgetSpent(PrefsError):
    """A response was not ready within the request's budget."""


class Arguments:
    """The arguments of a request, from its query or its body. Reading an invalid one raises RequestError."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    @classmethod
    def of_query(cls, request: Request, *known: str) -> Arguments:
        """Parse the query. Raises RequestError for an unknown or repeated name."""
        given = request.query_params
        _check_names(given, known, "parameter")
        for name in given:
            if len(given.getlist(name)) > 1:
                raise RequestError(f"{name} is given twice: give it once")
        return cls(dict(given))

    @classmethod
    async def of_body(cls, request: Request, *known: str) -> Arguments:
        """Parse a body with a JSON object. Raises RequestError for anything else and for unknown names."""
        cls.of_query(request)
        try:
            # orjson limits nesting depth and numbers itself, and parses 1 MiB in a few milliseconds.
            given = orjson.loads(await request.body())
        except orjson.JSONDecodeError:
            raise RequestError("the body is not valid JSON: send a JSON object") from None
        if not isinstance(given, dict):
            raise RequestError("the body is not a JSON object: send one")
        _check_names(given, known, "key")
        return cls(given)

    def budget_seconds(self) -> float | None:
        """Return budget_ms in seconds."""
        given = self.number("budget_ms")
        if given is not None and not 0 < given <= MAX_BUDGET_MS:
            raise RequestError(f"budget_ms is {given:g}: give milliseconds above 0, at most {MAX_BUDGET_MS}")
        return None if given is None else given / 1000

    def ids(self, keys: Sequence[Key]) -> list[Id]:
        """Return the list of ids, named like the key in the plural; for a composite key `keys`, a list of objects."""
        name = ids_name(keys)
        given = self._given.get(name)
        if not isinstance(given, list):
            raise RequestError(f"{name} must be a list: give a list of {name}")
        if len(given) > MAX_IDS:
            raise RequestError(f"{len(given)} {name} are more than {MAX_IDS} in one call: split them")
        return [wire_id(keys, value) for value in given]

    def text(self, name: str) -> str | None:
        value = self._given.get(name)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name} is {excerpt(value)}: give a text")
        return value

    def variant(self) -> str | None:
        """Return the variant of an experiment that the caller names, for the served log."""
        try:
            return checked_variant(self.text("variant"))
        except LogError as error:
            raise RequestError(str(error)) from None

    def domains(self) -> list[str] | None:
        value = self._given.get("domains")
        if isinstance(value, str):
            return [name.strip() for name in value.split(",")]
        if value is not None and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            raise RequestError(f"domains is {excerpt(value)}: give a list of names")
        # Without repetitions, because a name given a thousand times must not cause a thousand reads.
        return None if value is None else list(dict.fromkeys(value))

    def flag(self, name: str, default: T) -> bool | T:
        value = self._given.get(name)
        if value is None:
            return default
        known = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value not in known:
            raise RequestError(f"{name} is {excerpt(value)}: give true or false")
        return known[value]

    def number(self, name: str) -> float | None:
        value = self._given.get(name)
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch(
            r"-?[0-9]{1,30}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", value
        ):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(f"{name} is {excerpt(value)}: give a number")
        return float(value)

    def whole(self, name: str, default: int) -> int:
        value: object = self._given.get(name, default)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise RequestError(f"{name} is {excerpt(value)}: give a whole number")
        return value


class Metrics:
    """The server's counts, which only the event loop accesses, and those of its clients' reads."""

    def __init__(self, reads: ReadCounts | None = None) -> None:
        self._reads = reads
        self.in_flight = 0
        self.refused = 0
        self.partial = 0
        self._answers: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._answers[route, status] += 1
        self._seconds.setdefault(route, Histogram()).add(seconds)

    def text(self, more: Sequence[Gauge]) -> str:
        """Render these counts and `more` in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(self._families(more)))
        if self._reads is not None:
            registry.register(ReadCollector(self._reads))
        return generate_latest(registry).decode()

    def _families(self, more: Sequence[Gauge]) -> Iterator[Metric]:
        answers = CounterMetricFamily(
            "prefs_server_requests_total", "Answers by route and status.", labels=("route", "status")
        )
        for (route, status), count in sorted(self._answers.items()):
            answers.add_metric((route, str(status)), count)
        yield answers
        times = HistogramMetricFamily(
            "prefs_server_request_seconds", "Time to the answer by route.", labels=("route",)
        )
        for route, histogram in sorted(self._seconds.items()):
            times.add_metric((route,), histogram.cumulative(), histogram.seconds)
        yield times
        own: tuple[Gauge, ...] = (
            ("in_flight", "gauge", "Requests that are being answered.", self.in_flight),
            ("refused_total", "counter", "Requests that were refused because too many ran.", self.refused),
            ("partial_profiles_total", "counter", "Profiles that lacked a domain.", self.partial),
        )
        for name, kind, help_, value in (*own, *more):
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family(f"prefs_server_{name}", help_, value)


class _Families(Collector):
    def __init__(self, families: Iterator[Metric]) -> None:
        self._found = families

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families once."""
        return self._found


def encode(content: Any) -> bytes:
    """Encode plain values and dataclasses as JSON, with decimals as digits and times in UTC.

    Holds the interpreter for about a microsecond per value, so long responses are encoded on a thread.
    """
    return orjson.dumps(content, default=_digits, option=orjson.OPT_UTC_Z)


def _digits(value: Any) -> str:
    if isinstance(value, Decimal):
        return format(value, "f")
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def json_answer(content: Any, status: int = 200) -> Response:
    """Return a response with content for `encode`, or with JSON that is already encoded."""
    body = content if isinstance(content, bytes) else encode(content)
    return Response(body, status, {"x-content-type-options": "nosniff"}, "application/json")


def error_body(code: str, message: str) -> bytes:
    """Return the JSON of an error."""
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = f"{message[:MAX_MESSAGE_CHARACTERS]}…"
    # A name in a path or a driver's message may contain characters that UTF-8 cannot encode.
    text = message.encode("utf-8", "backslashreplace").decode()
    return encode({"error": {"code": code, "message": text}})


def error_answer(status: int, code: str, message: str) -> Response:
    """Return the response to a request that failed."""
    answer = json_answer(error_body(code, message), status)
    if status in (503, 504):
        answer.headers["retry-after"] = "1"
    elif status == 401:
        answer.headers["www-authenticate"] = "Bearer"
    return answer


def classify(error: PrefsError) -> tuple[int, str]:
    """Return an error's HTTP status and code: 400 for the caller's, 503 and 504 if temporary, else 500."""
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
    """Respond to an expected failure."""
    status, code = classify(error) if isinstance(error, PrefsError) else (500, "internal")
    if status == 500:
        logger.error("%s", error)
    return error_answer(status, code, str(error))


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Respond to Starlette's own errors about paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    known = {
        404: ("not_found", f"there is nothing at {excerpt(request.url.path)[1:-1]}: see the paths under /v1"),
        405: (
            "method_not_allowed",
            f"{excerpt(request.url.path)[1:-1]} does not take {excerpt(request.method)[1:-1]}",
        ),
    }
    code, message = known.get(error.status_code, ("bad_request", str(error.detail)))
    answer = error_answer(error.status_code, code, message)
    answer.headers.update(error.headers or {})
    return answer


async def answer_fault(request: Request, error: Exception) -> Response:
    """Respond to an unexpected error of this server."""
    # Starlette raises the error again and uvicorn logs it; its details are not for the caller.
    answer = error_answer(500, "internal", "the server failed: its log says where")
    # This response is made outside of the middleware that gives the others their id.
    request_id = request.scope.get(REQUEST)
    if request_id is not None:
        answer.headers[REQUEST_HEADER] = request_id.decode()
    return answer


def _check_names(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name[:MAX_NAME_CHARACTERS], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
            raise RequestError(f"unknown {what} {excerpt(name)}: {hint}")


def ids_name(keys: Sequence[Key]) -> str:
    """Return the name of the list of ids in a request for many: `learner_ids`, or `keys` for a composite key."""
    return f"{keys[0].name}s" if len(keys) == 1 else "keys"


def wire_id(keys: Sequence[Key], given: Any) -> Id:
    """An id, a number also as text: many languages cannot hold 64 bits in a JSON number.

    An id of a composite key is an object of its parts by column, or their list.
    """
    if len(keys) > 1 and isinstance(given, dict):
        names = [key.name for key in keys]
        if given.keys() != set(names):
            raise RequestError(f"a key is an object with {', '.join(names)}, not {excerpt(given)}")
        given = [given[name] for name in names]
    try:
        return read_id(keys, given)
    except BadId as error:
        raise RequestError(str(error)) from None
