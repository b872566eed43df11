"""The feature server: profiles and rankings over HTTP, for services that are not written in Python.

Responses are JSON. Decimals are strings of digits, because most parsers of JSON numbers round them to
doubles; integers are numbers, times are ISO 8601 in UTC. An error is `{"error": {"code", "message"}}` with
the sentence that the Python clients raise.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dagster_prefs.access import Entrance
from dagster_prefs.declarations.reserved import PREFIX, canary_id, spare_of
from dagster_prefs.dynamodb.reader import BATCH_FROM
from dagster_prefs.dynamodb.transport import ReadError
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import Id
from dagster_prefs.loopback import listen
from dagster_prefs.serving.catalogue import CatalogueRanker
from dagster_prefs.serving.connections import (
    ENDS,
    ConnectionLimits,
    Connections,
    LimitedProtocol,
    raise_file_limit,
)
from dagster_prefs.serving.gate import ARRIVED, Gate, Hosts
from dagster_prefs.serving.observing import Watched
from dagster_prefs.serving.openapi import openapi, profiles_path
from dagster_prefs.serving.pool import TURN
from dagster_prefs.serving.preferences import (
    DEFAULT_PROFILE_LIMIT,
    PROFILE_LISTS,
    PreferencesUnavailable,
    ProfileList,
    ShopClient,
)
from dagster_prefs.serving.profiles import AsyncProfileClient, Profile, ReadOptions
from dagster_prefs.serving.served_log import called
from dagster_prefs.serving.wire import (
    DEFAULT_LIMIT,
    Arguments,
    BudgetSpent,
    Metrics,
    RequestError,
    answer_error,
    answer_fault,
    answer_http_error,
    encode,
    ids_name,
    json_answer,
    wire_id,
)

# A function that returns what is to be encoded.
Content = Callable[[], Any]

logger = logging.getLogger(__name__)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Python's default of 5 ms, times the number of threads, would use up most of the time allowed for /healthz.
SWITCH_SECONDS = 0.0005
# A reserved id without data, for which the readiness check makes the reads of a profile request.
READINESS_USER = f"{PREFIX}readiness"
# Encoding a profile takes some 20 µs; at most this share of a budget is reserved for it.
ENCODE_SECONDS_PER_PROFILE = 50e-6
ENCODE_SHARE = 0.25
# This many unreadable items in a row are not damage to single items.
UNREADABLE_IN_A_ROW = 3
READ_ARGUMENTS = ("domains", "budget_ms", "fallback", "consistent", "max_staleness_seconds", "variant")


@dataclass(frozen=True)
class Load:
    """The limits of concurrent work.

    `budget_seconds` bounds every response, including the wait for a thread and its encoding, unless the
    request sets `budget_ms`; profiles have their client's budget. Beyond `max_in_flight` requests the server
    responds with 503 at once. `threads` is the number of concurrent reads of the engine.
    """

    budget_seconds: float = 1.0
    max_in_flight: int = 256
    threads: int = 8


def make_app(
    profiles: Sequence[AsyncProfileClient],
    preferences: ShopClient | None,
    *,
    load: Load = Load(),
    catalogue_refresh_seconds: float | None = 30.0,
    allowed_hosts: Sequence[str] = (),
    watched: Watched = Watched(),  # noqa: B008 (it is frozen)
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Starlette:
    """Build the server's app over the given clients, which it closes; without a client its routes are absent.

    The profiles of the first entity are at /v1/profiles, those of each other one at /v1/<entity>/profiles.

    Rankings come from a catalogue in memory, which is refreshed every `catalogue_refresh_seconds`, or are
    computed in SQL if that is None. `allowed_hosts` are names by which the server may be called besides
    localhost and IP addresses. `watched` is what the metrics page shows of the clients' reads, who traces requests, and
    the clients' served log.
    `clock` returns the time for sessions, in UTC.
    """
    metrics = Metrics(watched.counts)
    parts: list[_Part] = []
    for position, client in enumerate(profiles):
        parts.append(_Profiles(client, metrics, "" if position == 0 else client.entity.name))
    if preferences is not None:
        parts.append(_Users(preferences, load, catalogue_refresh_seconds, clock))
    looking: asyncio.Task[dict[str, str]] | None = None

    async def alive(_: Request) -> Response:
        return json_answer({"status": "ok"})

    async def look() -> dict[str, str]:
        problems = await asyncio.gather(*(_problem(part.check()) for part in parts))
        return {part.name: problem for part, problem in zip(parts, problems, strict=True) if problem}

    async def ready(_: Request) -> Response:
        """Report for each part whether it can answer requests; 503 if one cannot."""
        nonlocal looking
        # Concurrent requests share one check, so that frequent ones do not load the stores.
        if looking is None or looking.done():
            looking = asyncio.create_task(look())
        problems = dict(await asyncio.shield(looking))
        if metrics.in_flight >= load.max_in_flight:
            problems["requests"] = f"{metrics.in_flight} requests are being answered, and more are refused"
        told = {**{part.name: "ok" for part in parts}, **problems}
        return json_answer({"ready": not problems, "parts": told}, 503 if problems else 200)

    async def scrape(request: Request) -> Response:
        gauges = [gauge for part in parts for gauge in part.gauges()]
        connections: Connections | None = getattr(request.app.state, "connections", None)
        if connections is not None:
            gauges.append(("connections", "gauge", "Open connections.", len(connections.open)))
            gauges += [
                (f"connections_{end}_total", "counter", f"Connections that {told}.", connections.ended[end])
                for end, told in ENDS.items()
            ]
        if watched.log is not None:
            logged = watched.log.counts
            gauges += [
                ("log_rows_total", "counter", "Rows of the served log that were written.", logged.written),
                ("log_dropped_total", "counter", "Rows of the served log that were dropped.", logged.dropped),
                ("log_failures_total", "counter", "Writes of the served log that failed.", logged.failures),
            ]
        return PlainTextResponse(metrics.text(gauges), headers={"content-type": METRICS_TYPE})

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if watched.log is not None:
                stack.push_async_callback(asyncio.to_thread, watched.log.close)
            for part in parts:
                await part.start(stack)
            yield

    served = [(client.entity, client.domains) for client in profiles]
    version = profiles[0].contract.version if profiles else 0
    document = encode(openapi(served, version=version, preferences=preferences is not None))

    async def describe(_: Request) -> Response:
        return json_answer(document)

    operational = [
        Route("/healthz", alive),
        Route("/readyz", ready),
        Route("/metrics", scrape),
        Route("/openapi.json", describe),
    ]
    return Starlette(
        routes=[*operational, *(route for part in parts for route in part.routes())],
        middleware=[
            Middleware(
                Gate,
                metrics=metrics,
                max_in_flight=load.max_in_flight,
                hosts=Hosts(allowed_hosts),
                spans=watched.spans,
            )
        ],
        exception_handlers={
            PrefsError: answer_error,
            HTTPException: answer_http_error,
            Exception: answer_fault,
        },
        lifespan=life,
    )


def make_server(
    app: Starlette,
    limits: ConnectionLimits,
    *,
    drain_seconds: int = 10,
    entrance: Entrance = Entrance(),  # noqa: B008 (it is frozen)
) -> uvicorn.Server:
    """Run the app on uvicorn, with connections that end when a client exceeds the limits."""
    connections = app.state.connections = Connections(limits)
    app.state.tokens = entrance.tokens
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=partial(LimitedProtocol, connections=connections),  # type: ignore[arg-type] # makes protocols too
            lifespan="on",
            ws="none",
            # Request paths contain ids of people.
            access_log=False,
            # uvicorn would log a warning for every request that is not HTTP.
            log_level="error",
            # To the handlers of this process, as any other line.
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=drain_seconds,
            # The number of connections accepted at once before the first one is handled.
            backlog=128,
            ssl_certfile=entrance.certificate,
            ssl_keyfile=entrance.key,
        )
    )


def serve(
    app: Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008 (it is frozen)
    drain_seconds: int = 10,
    entrance: Entrance = Entrance(),  # noqa: B008 (it is frozen)
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer the requests in flight, for at most `drain_seconds`.

    Port 0 selects a free one; `started` is called with the URL. Raises CannotListen if the address is in
    use, AccessError off loopback without tokens.
    """
    entrance.check(host, "the feature server")
    listener = listen(host, port, backlog=2048)
    name = f"[{host}]" if ":" in host else host
    limits = replace(limits, connections=raise_file_limit(limits.connections))
    # The event loop may wait this long for each thread that reads or encodes.
    sys.setswitchinterval(SWITCH_SECONDS)
    with listener:
        if started is not None:
            started(f"{entrance.scheme}://{name}:{listener.getsockname()[1]}")
        make_server(app, limits, drain_seconds=drain_seconds, entrance=entrance).run(sockets=[listener])


class _Part(Protocol):
    """The routes that use one client."""

    name: str

    def routes(self) -> list[Route]: ...

    async def start(self, stack: AsyncExitStack) -> None:
        """Prepare to serve; registers what has to be closed on the stack."""

    async def check(self) -> None:
        """Raise an error if requests cannot be answered."""

    def gauges(self) -> list[tuple[str, str, str, float]]:
        """Return name, kind, help and value of its own metrics."""


class _Profiles:
    """Profiles of one entity from DynamoDB; `entity` is empty for the one at /v1/profiles."""

    def __init__(self, client: AsyncProfileClient, metrics: Metrics, entity: str) -> None:
        self.name = f"{entity} profiles" if entity else "profiles"
        self._path = profiles_path(entity)
        self._entity = client.entity
        self._keys = client.entity.keys
        self._client = client
        # Per domain, the ids whose item could not be read since the last successful read.
        self._unreadable: dict[str, dict[Id, None]] = {}
        self._metrics = metrics
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="encode")

    def routes(self) -> list[Route]:
        return [
            Route(self._path, self._many, methods=["POST"]),
            # A text may hold a slash.
            Route(f"{self._path}/{{{'__'.join(self._entity.key_names)}:path}}", self._one),
        ]

    def _asked_id(self, request: Request) -> Id:
        if len(self._keys) == 1:
            return wire_id(self._keys, request.path_params[self._keys[0].name])
        # The undecoded path, because a slash within a part is escaped, and one between parts is not.
        sent = request.scope["raw_path"].decode("ascii", "replace")
        parts = [unquote(part) for part in sent.partition(f"{self._path}/")[2].split("/")]
        if len(parts) != len(self._keys):
            raise RequestError(
                f"a key has {len(self._keys)} parts, {'/'.join(self._entity.key_names)}, and the path has "
                f"{len(parts)}: give each, with %2F for a slash within one"
            )
        return wire_id(self._keys, parts)

    async def start(self, stack: AsyncExitStack) -> None:
        stack.push_async_callback(self._client.close)
        stack.callback(self._encoders.shutdown)
        await self._client.warm()

    async def check(self) -> None:
        """Try both kinds of DynamoDB request, either of which may be forbidden, and repeat failed reads.

        Damaged items of one id do not make the server unready; those of several ids in a row do.
        """
        registry, entity, one = self._client.registry, self._entity, [self._client.domains[0].name]
        canary = canary_id(registry, entity)
        spares = [
            canary_id(registry, entity, spare_of(entity.key, number)) for number in range(1, BATCH_FROM)
        ]
        many, single = await asyncio.gather(
            self._client.get_many([canary, *spares]), self._client.get(canary, one)
        )
        for found in (single, *many.values()):
            for read in found.reads.values():
                if read.error is not None:
                    raise read.error
        for domain, ids in list(self._unreadable.items()):
            if len(ids) < UNREADABLE_IN_A_ROW:
                continue
            again = await self._client.get_many(list(ids), [domain])
            errors = [profile.reads[domain].error for profile in again.values()]
            if None not in errors and errors[0] is not None:
                raise errors[0]
            self._unreadable.pop(domain, None)

    def _note(self, found: Profile) -> None:
        for domain, read in found.reads.items():
            if read.state == "found":
                self._unreadable.pop(domain, None)
            elif read.error is not None and not isinstance(read.error, ReadError):
                ids = self._unreadable.setdefault(domain, {})
                if len(ids) < UNREADABLE_IN_A_ROW:
                    ids[found.id] = None

    def gauges(self) -> list[tuple[str, str, str, float]]:
        return []

    async def _one(self, request: Request) -> Response:
        asked = Arguments.of_query(request, *READ_ARGUMENTS)
        id_ = self._asked_id(request)
        options = _read_options(asked, request.scope[ARRIVED])
        with called(variant=asked.variant()):
            found = await self._client.get(id_, asked.domains(), **options)
        self._note(found)
        if found.failure is not None:
            raise found.failure
        self._metrics.partial += found.partial
        return json_answer(found.as_dict())

    async def _many(self, request: Request) -> Response:
        started = request.scope[ARRIVED]
        asked = await Arguments.of_body(request, ids_name(self._keys), *READ_ARGUMENTS)
        ids, domains, options = asked.ids(self._keys), asked.domains(), _read_options(asked, started)
        budget = options["budget_seconds"] or self._client.default_budget_seconds(len(ids), domains)
        encoding = min(budget * ENCODE_SHARE, len(ids) * ENCODE_SECONDS_PER_PROFILE)
        options["budget_seconds"] = budget - encoding
        with called(variant=asked.variant()):
            found = await self._client.get_many(ids, domains, **options)
        answered = list(found.values())
        for profile in answered:
            self._note(profile)
        failures = [profile.failure for profile in answered if profile.failure is not None]
        if len(failures) == len(answered):
            raise failures[0]
        incomplete = sum(profile.partial for profile in answered)
        self._metrics.partial += incomplete

        def content() -> dict[str, Any]:
            return {"partial": incomplete > 0, "profiles": [profile.as_dict() for profile in answered]}

        return json_answer(await _in_time(self._encoders, lambda: content, started, budget))


class _Users:
    """Shop user profiles and rankings from the engine."""

    name = "preferences"

    def __init__(
        self,
        client: ShopClient,
        load: Load,
        refresh_seconds: float | None,
        clock: Callable[[], datetime],
    ) -> None:
        self._client = client
        self._budget = load.budget_seconds
        self._refresh_seconds = refresh_seconds
        self._ranker = None if refresh_seconds is None else CatalogueRanker(client)
        self._threads = ThreadPoolExecutor(load.threads, thread_name_prefix="preferences")
        self._clock = clock
        self._items = self._failures = 0
        self._refreshed_at: float | None = None
        self._keeping: asyncio.Task[None] | None = None

    def routes(self) -> list[Route]:
        # A user id may contain a slash.
        return [
            Route("/v1/users/{user_id:path}/profile", self._profile),
            Route("/v1/users/{user_id:path}/ranking", self._ranking),
            *(
                Route(f"/v1/users/{{user_id:path}}/{name}", partial(self._more, name))
                for name in PROFILE_LISTS
            ),
        ]

    async def start(self, stack: AsyncExitStack) -> None:
        stack.callback(self._client.close)
        stack.callback(self._threads.shutdown)
        if self._ranker is not None and self._refresh_seconds is not None:
            keeping = self._keep_catalogue(self._ranker, self._refresh_seconds)
            self._keeping = asyncio.create_task(keeping)
            stack.push_async_callback(_cancelled, self._keeping)

    async def check(self) -> None:
        if self._keeping is not None and self._keeping.done():
            # The task only ends by an error, which must be reported.
            self._keeping.result()
        await _in_time(self._threads, self._try, time.monotonic(), self._budget)
        if self._ranker is not None and self._refreshed_at is None:
            raise PreferencesUnavailable("the catalogue is not in memory yet: wait for its first refresh")

    def gauges(self) -> list[tuple[str, str, str, float]]:
        if self._ranker is None:
            return []
        age = -1.0 if self._refreshed_at is None else time.monotonic() - self._refreshed_at
        return [
            ("catalogue_items", "gauge", "Items in memory for rankings.", self._items),
            ("catalogue_age_seconds", "gauge", "Time since the last refresh; -1 before the first.", age),
            ("catalogue_failures_total", "counter", "Refreshes that failed.", self._failures),
        ]

    def _try(self) -> Content:
        """Make the reads of a request. Raises like them."""
        self._client.get_user_profile(READINESS_USER, now=self._clock(), limit=1)
        if self._ranker is None:
            self._client.check_items()
        return dict

    async def _profile(self, request: Request) -> Response:
        asked = Arguments.of_query(request, "limit", "budget_ms")
        read = partial(
            self._client.get_user_profile,
            request.path_params["user_id"],
            now=self._clock(),
            limit=asked.whole("limit", DEFAULT_PROFILE_LIMIT),
        )

        def answer() -> Content:
            found = read()
            return lambda: {**_fields(found), "known": found.known}

        return await self._answer(request, asked, answer)

    async def _more(self, name: ProfileList, request: Request) -> Response:
        asked = Arguments.of_query(request, "cursor", "limit", "budget_ms")
        read = partial(
            self._client.get_more,
            request.path_params["user_id"],
            name,
            asked.text("cursor"),
            now=self._clock(),
            limit=asked.whole("limit", DEFAULT_PROFILE_LIMIT),
        )
        return await self._answer(request, asked, lambda: partial(_fields, read()))

    async def _ranking(self, request: Request) -> Response:
        asked = Arguments.of_query(request, "limit", "session", "explain", "budget_ms")
        rank: Callable[..., Any] = self._client.rank if self._ranker is None else self._ranker.rank
        read = partial(
            rank,
            request.path_params["user_id"],
            asked.whole("limit", DEFAULT_LIMIT),
            session=asked.flag("session", True),
            explain=asked.flag("explain", False),
            now=self._clock(),
        )

        def answer() -> Content:
            found = _fields(read())
            del found["parameters"]
            return lambda: found

        return await self._answer(request, asked, answer)

    async def _answer(self, request: Request, asked: Arguments, read: Callable[[], Content]) -> Response:
        budget = asked.budget_seconds() or self._budget
        return json_answer(await _in_time(self._threads, read, request.scope[ARRIVED], budget))

    async def _keep_catalogue(self, ranker: CatalogueRanker, every_seconds: float) -> None:
        """Refresh the catalogue forever; the old one is used while refreshes fail."""
        while True:
            try:
                report = await asyncio.get_running_loop().run_in_executor(None, ranker.refresh)
                self._items, self._refreshed_at = report.items, time.monotonic()
            except PrefsError as error:
                self._failures += 1
                logger.warning("the catalogue was not refreshed: %s", error)
            await asyncio.sleep(every_seconds)


async def _in_time(threads: Executor, read: Callable[[], Content], started: float, budget: float) -> bytes:
    """Read and encode on a thread. Raises BudgetSpent once `budget` seconds have passed since `started`."""
    deadline = started + budget

    def checked() -> None:
        if time.monotonic() >= deadline:
            # The caller has already got its response.
            raise BudgetSpent("the budget was spent before the thread came to it")

    def work() -> bytes:
        checked()
        content = read()
        with TURN:
            checked()
            return encode(content())

    try:
        # With this request's context: its id, and the span that the read belongs to.
        running = asyncio.get_running_loop().run_in_executor(threads, copy_context().run, work)
        return await asyncio.wait_for(running, deadline - time.monotonic())
    except (TimeoutError, BudgetSpent):
        raise BudgetSpent(
            f"there was no answer within {budget * 1000:g} ms: raise budget_ms, or look at the engine's load"
        ) from None


def _fields(found: Any) -> dict[str, Any]:
    """Return the fields of a dataclass; `encode` accepts nested dataclasses as they are."""
    return {field.name: getattr(found, field.name) for field in fields(found)}


def _read_options(asked: Arguments, started: float) -> ReadOptions:
    return {
        "started_at": started,
        "budget_seconds": asked.budget_seconds(),
        "fallback": asked.text("fallback"),  # type: ignore[typeddict-item] # the client checks it
        "consistent": asked.flag("consistent", None),
        "max_staleness_seconds": asked.number("max_staleness_seconds"),
    }


async def _problem(check: Awaitable[None]) -> str | None:
    try:
        await check
    except PrefsError as error:
        return str(error)
    return None


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
