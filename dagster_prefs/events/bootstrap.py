"""A topic's history, read part by part: each part is recorded when it is stored, so a stopped bootstrap goes on.

Only the progress is here. What makes a repetition harmless is each message's place in the raw table, which does not
depend on how often, in which order or by which process a part is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.events.raw import ROWS_PER_INSERT, translated

RELATION = "bootstrap_parts"


@dataclass(frozen=True)
class History:
    """What a bootstrap reads for a topic.

    `name` is what was given, e.g. `iceberg:lake.views`; `options` are those that decide its messages; `version` is the
    snapshot that is read, empty where every part has a version of its own.
    """

    topic: str
    name: str
    options: str = ""
    version: str = ""

    @property
    def shown(self) -> str:
        """The history in one line."""
        return " ".join(filter(None, (self.name, self.options)))


@dataclass(frozen=True)
class Part:
    """A part of a history. `read` stores its messages and returns their number; `rows` are those expected, if known.

    `is_fixed` says that the part never changes, so that it is not read again once it is complete.
    """

    name: str
    read: Callable[[], int]
    rows: int | None = None
    is_fixed: bool = True


@dataclass(frozen=True)
class BootstrapState:
    """How far a bootstrap is; times are UTC.

    `messages` were read in the `parts_done` of `parts`, in `seconds` of work; `rows` are those of all parts, None if
    unknown. `progressed_at` is when a part was last begun or completed, None before the first.
    """

    history: History
    parts: int
    parts_done: int
    messages: int
    rows: int | None
    seconds: float
    progressed_at: datetime | None

    @property
    def is_complete(self) -> bool:
        """Whether every part is stored."""
        return self.parts_done == self.parts

    @property
    def rate(self) -> float | None:
        """The messages per second of work, None before the first complete part."""
        return self.messages / self.seconds if self.messages and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """The estimated seconds of work left: by rows where their number is known, else by parts."""
        if self.is_complete:
            return 0.0
        if self.rows is not None and self.rate is not None:
            return max(0, self.rows - self.messages) / self.rate
        if self.parts_done and self.seconds > 0:
            return self.seconds / self.parts_done * (self.parts - self.parts_done)
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return the state as plain values, for JSON."""
        return {
            **vars(self.history),
            "state": "complete" if self.is_complete else "incomplete",
            "parts": self.parts,
            "parts_done": self.parts_done,
            "messages": self.messages,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "rate": None if self.rate is None else round(self.rate, 1),
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left, 1),
            "progressed_at": None if self.progressed_at is None else self.progressed_at.isoformat(),
        }


def parse_until(text: str) -> datetime | dict[int, int]:
    """Read where a history ends: a time (UTC without an offset), or the Kafka offset of each partition.

    Raises PrefsError for other text.
    """
    if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        pairs = [pair.split(":") for pair in text.split(",")]
        offsets = {int(partition): int(offset) for partition, offset in pairs}
        if len(offsets) < len(pairs):
            raise PrefsError(f"--until {text} names a partition twice: leave one out")
        return offsets
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise PrefsError(
            f"--until {excerpt(text)!r} is neither a time nor offsets: write e.g. 2026-01-31T00:00:00Z, or "
            "0:1200,1:1187 for offset 1200 of partition 0 and 1187 of partition 1"
        ) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def run_parts(
    engine: EngineConfiguration,
    history: History,
    parts: Sequence[Part],
    progress: Callable[[BootstrapState], None] = lambda state: None,
) -> BootstrapState:
    """Read the parts that are not stored yet, one after the other, and return the state.

    `progress` receives the state after each part. An incomplete bootstrap of the same name with other options or of
    another version is superseded: its record is deleted, its messages stay. Raises RawStoreError, and what a part's
    `read` raises; the parts before are stored. A bootstrap whose first part is refused leaves no record.
    """
    with engine.connect() as connection, translated(engine, RELATION):
        _supersede(connection, engine, history)
        done = _remember(connection, engine, history, parts)
        for place, part in enumerate(parts):
            if part.name in done and part.is_fixed:
                continue
            started = datetime.now(UTC)
            _write(connection, engine, [_row(history, place, part, started=started)])
            try:
                messages = part.read()
            except PrefsError:
                if not _state_of(connection, engine, history).parts_done:
                    _forget(connection, engine, history)
                raise
            row = _row(history, place, part, messages, started, datetime.now(UTC))
            _write(connection, engine, [row])
            progress(_state_of(connection, engine, history))
        return _state_of(connection, engine, history)


def bootstrap_states(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, topic: str | None = None
) -> list[BootstrapState]:
    """Return the state of every bootstrap, or of those of a topic; empty before the first deployment.

    Raises psycopg.Error.
    """
    try:
        rows = connection.execute(
            sql.SQL(
                "select topic, history, options, version, count(*), count(completed_at),"
                " coalesce(sum(messages) filter (where completed_at is not null), 0)::bigint,"
                " case when count(row_count) = count(*) then sum(row_count)::bigint end,"
                " coalesce(sum(extract(epoch from completed_at - started_at)), 0)::float8,"
                " greatest(max(started_at), max(completed_at))"
                " from {} where {} group by topic, history, options, version order by topic, history, options, version"
            ).format(
                sql.Identifier(engine.schema, RELATION),
                sql.SQL("true" if topic is None else "topic = {}").format(sql.Literal(topic)),
            )
        ).fetchall()
    except psycopg.Error as error:
        if missing_relation(error):
            return []
        raise
    return [BootstrapState(History(*row[:4]), *row[4:]) for row in rows]


def resumed_version(engine: EngineConfiguration, history: History) -> str | None:
    """Return the version of an incomplete bootstrap of the same name and options, None if there is none."""
    with engine.connect() as connection:
        for state in bootstrap_states(connection, engine, history.topic):
            known = state.history
            if not state.is_complete and (known.name, known.options) == (history.name, history.options):
                return known.version
    return None


_COLUMNS = (
    "topic", "history", "options", "version", "part", "place", "row_count", "messages", "started_at", "completed_at",
)  # fmt: skip


def _row(
    history: History,
    place: int,
    part: Part,
    messages: int | None = None,
    started: datetime | None = None,
    completed: datetime | None = None,
) -> tuple[Any, ...]:
    of = (history.topic, history.name, history.options, history.version)
    return (*of, part.name, place, part.rows, messages, started, completed)


def _write(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, rows: Sequence[tuple[Any, ...]]
) -> None:
    """Store rows, each in the place of the one with its key."""
    # On RisingWave an insert into a keyed table replaces the row of its key.
    ending = (
        sql.SQL(
            " on conflict (topic, history, options, version, part) do update set"
            " messages = excluded.messages, started_at = excluded.started_at, completed_at = excluded.completed_at"
        )
        if engine.kind == "local"
        else sql.SQL("")
    )
    one = sql.SQL("({})").format(sql.SQL(", ").join([sql.Placeholder()] * len(_COLUMNS)))
    for start in range(0, len(rows), ROWS_PER_INSERT):
        batch = rows[start : start + ROWS_PER_INSERT]
        connection.execute(
            sql.SQL("insert into {} ({}) values {}").format(
                sql.Identifier(engine.schema, RELATION),
                sql.SQL(", ").join(map(sql.Identifier, _COLUMNS)),
                sql.SQL(", ").join([one] * len(batch)),
            )
            + ending,
            [value for row in batch for value in row],
        )
    _make_visible(connection, engine)


def _make_visible(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    if engine.kind == "risingwave":
        connection.execute("flush")


def _remember(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, history: History, parts: Iterable[Part]
) -> set[str]:
    """Record the parts that are not known yet, and return the names of the complete ones."""
    known = dict(
        connection.execute(
            sql.SQL(
                "select part, completed_at from {} where topic = %s and history = %s and options = %s and version = %s"
            ).format(sql.Identifier(engine.schema, RELATION)),
            [history.topic, history.name, history.options, history.version],
        ).fetchall()
    )
    parts = list(parts)
    new = [_row(history, place, part) for place, part in enumerate(parts) if part.name not in known]
    _write(connection, engine, new)
    # A file that was replaced or deleted before it was read would be missing for ever.
    gone = [name for name, at in known.items() if at is None and name not in {part.name for part in parts}]
    for name in gone:
        connection.execute(
            sql.SQL(
                "delete from {} where topic = %s and history = %s and options = %s and version = %s and part = %s"
            ).format(sql.Identifier(engine.schema, RELATION)),
            [history.topic, history.name, history.options, history.version, name],
        )
    if gone:
        _make_visible(connection, engine)
    return {part for part, completed_at in known.items() if completed_at is not None}


def _supersede(connection: psycopg.Connection[Any], engine: EngineConfiguration, history: History) -> None:
    for state in bootstrap_states(connection, engine, history.topic):
        known = state.history
        if known != history and known.name == history.name and not state.is_complete:
            _forget(connection, engine, known)


def _forget(connection: psycopg.Connection[Any], engine: EngineConfiguration, history: History) -> None:
    """Delete the record of a bootstrap; its messages stay."""
    connection.execute(
        sql.SQL("delete from {} where topic = %s and history = %s and options = %s and version = %s").format(
            sql.Identifier(engine.schema, RELATION)
        ),
        [history.topic, history.name, history.options, history.version],
    )
    _make_visible(connection, engine)


def _state_of(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, history: History
) -> BootstrapState:
    states = {state.history: state for state in bootstrap_states(connection, engine, history.topic)}
    return states.get(history) or BootstrapState(history, 0, 0, 0, None, 0.0, None)
