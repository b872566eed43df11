"""Making views of RisingWave again from all messages, also from those that its raw tables have deleted by age.

A raw table that deletes by age tells no view, and takes a deleted message for a new one when it comes again: its views
would count it twice. So messages are never put back. The raw table gets a successor, which is filled from the lake and
then follows the old table over a sink; views are built on the successor while the old ones serve, and all are swapped
at once. A message is in the successor once, whatever of lake, old table and feed brings it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.deploy.plan import model_names
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError, excerpt

ALL = "all"
_VIEWS = ("materialized_view", "view")
_PLACE = ("source", "source_partition", "source_offset")
_COLUMNS = (*_PLACE, "data", "kafka_timestamp", "arrived_at")


@dataclass(frozen=True)
class Successor:
    """The raw table of a topic that is replaced by one with all messages.

    `restore` stores the messages of the lake in the relation that it is given, and returns their number.
    """

    topic: TopicDeclaration
    restore: Callable[[str], int]


@dataclass(frozen=True)
class Rebuild:
    """The models that are made again although nothing differs, and the raw tables among them."""

    models: frozenset[str] = frozenset()
    successors: tuple[Successor, ...] = ()

    def successor(self, raw: str) -> Successor | None:
        """Return how a raw table is filled, None if it is not replaced."""
        return next((one for one in self.successors if one.topic.raw == raw), None)


NO_REBUILD = Rebuild()


def views_behind(manifest: Mapping[str, Any], target: str) -> list[str]:
    """Return the views that are made again for a view, or for all of them, each after what it reads.

    Raises PrefsError for an unknown view.
    """
    nodes = {
        node["name"]: node
        for node in manifest["nodes"].values()
        if node["resource_type"] == "model" and node["config"]["materialized"] in _VIEWS
    }

    def behind(name: str) -> Iterator[str]:
        for parent in model_names(nodes[name]):
            if parent in nodes:
                yield from behind(parent)
        yield name

    if target != ALL and target not in nodes:
        raise PrefsError(
            f"{excerpt(target)} is no view of this project: name one of {', '.join(sorted(nodes))}, or `{ALL}`"
        )
    wanted = sorted(nodes) if target == ALL else [target]
    return list(dict.fromkeys(one for name in wanted for one in behind(name)))


def bridge_of(raw: str) -> str:
    """Return the name, without its suffix, of the sink that carries a raw table's messages into its successor."""
    return f"{raw}_bridge"


def bridge(engine: EngineConfiguration, raw: str, successor: str, name: str) -> sql.Composed:
    """Return the statement of the sink that copies a raw table into its successor, and what arrives from then on."""
    columns = sql.SQL(", ").join(map(sql.Identifier, _COLUMNS))
    return sql.SQL("create sink if not exists {} into {} ({}) as select {} from {}").format(
        sql.Identifier(engine.schema, name),
        sql.Identifier(engine.schema, successor),
        columns,
        columns,
        sql.Identifier(engine.schema, raw),
    )


def count_missing(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, parsed: str, successor: str
) -> int:
    """Count the messages that a parsed relation has read, and a successor lacks. Raises psycopg.Error."""
    ((missing,),) = connection.execute(
        sql.SQL("select count(*) from {} as old left join {} as new on {} where new.source is null").format(
            sql.Identifier(engine.schema, parsed),
            sql.Identifier(engine.schema, successor),
            sql.SQL(" and ").join(
                sql.SQL("new.{0} = old.{0}").format(sql.Identifier(column)) for column in _PLACE
            ),
        )
    ).fetchall()
    return int(missing)
