"""A small pool of engine connections that survives restarts of the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.engine.durations import timed_out, with_unit
from dagster_prefs.errors import PrefsError

T = TypeVar("T")
Connection = psycopg.Connection[tuple[Any, ...]]

# Held during work that uses the interpreter and does not wait: rows into objects, scores, responses into
# JSON. Only one thread runs at a time anyway, and this way the event loop waits for one other thread instead
# of for all.
TURN = threading.Lock()

# An idle connection may have died with the engine, or hold a prepared plan of a relation that was rebuilt.
STALE = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.FeatureNotSupported,
    psycopg.errors.InvalidSqlStatementName,
)


class EngineBusy(PrefsError):
    """No connection became free in time, or a statement took longer than allowed."""


class ConnectionPool:
    """Up to `size` connections, opened on demand and shared by threads.

    `statement_timeout_seconds` bounds each statement and the wait for a free connection. Raises PrefsError
    for a time-out that no engine accepts.
    """

    def __init__(self, engine: EngineConfiguration, size: int, statement_timeout_seconds: float) -> None:
        self.engine = engine
        self.timeout_seconds = statement_timeout_seconds
        self._statement_timeout = with_unit(statement_timeout_seconds, "statement_timeout_seconds")
        self._free = threading.BoundedSemaphore(size)
        self._size = size
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def run(self, read: Callable[[Connection], T]) -> T:
        """Call `read` with a connection; if the connection is stale, call it again with a fresh one.

        Raises EngineBusy when it takes too long, EngineUnavailable when the engine cannot be reached.
        """
        with self._slot():
            connection = self._take()
            reused = connection is not None
            try:
                if connection is not None:
                    try:
                        return self._read(connection, read)
                    except STALE as error:
                        if timed_out(error):
                            raise
                        self._close_idle()
                connection = self._open()
                return self._read(connection, read)
            except psycopg.Error as error:
                if timed_out(error):
                    raise EngineBusy(
                        f"the engine did not answer within {self.timeout_seconds:g} s: raise "
                        "statement_timeout_seconds, or look at the engine's load"
                    ) from None
                if not isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
                    raise
                where = f"{self.engine.host}:{self.engine.port}"
                again = " twice" if reused else ""
                raise EngineUnavailable(
                    f"the engine at {where} closed the connection{again} "
                    f"({' '.join(str(error).split())}): try again"
                ) from None

    def warm(self) -> None:
        """Open one connection ahead of the first read."""
        self.run(lambda connection: connection.execute("select 1").fetchone())

    def close(self) -> None:
        """Close all idle connections; the pool cannot be used afterwards."""
        self._closed = True
        self._close_idle()

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._closed:
            raise PrefsError("this client is closed: create a new one")
        if not self._free.acquire(timeout=self.timeout_seconds):
            raise EngineBusy(
                f"all {self._size} connections were busy for {self.timeout_seconds:g} s: raise pool_size"
            )
        try:
            yield
        finally:
            self._free.release()

    def _take(self) -> Connection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _open(self) -> Connection:
        connection = self.engine.connect()
        connection.execute(
            sql.SQL("set statement_timeout to {}").format(sql.Literal(self._statement_timeout))
        )
        return connection

    def _read(self, connection: Connection, read: Callable[[Connection], T]) -> T:
        try:
            answer = read(connection)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        if self._closed:
            self._close_idle()
        return answer

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
