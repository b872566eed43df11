"""The expiry spreads that were in force over time, as the deployments of each domain's view recorded them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from psycopg import sql

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.engine.connection import EngineConfiguration

# The kind of the records in `deployments`; each has its seconds as checksum (macro `record_spread`).
SPREAD_KIND = "spread"

Spreads = Mapping[str, tuple[tuple[datetime, int], ...]]
"""Domain → each expiry spread in seconds, with the instant (UTC) from which it was in force, ascending."""


def spreads_in_force(engine: EngineConfiguration, domains: Iterable[Domain], *, default: int) -> Spreads:
    """Return the spreads of these domains over time.

    A domain of which nothing is recorded, because it was deployed by an earlier version, has `default` throughout.
    Raises EngineUnavailable.
    """
    with engine.connect() as connection:
        there = connection.execute(
            "select 1 from information_schema.tables where table_schema = %s and table_name = 'deployments'",
            [engine.schema],
        ).fetchone()
        rows = (
            connection.execute(
                sql.SQL(
                    "select relation, checksum, deployed_at from {} where kind = %s order by deployed_at"
                ).format(sql.Identifier(engine.schema, "deployments")),
                [SPREAD_KIND],
            ).fetchall()
            if there
            else []
        )
    since = datetime(1970, 1, 1, tzinfo=UTC)
    found: dict[str, tuple[tuple[datetime, int], ...]] = {}
    for domain in domains:
        records = [
            (at.astimezone(UTC), int(seconds))
            for relation, seconds, at in rows
            if relation.rpartition(":")[2] == domain.relation
        ]
        found[domain.name] = tuple(records) or ((since, default),)
    return found
