"""The lock of a deployment on the embedded engine: while one holds it, neither views nor their marks change otherwise.

dbt's runs take it too (`engine_lock` in macros/engine/lifecycle.sql).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from dagster_prefs.engine.connection import EngineConfiguration


def lock_deployment(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    """Wait for the lock, and hold it until the transaction ends. Raises psycopg.Error."""
    connection.execute(
        "select pg_advisory_xact_lock(hashtext('dagster-prefs'), hashtext(%s))", [engine.schema]
    )


@contextmanager
def deployment_locked(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> Iterator[None]:
    """Wait for the lock, and hold it over transactions until the block or the session ends. Raises psycopg.Error."""
    connection.execute("select pg_advisory_lock(hashtext('dagster-prefs'), hashtext(%s))", [engine.schema])
    try:
        yield
    finally:
        connection.execute(
            "select pg_advisory_unlock(hashtext('dagster-prefs'), hashtext(%s))", [engine.schema]
        )
