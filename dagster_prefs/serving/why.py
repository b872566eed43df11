"""The explanation of a served value: its tiles and latest events, and the value recomputed from them.

The recomputation runs the rolling view's own query from the registry over the current tiles of that one key
in the engine, so it reveals a view, publisher or table that lags behind or was written by another process.
Whether the query itself is right is checked by the tests of the models. Personal values are compared as they are, and
masked in what is returned.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.declarations.lineage import Lineage
from dagster_prefs.declarations.masking import masked_row
from dagster_prefs.declarations.registry import Entity, Registry, TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import Id, id_parts, read_id
from dagster_prefs.serving.preferences import checked_now
from dagster_prefs.serving.profiles import ProfileClient

if TYPE_CHECKING:
    from sqlglot import exp

# The number of events per topic.
LATEST_EVENTS = 10
# The limit for a tile without a window; all tiles of a window are shown.
MAX_TILES = 1_000

Rows = tuple[dict[str, Any], ...]

_DAYS = re.compile(r"([0-9]+) days?", re.IGNORECASE)


class WhyError(PrefsError):
    """The attribute is unknown, or its data cannot be read."""


@dataclass(frozen=True)
class ViewExplanation:
    """The rows of one id in a preference view, as read over the Postgres wire and as recomputed from the events.

    `served` and `recomputed` hold every column that is read of the rows, in order. `recomputed` and `equal` are None
    where the view cannot be recomputed for one id, and `reason` says why. `events` hold the latest events by relation,
    newest first.
    """

    entity: str
    id: Id
    relation: str
    column: str
    served: Rows
    recomputed: Rows | None
    equal: bool | None
    reason: str
    events: Mapping[str, Rows]

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as plain values, for JSON."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Explanation:
    """One attribute of one id, as served and as recomputed from its tiles.

    `online` is the served value, None if there is no item or the value is NULL; `online_error` says why it
    could not be read. `in_view` says whether the rolling view has a row for the id: if not, no item should
    exist. `window_days` and `window_start` are None for an attribute without a window. `tiles` and `events`
    hold the source rows by relation, newest first.
    """

    entity: str
    id: Id
    domain: str
    attribute: str
    window_start: date | None
    window_days: int | None
    online: Any
    online_state: str
    online_error: str | None
    recomputed: Any
    in_view: bool
    equal: bool
    tiles: Mapping[str, Rows]
    events: Mapping[str, Rows]

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as plain values, for JSON."""
        return dict(self.__dict__)


def explain_attribute(
    engine: EngineConfiguration,
    profiles: ProfileClient,
    id_: Id,
    attribute: str,
    *,
    now: datetime | None = None,
    expiry_spread_seconds: int = 0,
) -> Explanation:
    """Compare a served attribute with its value recomputed from the engine's tiles at `now` (UTC).

    `attribute` is a name of the contract (`lessons_7d`); one that several domains have needs its domain
    (`progress.last_event_at`). `expiry_spread_seconds` is the platform's setting.

    Raises WhyError for an unknown or ambiguous attribute, a registry without the view's query and relations
    that are missing; the errors of ProfileClient for an invalid id or a table that cannot be read.
    """
    moment = checked_now(now)
    domain, name = _resolve(profiles, attribute)
    query = _query_of(profiles.registry, domain)
    profile = profiles.get(id_, [domain.name], consistent=True)
    read = profile.reads[domain.name]
    online = getattr(profile.domain(domain.name), name) if read.state == "found" else None
    days = query.window_days(name)
    with engine.connect() as connection:
        look = _Look(connection, engine, query.parts(profile.id))
        try:
            clock = moment - timedelta(seconds=look.spread(expiry_spread_seconds))
            start = None if days is None else clock.astimezone(UTC).date() - timedelta(days=days)
            found = look.rows(query, [name], clock)
            tiles = {relation: look.tiles(query, relation, start) for relation in query.tiles}
            events = {topic.relation: look.events(topic) for topic in query.topics}
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise WhyError(f"the tiles cannot be read ({reason}): run `dbt build`") from None
    in_view = bool(found)
    recomputed = found[0][0] if found else None
    registry = profiles.registry
    shown = (
        masked_row(registry, domain.relation, {name: online}),
        masked_row(registry, domain.relation, {name: recomputed}),
    )
    return Explanation(
        entity=profile.entity,
        id=profile.id,
        domain=domain.name,
        attribute=name,
        window_start=start,
        window_days=days,
        online=shown[0][name],
        online_state=read.state,
        online_error=None if read.error is None else str(read.error),
        recomputed=shown[1][name],
        in_view=in_view,
        # An item exists if and only if the view has a row, whatever the attribute's own window.
        equal=online == recomputed and (read.state == "found") == in_view,
        tiles=_masked(registry, tiles),
        events=_masked(registry, events),
    )


def window_days(registry: Registry, domain: Domain, attribute: str) -> int | None:
    """Return the days of an attribute's window, the longest one of several, None if it has none.

    Raises WhyError for a registry without the view's query.
    """
    return _query_of(registry, domain).window_days(attribute)


def explain_view(
    engine: EngineConfiguration,
    registry: Registry,
    lineage: Lineage,
    id_: Id,
    name: str,
    *,
    now: datetime | None = None,
) -> ViewExplanation:
    """Compare the rows of one id in a preference view with the rows recomputed from its events at `now` (UTC).

    `name` is the view's name and a column of it, joined by a dot. Raises WhyError for another name, and for relations
    that are missing; BadId for an invalid id.
    """
    relation, _, column = name.rpartition(".")
    view = registry.preferences.get(relation)
    if view is None or column not in view.reads:
        known = ", ".join(
            f"{one.relation}.{read}" for one in registry.preferences.values() for read in one.reads
        )
        raise WhyError(f"unknown column {name!r}: the preference views have {known}")
    entity = registry.entity(view.entity)
    id_ = read_id(entity.keys, id_)
    text = registry.queries.get(relation) or lineage.queries.get(relation)
    if text is None:
        raise WhyError(f"neither registry nor lineage has the query of {relation}: run `prefs generate`")
    query = _Query(registry, entity, text, lineage)
    columns = [one for one in view.reads if one not in entity.key_names]
    reason = query.beyond_one_id()
    with engine.connect() as connection:
        look = _Look(connection, engine, query.parts(id_))
        try:
            # In a transaction of PostgreSQL a view that reads the clock reads the time that is given here.
            with connection.transaction() if engine.kind == "local" else nullcontext():
                moment = checked_now(now) if now or engine.kind != "local" else look.now()
                served = look.served(relation, columns, entity.key_names)
                recomputed = None if reason else look.rows(query, columns, moment)
                events = {topic.relation: look.events(topic) for topic in query.topics}
        except psycopg.Error as error:
            told = " ".join(str(error).split())
            raise WhyError(f"{relation} cannot be read ({told}): run `prefs apply`") from None
    return ViewExplanation(
        entity=entity.name,
        id=id_,
        relation=relation,
        column=column,
        served=_masked_rows(registry, relation, _as_rows(columns, served)),
        recomputed=None
        if recomputed is None
        else _masked_rows(registry, relation, _as_rows(columns, recomputed)),
        equal=None if recomputed is None else _counted(served) == _counted(recomputed),
        reason=reason,
        events=_masked(registry, events),
    )


def _masked(registry: Registry, found: Mapping[str, Rows]) -> dict[str, Rows]:
    return {relation: _masked_rows(registry, relation, rows) for relation, rows in found.items()}


def _masked_rows(registry: Registry, relation: str, rows: Rows) -> Rows:
    return tuple(masked_row(registry, relation, row) for row in rows)


def _as_rows(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Rows:
    return tuple(dict(zip(columns, row, strict=True)) for row in sorted(rows, key=repr))


def _counted(rows: Sequence[tuple[Any, ...]]) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(tuple(one) if isinstance(one, list) else one for one in row) for row in rows)


def _query_of(registry: Registry, domain: Domain) -> _Query:
    text = registry.queries.get(domain.relation)
    if text is None:
        raise WhyError(f"the registry has no query for {domain.relation}: run `prefs generate`")
    return _Query(registry, registry.entity(domain.entity), text)


def _resolve(profiles: ProfileClient, attribute: str) -> tuple[Domain, str]:
    domains = {domain.name: domain for domain in profiles.domains}
    given, _, name = attribute.rpartition(".")
    found = [
        domain for domain in domains.values() if name in domain.attributes and given in ("", domain.name)
    ]
    if len(found) == 1:
        return found[0], name
    if found:
        choices = ", ".join(f"{domain.name}.{name}" for domain in found)
        raise WhyError(f"{name} is an attribute of several domains: name one of {choices}")
    known = ", ".join(f"{domain.name}.{name}" for domain in domains.values() for name in domain.attributes)
    raise WhyError(f"unknown attribute {attribute!r}: the contract has {known}")


class _Query:
    """The query of a view, and the relations that it reads."""

    def __init__(self, registry: Registry, entity: Entity, text: str, lineage: Lineage | None = None) -> None:
        import sqlglot
        from sqlglot import exp

        self.lineage = lineage
        self.registry = registry
        self.keys = entity.keys
        self.tree: exp.Expr = sqlglot.parse_one(text, dialect="risingwave")
        read = {table.name for table in self.tree.find_all(exp.Table)}
        self.tiles = [name for name in registry.tiles if name in read]
        # The topics that a tile counts are not declared: all topics of the first key are shown, and those that the view
        # reads.
        family = {one.name for one in registry.family(entity.name)}
        self.topics = [
            topic
            for topic in registry.topics.values()
            if topic.time is not None and (topic.entity in family or topic.relation in read)
            if entity.key.name in topic.by_name
        ]

    def beyond_one_id(self) -> str:
        """Return why the rows of one id cannot be recomputed from its own rows; empty if they can."""
        from sqlglot import exp

        ctes = {entry.alias for entry in self.tree.find_all(exp.CTE)}
        others = sorted(
            name
            for name in {table.name for table in self.tree.find_all(exp.Table)} - ctes
            if not self.keys_of(name)
        )
        return f"it reads {', '.join(others)}, whose rows are not those of one id" if others else ""

    def parts(self, id_: Id) -> dict[str, int | str]:
        """Map each key column to its value in an id."""
        return {key.name: value for key, value in zip(self.keys, id_parts(id_), strict=True)}

    def keys_of(self, relation: str) -> list[str]:
        """Return the entity's key columns that a relation of the query has."""
        tile = self.registry.tiles.get(relation)
        columns = [*tile.key] if tile else []
        for topic in self.topics:
            columns += topic.by_name if topic.relation == relation else ()
        if not columns and self.lineage is not None:
            columns += self.lineage.columns(relation)
        return [key.name for key in self.keys if key.name in columns]

    def window_days(self, attribute: str) -> int | None:
        """Return the days of the attribute's window, the longest one of several, None if it has none."""
        from sqlglot import exp
        from sqlglot.lineage import lineage

        schema = {name: dict.fromkeys(tile.columns, "text") for name, tile in self.registry.tiles.items()}
        schema |= {
            topic.relation: dict.fromkeys(topic.by_name, "text") for topic in self.registry.topics.values()
        }
        days = [
            # A tile stays in the window until the end of the day after its last one.
            int(found[1]) - 1
            for node in lineage(attribute, self.tree.copy(), schema=schema, dialect="risingwave").walk()
            if isinstance(node.source, exp.Select) and (where := node.source.args.get("where")) is not None
            for interval in where.find_all(exp.Interval)
            if (found := _DAYS.search(interval.sql("postgres")))
        ]
        return max(days, default=None)

    def of(
        self,
        parts: Mapping[str, int | str],
        attributes: Sequence[str],
        schema: str,
        clock: datetime,
        dialect: str,
    ) -> str:
        """Return the query of some attributes for one id's rows at a given time."""
        from sqlglot import exp

        wanted = {
            name: exp.Literal.string(value) if isinstance(value, str) else exp.convert(value)
            for name, value in parts.items()
        }
        names = {entry.alias for entry in self.tree.find_all(exp.CTE)}

        def those(query: exp.Select, columns: Sequence[str]) -> exp.Select:
            conditions = [exp.column(name, quoted=True).eq(wanted[name].copy()) for name in columns]
            return query.where(*conditions)

        def ask(node: exp.Expr) -> exp.Expr:
            if isinstance(node, exp.CurrentTimestamp):
                return exp.cast(exp.Literal.string(clock.isoformat()), "timestamptz")
            if isinstance(node, exp.Table) and node.name not in names:
                place = exp.table_(node.name, db=schema, quoted=True)
                columns = self.keys_of(node.name)
                if not columns:
                    return exp.alias_(place, node.alias_or_name, table=True)
                return those(exp.select("*").from_(place), columns).subquery(node.alias_or_name)
            return node

        asked = self.tree.copy().transform(ask)
        row = exp.select(*(exp.column(one, quoted=True) for one in attributes)).from_(
            exp.Subquery(this=asked, alias=exp.to_identifier("v"))
        )
        return those(row, list(wanted)).sql(dialect)


class _Look:
    """The rows of one id in the engine, read over one connection. Raises psycopg's errors."""

    def __init__(
        self, connection: psycopg.Connection[Any], engine: EngineConfiguration, parts: Mapping[str, int | str]
    ) -> None:
        self.connection = connection
        self.engine = engine
        self.parts = parts

    def spread(self, seconds: int) -> int:
        """Return the seconds after midnight at which the id's day begins, like the macro `expiry_spread`."""
        if not seconds:
            return 0
        first = next(iter(self.parts.values()))
        if isinstance(first, int):
            return abs(first) % seconds
        # Macro `row_hash`.
        digits = hashlib.md5(first.encode(), usedforsecurity=False).hexdigest()[:15]
        return int(digits, 16) % seconds

    def rows(self, query: _Query, attributes: Sequence[str], clock: datetime) -> list[tuple[Any, ...]]:
        """Return the attributes of the id's rows in the view, computed for that time; empty if it has none."""
        dialect = "postgres" if self.engine.kind == "local" else "risingwave"
        text = query.of(self.parts, attributes, self.engine.schema, clock, dialect)
        return self.connection.execute(text.encode(), prepare=False).fetchall()

    def now(self) -> datetime:
        """Return the time of the transaction."""
        row = self.connection.execute("select now()", prepare=False).fetchone()
        moment: datetime = row[0] if row else datetime.now(UTC)
        return moment

    def served(self, relation: str, columns: Sequence[str], keys: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return these columns of the id's rows in a view, as they are."""
        statement = sql.SQL("select {} from {} where {}").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.Identifier(self.engine.schema, relation),
            sql.SQL(" and ").join(self._where(keys)),
        )
        return self.connection.execute(statement, prepare=False).fetchall()

    def tiles(self, query: _Query, relation: str, start: date | None) -> Rows:
        """Return the rows of a tile from a day on, newest first."""
        tile = query.registry.tiles[relation]
        if not (keys := query.keys_of(relation)):
            return ()
        columns = [name for name in tile.columns if name not in keys]
        where = self._where(keys)
        if start is not None:
            where.append(sql.SQL("{} >= {}").format(sql.Identifier(tile.day), sql.Literal(start)))
        return self._rows(relation, columns, where, tile.day, MAX_TILES)

    def _where(self, keys: Sequence[str]) -> list[sql.Composed]:
        return [
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(self.parts[name])) for name in keys
        ]

    def events(self, topic: TopicDeclaration) -> Rows:
        """Return the latest events of a topic."""
        time = topic.time or topic.identity
        where = self._where([name for name in self.parts if name in topic.by_name])
        return self._rows(topic.relation, list(topic.by_name), where, time, LATEST_EVENTS)

    def _rows(
        self, relation: str, columns: Sequence[str], where: list[sql.Composed], order: str, limit: int
    ) -> Rows:
        statement = sql.SQL("select {} from {} where {} order by {} desc limit {}").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.Identifier(self.engine.schema, relation),
            sql.SQL(" and ").join(where),
            sql.Identifier(order),
            sql.Literal(limit),
        )
        rows = self.connection.execute(statement, prepare=False).fetchall()
        return tuple(dict(zip(columns, row, strict=True)) for row in rows)
