"""SQLite that never waits for the disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event


def never_sync_sqlite() -> Callable[[], None]:
    """Let SQLite behind Dagster and Iceberg write without syncing, in this process and its forks.

    Returns what undoes it.
    """

    def hurry(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("pragma synchronous = off")

    event.listen(Engine, "connect", hurry)
    return lambda: event.remove(Engine, "connect", hurry)
