"""Values exactly as served: what a read at any instant would have returned, computed from the events in the lake.

A read at t sees every accepted event that had arrived by t, whatever its event time, in windows that begin at the UTC
date of t minus the key's expiry spread. Latency between an event's arrival and its publication is not modelled.

The rows of a stored tile serve for every day of a key of which nothing arrived after t; the rows of other days are
computed from events. A stored day is only used if its totals equal those of its events: it may have been exported
before an event of that day, or after one that the lake does not hold yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Protocol

import duckdb
import pyarrow as pa

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.engine.spreads import Spreads
from dagster_prefs.iceberg.duck import JOINING, duck_session
from dagster_prefs.training.labels import POINT, TIME, LabelsRefused
from dagster_prefs.training.served_sql import (
    CLOCK,
    KNOWN,
    PAIRS,
    PARTS,
    TILE_DAY,
    ServedFeatures,
    ServedMeaning,
    TileQuery,
)
from dagster_prefs.training.windows import load_tiles, spread_part

ARRIVED, ARRIVAL_KNOWN = "arrived_at", "arrival_known"
REFUSED = "refused"


class EventLoader(Protocol):
    """Creates the table `name` of a topic's accepted events in a session.

    It has at least `columns`, which are fields of the topic, `arrived_at`, and the boolean `arrival_known`: false if
    the event may have arrived earlier than `arrived_at`, or at any time if that is NULL. Events that happened before
    `since` may be missing. Instants have a zone or are in UTC.
    """

    def __call__(
        self,
        session: duckdb.DuckDBPyConnection,
        name: str,
        columns: Sequence[str],
        since: datetime | None,
    ) -> None: ...


@dataclass(frozen=True)
class TopicEvents:
    """The accepted typed events of a topic, as `load` brings them into a session.

    Every event that arrived up to `watermark` is among them; None sets no limit. Events that arrived before
    `complete_from` may be missing; None if none is.
    """

    load: EventLoader
    watermark: datetime | None = None
    complete_from: datetime | None = None


TileRows = Callable[[Sequence[str], date, date], Iterable[pa.RecordBatch]]
"""Yields the rows of a training table from a day to another with these columns, after the entity's keys and the day."""


@dataclass(frozen=True)
class ServedInputs:
    """What served values are computed from.

    `events` by the topic's name; `tiles` by the training table's name, of which any may be missing; the `spreads` in
    force, where a domain without an entry had none.
    """

    events: Mapping[str, TopicEvents]
    tiles: Mapping[str, TileRows] = field(default_factory=dict)
    spreads: Spreads = field(default_factory=dict)


def served_values(
    features: ServedFeatures,
    rows: pa.Table,
    inputs: ServedInputs,
    *,
    meaning: ServedMeaning = "served",
    strict: bool = True,
) -> pa.Table:
    """Return what a read of each row's key at its time would have returned, in the order of the rows.

    `rows` has the entity's key columns (int64 or text) and `label_time`, an instant in UTC microseconds. The result has
    every value of `features.values`, with its cold-start value where the view has no row, and then
    `<domain>_last_event_at` (milliseconds since 1970), NULL where the view has no row and no item was served. With the
    meaning `happened` an event counts from its own time instead of its arrival.

    Raises LabelsRefused with counts if a row cannot be answered; without `strict` the column `refused` says why, NULL
    for an answered row, and the values of a refused one are NULL.
    """
    with duck_session(*JOINING) as session:
        names = (*features.key_names, TIME)
        asked = rows.select(list(names)).append_column(POINT, pa.array(range(rows.num_rows), pa.int64()))
        place = asked.schema.get_field_index(TIME)
        times = asked[TIME].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
        session.register("asked", asked.set_column(place, TIME, times))
        session.execute("create table labels as from asked")
        session.unregister("asked")
        create_served(session, features, inputs, meaning=meaning, strict=strict)
        columns = [value.name for value in features.values]
        columns += [f"{name}_last_event_at" for name in features.domains]
        shown = [f"case when r.point is null then f.{name} end as {name}" for name in columns]
        if not strict:
            shown.append(f"r.reason as {REFUSED}")
        return session.sql(
            f"select {', '.join(shown)} from features as f left join refused as r on r.point = f.point order by f.point"
        ).to_arrow_table()


def create_served(
    session: duckdb.DuckDBPyConnection,
    features: ServedFeatures,
    inputs: ServedInputs,
    *,
    meaning: ServedMeaning,
    strict: bool = True,
) -> None:
    """Create the tables `features` (as `ServedFeatures.sql` says) and `refused` (`point`, `reason`) of the points.

    The session has the table `labels`: `point`, the entity's keys and `label_time` in microseconds since 1970. Raises
    LabelsRefused if a label cannot be answered and `strict`.
    """
    work = _Work(session, features, inputs, meaning)
    work.create_points()
    work.load_events()
    work.refuse(strict=strict)
    parted = [tile.spec.tile for tile in features.tiles if work.create_parts(tile)]
    session.execute(f"create table features as {features.sql(parted=parted)}")


def days_of_points(session: duckdb.DuckDBPyConnection, features: ServedFeatures) -> tuple[date, date]:
    """Return the earliest day that any window of a point contains, and the latest day of a point."""
    first, last = [], []
    for domain in features.domains:
        windows = [features.days_of(domain, topic) or 0 for topic in features.topics_of(domain)]
        first.append(f"min({domain}_day) - {max(windows, default=0)}")
        last.append(f"max({domain}_day)")
    found: tuple[date, date] = session.execute(
        f"select least({', '.join(first)}), greatest({', '.join(last)}) from points"
    ).fetchall()[0]
    return found


def refuse_points(
    session: duckdb.DuckDBPyConnection,
    what: str,
    refusals: Iterable[tuple[str, str, str]],
    *,
    strict: bool,
) -> None:
    """Create `refused` (`point`, `reason`): the points that cannot be answered, each with the first reason.

    `refusals` are reason, remedy and condition on a point `p`; `what` says which value is meant, e.g. `as served`.
    Raises LabelsRefused for the first reason that any point has, if `strict`.
    """
    session.execute("create table refused (point bigint, reason varchar)")
    for reason, remedy, condition in refusals:
        session.execute(
            f"insert into refused select point, ? from points as p where ({condition}) "
            "and point not in (select point from refused)",
            [reason],
        )
        if strict:
            count, first, total = session.execute(
                "select count(*), min(point), (select count(*) from points) from refused"
            ).fetchall()[0]
            if count:
                raise LabelsRefused(
                    f"{count:,} of {total:,} labels cannot have a value {what}, the first in row {first + 1:,}: "
                    f"{reason}: {remedy}"
                )


class _Work:
    """The steps of one evaluation, in one session."""

    def __init__(
        self,
        session: duckdb.DuckDBPyConnection,
        features: ServedFeatures,
        inputs: ServedInputs,
        meaning: ServedMeaning,
    ) -> None:
        self.session = session
        self.features = features
        self.inputs = inputs
        self.meaning = meaning
        self.keys = ", ".join(features.key_names)
        # An event may claim to have happened by so much after its arrival.
        self.tolerance = timedelta(hours=float(features.registry.variables.get("future_tolerance_hours", 24)))
        self._statistics: dict[tuple[str, str], str] = {}

    def create_points(self) -> None:
        """Create `points`: each label's time, and for each domain the time and day that its windows begin from."""
        columns = []
        for domain in self.features.domains:
            moment = f"make_timestamp({TIME} - 1000000 * ({self._spread(domain)}))"
            columns.append(f"{moment} as {domain}_clock, cast({moment} as date) as {domain}_day")
        self.session.execute(
            f"create table points as select point, {self.keys}, make_timestamp({TIME}) as {CLOCK}, "
            f"{', '.join(columns)} from labels"
        )
        (self.last,) = self.session.execute(f"select max({CLOCK}) from points").fetchall()[0]

    def _spread(self, domain: str) -> str:
        """Return SQL of the seconds by which a label's day begins later, by the spread in force at its time."""
        spreads = self.inputs.spreads.get(domain, ())
        if not any(seconds for _, seconds in spreads):
            return "0"
        arms = [
            f"when {TIME} >= {_microseconds(since)} then {self._part(seconds)}"
            for since, seconds in reversed(spreads[1:])
        ]
        # Before the first record the spread is not known: it is taken to have been the first recorded one.
        first = self._part(spreads[0][1])
        return f"case {' '.join(arms)} else {first} end" if arms else first

    def _part(self, seconds: int) -> str:
        return spread_part(self.features.key, str(seconds)) if seconds else "0"

    def load_events(self) -> None:
        """Create the relation of every topic with the events of the points' keys."""
        for name, fields in self.features.topics.items():
            topic = self.features.registry.topic(name)
            self._load(topic, fields)

    def _load(self, topic: TopicDeclaration, fields: Sequence[str]) -> None:
        features = self.features
        columns = list(dict.fromkeys([*features.key_names, *fields, *([topic.time] if topic.time else [])]))
        since = self._first_moment(topic)
        conditions = [f"({self.keys}) in (select {self._row_of_keys()} from points)"]
        if topic.time:
            # By whole days, because the totals of days are compared with those of stored tiles.
            last = (self.last + self.tolerance).date()
            conditions.append(f"cast({topic.time} as date) <= date '{last.isoformat()}'")
            if since:
                conditions.append(f"cast({topic.time} as date) >= date '{since.date().isoformat()}'")
        known = topic.time if self.meaning == "happened" and topic.time else ARRIVED
        loaded = f"{topic.relation}_loaded"
        self.inputs.events[topic.name].load(self.session, loaded, columns, since)
        # Without a zone, because a conversion from instant to date would otherwise depend on the session's.
        instants = [ARRIVED, *(name for name in columns if topic.by_name[name].type == "timestamptz")]
        plain = ", ".join(f"make_timestamp(epoch_us({name})) as {name}" for name in instants)
        self.session.execute(
            f"create table {topic.relation} as select {', '.join(columns)}, {known} as {KNOWN}, {ARRIVAL_KNOWN} "
            f"from (select * replace ({plain}) from {loaded}) where {' and '.join(conditions)}"
        )
        self.session.execute(f"drop table {loaded}")

    def _row_of_keys(self) -> str:
        return self.keys if len(self.features.keys) == 1 else f"({self.keys})"

    def _first_moment(self, topic: TopicDeclaration) -> datetime | None:
        """Return the start of the first day of a topic that any label's window contains, None if it has no bound."""
        bounds = []
        for domain in self.features.domains:
            if topic.name in self.features.topics_of(domain):
                days = self.features.days_of(domain, topic.name)
                if days is None:
                    return None
                bounds.append(f"min({domain}_day) - {days}")
        (first,) = self.session.execute(f"select least({', '.join(bounds)}) from points").fetchall()[0]
        return datetime(first.year, first.month, first.day, tzinfo=UTC)

    def refuse(self, *, strict: bool) -> None:
        """Create `refused`. Raises LabelsRefused if a label cannot be answered and `strict`."""
        refuse_points(self.session, f"as {self.meaning}", self._refusals(), strict=strict)

    def _refusals(self) -> Iterator[tuple[str, str, str]]:
        """Yield reason, remedy and condition on a point `p` for everything that leaves a label without an answer."""
        features = self.features
        for name in features.topics:
            events = self.inputs.events[name]
            if events.watermark is not None:
                yield (
                    f"the lake holds what arrived in {name} up to {events.watermark.isoformat()}, and the label is "
                    "newer",
                    "drop these labels, or export the events (`prefs export`) and build it again",
                    f"p.{CLOCK} > make_timestamp({_microseconds(events.watermark)})",
                )
        for domain in features.domains:
            for name in features.topics_of(domain):
                start = self.inputs.events[name].complete_from
                if start is not None:
                    days = features.days_of(domain, name)
                    yield (
                        f"the lake no longer holds what arrived in {name} before {start.isoformat()}, and {domain} "
                        "needs it",
                        "drop these labels, or keep events longer",
                        "true"
                        if days is None
                        else f"cast(p.{domain}_day - {days} as timestamp) - {_interval(self.tolerance)} "
                        f"< make_timestamp({_microseconds(start)})",
                    )
        if self.meaning == "happened":
            return
        for domain in features.domains:
            for name in features.topics_of(domain):
                topic = features.registry.topic(name)
                unknown = self.session.execute(
                    f"select 1 from {topic.relation} where not {ARRIVAL_KNOWN} limit 1"
                )
                if not unknown.fetchall():
                    continue
                same = " and ".join(f"e.{key} = p.{key}" for key in features.key_names)
                # From its arrival at the latest on the event counts, whenever it was.
                conditions = [same, f"not e.{ARRIVAL_KNOWN}", f"(e.{KNOWN} is null or e.{KNOWN} > p.{CLOCK})"]
                days = features.days_of(domain, name)
                if topic.time:
                    conditions.append(f"e.{topic.time} <= p.{CLOCK} + {_interval(self.tolerance)}")
                    if days is not None:
                        conditions.append(f"cast(e.{topic.time} as date) >= p.{domain}_day - {days}")
                yield (
                    f"{domain} depends on events of {name} whose arrival is not known (history that was read without "
                    "--arrived-at)",
                    "drop these labels, or use --as happened, which goes by the events' own time",
                    f"exists (select 1 from {topic.relation} as e where {' and '.join(conditions)})",
                )

    def create_parts(self, tile: TileQuery) -> bool:
        """Create the table of a tile with `prefs_known`, and its parts; return False where no stored rows are given."""
        spec, features, session = tile.spec, self.features, self.session
        rows = self.inputs.tiles.get(spec.name)
        if rows is None:
            return False
        windows = features.windows_of(spec.tile)
        since = f"least({', '.join(f'{domain}_day - {days}' for domain, days in windows.items())})"
        first, last = session.execute(f"select min({since}), max({CLOCK}) from points").fetchall()[0]
        columns = features.columns_of(tile)
        load_tiles(
            session,
            spec,
            columns,
            rows(columns, first, (last + self.tolerance).date()),
            where=f"({self.keys}) in (select {self._row_of_keys()} from points)",
        )
        stored, trusted = f"{spec.name}_stored", f"{spec.name}_trusted"
        session.execute(f"alter table {spec.name} rename to {stored}")
        totals = ", ".join(f"sum({name}) as {name}" for name in tile.totals)
        equal = " and ".join(f"e.{name} is not distinct from t.{name}" for name in tile.totals)
        session.execute(
            f"create table {trusted} as select e.{TILE_DAY} from ({tile.totals_sql}) as e "
            f"join (select {spec.day}, {totals} from {stored} group by {spec.day}) as t on t.{spec.day} = e.{TILE_DAY} "
            f"where e.uncounted = 0 and {equal}"
        )
        statistics = self._create_statistics(tile)
        same_keys = " and ".join(f"s.{key} = t.{key}" for key in features.key_names)
        session.execute(
            f"create table {spec.name} as select t.*, s.newest as {KNOWN} from {stored} as t "
            f"join {statistics} as s on {same_keys} and s.{TILE_DAY} = t.{spec.day} "
            f"where t.{spec.day} in (select {TILE_DAY} from {trusted})"
        )
        session.execute(f"drop table {stored}")
        pairs = f"{spec.name}{PAIRS}"
        same_keys = " and ".join(f"s.{key} = p.{key}" for key in features.key_names)
        keys = ", ".join(f"p.{key}" for key in features.key_names)
        session.execute(
            f"create table {pairs} as select p.point, {keys}, s.{TILE_DAY}, p.{CLOCK} "
            f"from (select *, {since} as since from points) as p join {statistics} as s on {same_keys} "
            f"where s.oldest <= p.{CLOCK} and s.{TILE_DAY} >= p.since and (s.newest > p.{CLOCK} "
            f"or s.{TILE_DAY} not in (select {TILE_DAY} from {trusted}))"
        )
        session.execute(f"create table {spec.name}{PARTS} as {tile.parts_sql}")
        session.execute(f"drop table {pairs}")
        return True

    def _create_statistics(self, tile: TileQuery) -> str:
        """Return the relation with the times from which the oldest and newest event of each key and day count."""
        place = (tile.topic.name, tile.day_sql)
        if place not in self._statistics:
            name = f"statistics_{len(self._statistics)}"
            self.session.execute(
                f"create table {name} as select {self.keys}, {tile.day_sql} as {TILE_DAY}, min({KNOWN}) as oldest, "
                f"max({KNOWN}) as newest from {tile.topic.relation} group by all"
            )
            self._statistics[place] = name
        return self._statistics[place]


def _microseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _interval(length: timedelta) -> str:
    return f"interval '{round(length.total_seconds())} seconds'"
