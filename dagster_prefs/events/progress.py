"""Which topics hold messages that the views have not read yet."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.catalog import NotDeployed
from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.events.formats import TOPICS


def waiting_since(
    connection: psycopg.Connection[Any], engine: EngineConnection
) -> dict[str, tuple[datetime, datetime]]:
    """Topic → (oldest, newest) arrival in UTC of its messages that no refresh has read; read topics are absent.

    Raises NotDeployed when the event tables do not exist yet.
    """
    waiting = {}
    for topic in TOPICS.values():
        raw = topic.raw_table
        query = sql.SQL(
            "select min(arrived_at), max(arrived_at) from {raw} where arrived_at >"
            " (select coalesce(max(arrived_at), '-infinity') from {parsed})"
        ).format(
            raw=sql.Identifier(engine.schema, raw),
            parsed=sql.Identifier(engine.schema, raw.removeprefix("raw_") + "_parsed"),
        )
        try:
            row = connection.execute(query).fetchone()
        except psycopg.errors.UndefinedTable:
            raise NotDeployed(
                f"{engine.schema}.{raw} is not in database {engine.database}: run `dbt run` in dbt_project/"
            ) from None
        if row and row[0] is not None:
            waiting[topic.name] = (row[0], row[1])
    return waiting
