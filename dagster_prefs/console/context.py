"""The state behind the pages: one `Console` for the process, one `Visit` for each opened page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import psycopg
from psycopg import sql

from dagster_prefs.access import Grant, Right
from dagster_prefs.console.events import Sender, Sent, compose_event
from dagster_prefs.console.history import Watcher
from dagster_prefs.declarations.registry import Entity, Registry, TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.levels import unreadable
from dagster_prefs.ids import Id
from dagster_prefs.platform import Platform
from dagster_prefs.serving.pool import ConnectionPool
from dagster_prefs.settings import Settings

if TYPE_CHECKING:
    from dagster_prefs.freshness.status import Status
    from dagster_prefs.serving import ProfileClient, ShopClient
    from dagster_prefs.serving.pool import Connection
    from dagster_prefs.values.statistics import Statistics

P = ParamSpec("P")
T = TypeVar("T")

# Concurrent reads, of all pages together.
THREADS = 4
# Longer than a service would wait, because the local AWS server is slow.
READ_SECONDS = 10.0
# Time limit of a page's read of the engine.
STATEMENT_SECONDS = 5.0


class ReadOnly(PrefsError):
    """The console may not send events; the message says why, and which setting decides."""


class Console:
    """The platform, its clients and its readings, for all pages. Opens each client at its first use.

    `read_status` takes all freshness readings, `is_demo` says whether the engine holds a demo's events, `statistics`
    are the newest of every attribute (relation → attribute → statistics); they block, so call them on a thread (`run`).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        read_status: Callable[[], Status],
        is_demo: Callable[[], bool] = lambda: False,
        statistics: Callable[[], Mapping[str, Mapping[str, Statistics]]] = dict,
    ) -> None:
        self.settings = settings
        self.platform = Platform(settings)
        self.read_status = read_status
        self.is_demo = is_demo
        self.statistics = statistics
        self._demo = False
        self.watcher = Watcher(self)
        self._clients = ExitStack()
        self._lock = Lock()
        self._profiles: dict[str, ProfileClient] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="console")

    @property
    def registry(self) -> Registry:
        """What the project declares."""
        return self.settings.registry()

    @property
    def engine(self) -> EngineConfiguration:
        """How the engine is reached."""
        return self.platform.engine

    def profiles(self, entity: str) -> ProfileClient:
        """Return the client that reads an entity's items. Raises ProfileError if the entity has none."""
        from dagster_prefs.serving import ClientOptions, ProfileClient

        with self._lock:
            if entity not in self._profiles:
                self._profiles[entity] = self._clients.enter_context(
                    ProfileClient(
                        self.registry,
                        entity=entity,
                        endpoint_url=self.settings.aws_endpoint,
                        region=self.settings.aws_region,
                        table_prefix=self.settings.table_prefix,
                        options=ClientOptions(budget_seconds=READ_SECONDS, read_timeout_seconds=READ_SECONDS),
                    )
                )
            return self._profiles[entity]

    @cached_property
    def shop(self) -> ShopClient:
        """The client that ranks."""
        from dagster_prefs.serving import ShopClient

        return self._clients.enter_context(ShopClient(self.engine, pool_size=THREADS))

    @cached_property
    def _pool(self) -> ConnectionPool:
        pool = ConnectionPool(self.engine, THREADS, STATEMENT_SECONDS)
        self._clients.callback(pool.close)
        return pool

    def query(self, what: str, read: Callable[[Connection], T]) -> T:
        """Call `read` with a connection of the engine; errors name `what` is read.

        Raises Unmeasurable with the remedy, EngineUnavailable, EngineBusy.
        """
        try:
            return self._pool.run(read)
        except psycopg.Error as error:
            raise unreadable(what, error) from error

    def relation(self, name: str) -> sql.Identifier:
        """Return the name of a relation in a statement."""
        return sql.Identifier(self.engine.schema, name)

    def check_sending(self) -> None:
        """Raise ReadOnly unless this console may send events."""
        settings = self.settings
        if settings.console_send == "on":
            return
        if why := settings.production:
            raise ReadOnly(f"the console sends no events in production, and this is production because {why}")
        if settings.console_send == "off":
            raise ReadOnly("the console sends no events because PREFS_CONSOLE_SEND is off: set it to on")
        # A demo's events stay in the engine, so the answer is asked for only until it is yes.
        self._demo = self._demo or (settings.engine == "local" and self.is_demo())
        if not self._demo:
            raise ReadOnly(
                "the console sends no events because the engine holds no demo events: set PREFS_CONSOLE_SEND to on, "
                "or run `prefs demo`"
            )

    @cached_property
    def _sender(self) -> Sender:
        sender = Sender(self.platform)
        self._clients.callback(sender.close)
        return sender

    def send(
        self, topic: TopicDeclaration, entity: Entity, id_: Id, given: Mapping[str, Any], now: datetime
    ) -> Sent:
        """Send an event of the time `now` (UTC) about an id, with these values of its other fields.

        Raises ReadOnly, EventError for values that the typed layer would reject, and like `Sender.send`.
        """
        self.check_sending()
        return self._sender.send(topic, compose_event(self.registry, topic, entity, id_, given, now))

    async def run(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function on a thread, so that no other page waits for it."""
        call = partial(read, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        """Stop the readings, and close the clients."""
        self.watcher.close()
        self._threads.shutdown(cancel_futures=True)
        self._clients.close()


@dataclass(frozen=True)
class Visit:
    """One opened page: the console, the visitor's rights, and the parameters of its address."""

    console: Console
    grant: Grant
    query: Mapping[str, str] = field(default_factory=dict)

    async def sending_refusal(self) -> str | None:
        """Return why this visitor may send no events, None if the visitor may."""
        try:
            self.grant.require("send")
            await self.console.run(self.console.check_sending)
        except PrefsError as error:
            return str(error)
        return None

    async def send(
        self, topic: TopicDeclaration, entity: Entity, id_: Id, given: Mapping[str, Any], now: datetime
    ) -> Sent:
        """Send an event like `Console.send`, if the visitor may. Raises AccessError too."""
        self.grant.require("send")
        return await self.console.run(self.console.send, topic, entity, id_, given, now)


@dataclass(frozen=True)
class Page:
    """One page of the console: its path, the right that it needs, and the function that builds it.

    `build` is called in the page's frame for each visit; it may be a coroutine function. A project for which `exists`
    is false has no such page.
    """

    path: str
    title: str
    right: Right
    build: Callable[[Visit], Any]
    exists: Callable[[Registry], bool] = lambda registry: True
