"""The feature server: profiles and rankings over HTTP, for services that are not written in Python.

Answers are JSON. Decimals are strings of digits, because most readers of JSON numbers round them to
doubles; integers are numbers, times are ISO 8601 in UTC. An error is `{"error": {"code", "message"}}` with
the sentence that the Python clients raise.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dagster_prefs.errors import PrefsError
from dagster_prefs.online.contract import load_contract
from dagster_prefs.online.reserved import CANARY_VIEWER_ID
from dagster_prefs.serving.catalogue import CatalogueRanker
from dagster_prefs.serving.openapi import openapi
from dagster_prefs.serving.preferences import PreferenceClient, PreferencesUnavailable
from dagster_prefs.serving.profiles import AsyncProfileClient, ReadOptions
from dagster_prefs.serving.wire import (
    Arguments,
    BudgetSpent,
    Gate,
    Metrics,
    answer_error,
    answer_fault,
    answer_http_error,
    json_answer,
    viewer_id,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
READ_ARGUMENTS = ("domains", "budget_ms", "fallback", "consistent", "max_staleness_seconds")


class ServerError(PrefsError):
    """The server cannot listen at its address."""


def make_app(
    profiles: AsyncProfileClient | None,
    preferences: PreferenceClient | None,
    *,
    budget_seconds: float = 1.0,
    catalogue_refresh_seconds: float | None = 30.0,
    max_in_flight: int = 256,
    threads: int = 8,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Starlette:
    """The server's app over the clients it is given, and closes; without one its routes are absent.

    `budget_seconds` bounds every answer, the wait for a thread included, unless the request asks for another
    with `budget_ms`; that of profiles is their client's. Rankings come from a catalogue in memory that is
    brought up to date every `catalogue_refresh_seconds`, or are computed in SQL where that is None. Beyond
    `max_in_flight` requests at a time the answer is 503 at once. `clock` gives now for sessions, in UTC.
    """
    metrics = Metrics()
    parts: list[_Part] = []
    if profiles is not None:
        parts.append(_Profiles(profiles, metrics))
    if preferences is not None:
        parts.append(_Users(preferences, budget_seconds, catalogue_refresh_seconds, threads, clock))

    async def alive(_: Request) -> Response:
        return json_answer({"status": "ok"})

    async def ready(_: Request) -> Response:
        """Whether requests can be answered, part by part; 503 where one cannot."""
        problems = await asyncio.gather(*(_problem(part.check()) for part in parts))
        told = {part.name: problem or "ok" for part, problem in zip(parts, problems, strict=True)}
        return json_answer({"ready": not any(problems), "parts": told}, 503 if any(problems) else 200)

    async def scrape(_: Request) -> Response:
        lines = metrics.lines([gauge for part in parts for gauge in part.gauges()])
        text = "".join(f"{line}\n" for line in lines)
        return PlainTextResponse(text, headers={"content-type": METRICS_TYPE})

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for part in parts:
                await part.start(stack)
            yield

    contract = load_contract() if profiles is None else profiles.contract
    document = openapi(contract, profiles=profiles is not None, preferences=preferences is not None)

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
        middleware=[Middleware(Gate, metrics=metrics, max_in_flight=max_in_flight)],
        exception_handlers={
            PrefsError: answer_error,
            HTTPException: answer_http_error,
            Exception: answer_fault,
        },
        lifespan=life,
    )


def serve(
    app: Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    drain_seconds: int = 10,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are answered first, for `drain_seconds` at most.

    Port 0 takes a free one; `started` is given the URL. Raises ServerError where the address is not free.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServerError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}): choose another --host or --port"
        ) from None
    name = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        # Paths hold the ids of people.
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=drain_seconds,
    )
    with listener:
        if started is not None:
            started(f"http://{name}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])


class _Part(Protocol):
    """Routes that stand on one client."""

    name: str

    def routes(self) -> list[Route]: ...

    async def start(self, stack: AsyncExitStack) -> None:
        """Make ready to serve; what is to be ended goes on the stack."""

    async def check(self) -> None:
        """Raises why requests cannot be answered."""

    def gauges(self) -> list[tuple[str, str, str, float]]:
        """Name, kind, help and value of metrics of its own."""


class _Profiles:
    """Viewer profiles from DynamoDB."""

    name = "profiles"

    def __init__(self, client: AsyncProfileClient, metrics: Metrics) -> None:
        self._client = client
        self._metrics = metrics

    def routes(self) -> list[Route]:
        return [
            Route("/v1/profiles", self._many, methods=["POST"]),
            Route("/v1/profiles/{viewer_id}", self._one),
        ]

    async def start(self, stack: AsyncExitStack) -> None:
        stack.push_async_callback(self._client.close)
        await self._client.warm()

    async def check(self) -> None:
        found = await self._client.get(CANARY_VIEWER_ID)
        if found.failure is not None:
            raise found.failure

    def gauges(self) -> list[tuple[str, str, str, float]]:
        return []

    async def _one(self, request: Request) -> Response:
        asked = Arguments.of_query(request, *READ_ARGUMENTS)
        viewer = viewer_id(request.path_params["viewer_id"])
        found = await self._client.get(viewer, asked.domains(), **_read_options(asked))
        if found.failure is not None:
            raise found.failure
        self._metrics.partial += found.partial
        return json_answer(found.as_dict())

    async def _many(self, request: Request) -> Response:
        asked = await Arguments.of_body(request, "viewer_ids", *READ_ARGUMENTS)
        found = await self._client.get_many(asked.viewer_ids(), asked.domains(), **_read_options(asked))
        answered = list(found.values())
        failures = [profile.failure for profile in answered if profile.failure is not None]
        if len(failures) == len(answered):
            raise failures[0]
        incomplete = sum(profile.partial for profile in answered)
        self._metrics.partial += incomplete
        return json_answer(
            {"partial": incomplete > 0, "profiles": [profile.as_dict() for profile in answered]}
        )


class _Users:
    """Preference profiles and rankings from the engine."""

    name = "preferences"

    def __init__(
        self,
        client: PreferenceClient,
        budget_seconds: float,
        refresh_seconds: float | None,
        threads: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._client = client
        self._budget = budget_seconds
        self._refresh_seconds = refresh_seconds
        self._ranker = None if refresh_seconds is None else CatalogueRanker(client)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="preferences")
        self._clock = clock
        self._items = self._failures = 0
        self._refreshed_at: float | None = None
        self._keeping: asyncio.Task[None] | None = None

    def routes(self) -> list[Route]:
        # A user id may hold a slash.
        return [
            Route("/v1/users/{user_id:path}/profile", self._profile),
            Route("/v1/users/{user_id:path}/ranking", self._ranking),
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
            # It only ends by a fault, which must not stay unseen.
            self._keeping.result()
        await self._within(self._budget, self._client.warm)
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

    async def _profile(self, request: Request) -> Response:
        asked = Arguments.of_query(request, "budget_ms")
        user = request.path_params["user_id"]
        found = await self._within(
            asked.budget_seconds() or self._budget,
            partial(self._client.get_user_profile, user, now=self._clock()),
        )
        return json_answer({**found.as_dict(), "known": found.known})

    async def _ranking(self, request: Request) -> Response:
        asked = Arguments.of_query(request, "limit", "session", "explain", "budget_ms")
        rank: Callable[..., Any] = self._client.rank if self._ranker is None else self._ranker.rank
        read = partial(
            rank,
            request.path_params["user_id"],
            asked.whole("limit", 50),
            session=asked.flag("session", True),
            explain=asked.flag("explain", False),
            now=self._clock(),
        )
        found = await self._within(asked.budget_seconds() or self._budget, read)
        return json_answer(
            {
                "user_id": found.user_id,
                "session_active": found.session_active,
                "session_seconds": found.session_seconds,
                "items": [item.as_dict() for item in found],
            }
        )

    async def _within(self, budget: float, read: Callable[[], T]) -> T:
        """Run a read of the engine on a thread; raises BudgetSpent when it takes longer than the budget."""
        deadline = time.monotonic() + budget

        def in_time() -> T:
            if time.monotonic() >= deadline:
                # Its caller has been answered already.
                raise BudgetSpent("no thread was free in time")
            return read()

        try:
            running = asyncio.get_running_loop().run_in_executor(self._threads, in_time)
            return await asyncio.wait_for(running, budget)
        except (TimeoutError, BudgetSpent):
            raise BudgetSpent(
                f"there was no answer within {budget * 1000:g} ms: raise budget_ms, or look at the engine's load"
            ) from None

    async def _keep_catalogue(self, ranker: CatalogueRanker, every_seconds: float) -> None:
        """Bring the catalogue up to date for ever; the old one serves while that fails."""
        while True:
            try:
                report = await asyncio.get_running_loop().run_in_executor(None, ranker.refresh)
                self._items, self._refreshed_at = report.items, time.monotonic()
            except PrefsError as error:
                self._failures += 1
                logger.warning("the catalogue was not refreshed: %s", error)
            await asyncio.sleep(every_seconds)


def _read_options(asked: Arguments) -> ReadOptions:
    return {
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
