"""Rebuilding views of the embedded engine from all messages, also from those that left the raw tables by retention.

A raw table without its old rows would make the views forget them. So retention notes in `raw_retained` before when the
messages of a parsed relation may be missing (macros/engine/kept.sql), and a rebuild keeps the rows of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Registry, TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.lock import lock_deployment
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.live.steps import mark_pending
from dagster_prefs.live.views import read_views

ALL = "all"
RETAINED = "raw_retained"


@dataclass(frozen=True)
class RebuildPlan:
    """What a rebuild is about: the topics whose messages are read, and the views, each after what it reads."""

    topics: tuple[TopicDeclaration, ...]
    views: tuple[str, ...]


def plan_rebuild(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, registry: Registry, target: str
) -> RebuildPlan:
    """Return what is to be rebuilt for a view, or for all of them. Raises PrefsError for an unknown view."""
    live = read_views(connection, engine, registry)

    def behind(name: str) -> Iterator[str]:
        if name in live.views:
            yield name
            for one in live.views[name].feeds:
                yield from behind(one)

    if target != ALL and target not in live.views:
        known = ", ".join(live.views)
        raise PrefsError(
            f"{excerpt(target)} is no view of this deployment: name one of {known}, or `{ALL}`"
            if live.views
            else "nothing is deployed yet: run `prefs apply`"
        )
    wanted = set(live.views) if target == ALL else set(behind(target))
    topics = tuple(topic for parsed, topic in live.parsed.items() if parsed in wanted)
    return RebuildPlan(topics, tuple(name for name in live.views if name in wanted))


def mark_rebuilt(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, plan: RebuildPlan
) -> list[TopicDeclaration]:
    """Have the follower rebuild the views of a plan.

    Returns the topics of which messages are missing; their parsed relations keep the rows of these. Raises
    psycopg.Error.
    """
    with connection.transaction():
        # A view that is being rebuilt when it is marked would lose the mark.
        lock_deployment(connection, engine)
        missing = [topic for topic in plan.topics if _lacks_messages(connection, engine, topic)]
        connection.execute(
            sql.SQL("delete from {} where relation = any(%s)").format(
                sql.Identifier(engine.schema, RETAINED)
            ),
            [[topic.parsed for topic in plan.topics if topic not in missing]],
        )
        mark_pending(connection, engine, plan.views)
    return missing


def _lacks_messages(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, topic: TopicDeclaration
) -> bool:
    """Return whether the parsed relation keeps rows whose messages have left the raw table by retention."""
    ((lacks,),) = connection.execute(
        sql.SQL(
            "select exists (select from {} as t join {} as parsed on parsed.arrived_at < t.before"
            " left join {} as raw using (source, source_partition, source_offset)"
            " where t.relation = %s and raw.source is null)"
        ).format(
            *(sql.Identifier(engine.schema, name) for name in (RETAINED, topic.parsed, topic.raw)),
        ),
        [topic.parsed],
    ).fetchall()
    return bool(lacks)
