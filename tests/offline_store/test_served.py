"""Values as served, against plain Python over the same events; what cannot be answered is refused with a count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import shipped
from declared import COURSES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyiceberg.io.pyarrow import schema_to_pyarrow
from shipped import GENRE, INTERACTIONS, LONG, SHORT, WATCH, tile_row, with_computed_attributes

from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.iceberg.tables import TileTable, tile_tables
from dagster_prefs.training.labels import LabelsRefused
from dagster_prefs.training.served import ServedInputs, TopicEvents, served_values
from dagster_prefs.training.served_sql import ServedFeatures, ServedMeaning, choose_served
from dagster_prefs.training.windows import ViewNotPortable

from .conftest import DAY, minutes
from .served_oracle import (
    Interaction,
    Lesson,
    View,
    day_of,
    learner_values,
    sequence_values,
    spread_of,
    viewer_values,
    with_ids,
)

REGISTRY = with_computed_attributes()
VIEWERS = choose_served(REGISTRY, "viewer")
# A domain that is made from events alone, whose lists may hold NULL.
SEQUENCES = ServedFeatures(shipped.REGISTRY, shipped.REGISTRY.entity("viewer"), ["sequence"])
SCHOOL = load_registry(COURSES)
LEARNERS = choose_served(SCHOOL, None)
(LESSONS,) = tile_tables(SCHOOL).values()
SPREADS = (0, 1, 3600, 86_400)

MIDNIGHT = datetime(DAY.year, DAY.month, DAY.day, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

moments = st.builds(
    lambda days, part: MIDNIGHT + timedelta(days=days) + part,
    st.integers(-31, 2),
    st.sampled_from(
        [timedelta(), MICROSECOND, timedelta(hours=1), timedelta(hours=12), timedelta(days=1) - MICROSECOND]
    ),
)
# From before the event (a clock ahead of ours) to weeks after it.
lags = st.sampled_from(
    [
        timedelta(hours=-20),
        timedelta(),
        timedelta(seconds=2),
        timedelta(hours=5),
        timedelta(days=2),
        timedelta(days=20),
    ]
)


def arriving(kind: type, key: Any, time: str, **fields: Any) -> Any:
    return st.builds(
        lambda at, lag, keyed, given: kind(keyed, at, at + lag, **given),
        moments,
        lags,
        key,
        st.fixed_dictionaries(fields),
    )


views = arriving(
    View,
    st.integers(0, 4),
    "watched_at",
    content_id=st.sampled_from([None, "a", "b"]),
    genre=st.sampled_from([None, *"abcdefZé"]),
    watch_duration_sec=st.sampled_from([None, 0, 1, 59, 3600]),
    completion_pct=st.sampled_from([None, Decimal("0.899999999"), Decimal("0.9"), Decimal(1)]),
)
reactions = arriving(
    Interaction, st.integers(0, 4), "event_ts", event_type=st.sampled_from(["like", "share", "search"])
)
lessons = arriving(
    Lesson,
    st.sampled_from(["7", "007", "日本"]),
    "happened_at",
    event_type=st.sampled_from(["started", "finished", "bookmarked"]),
    subject=st.sampled_from([None, "maths", "a", "b", "c", "d", "e"]),
    seconds=st.sampled_from([None, 0, 7, 3600]),
)


def events(rows: Sequence[Any], types: dict[str, pa.DataType], **limits: Any) -> TopicEvents:
    """The rows as a topic's events."""

    def load(
        session: duckdb.DuckDBPyConnection, name: str, columns: Sequence[str], since: datetime | None
    ) -> None:
        schema = pa.schema([(column, types[column]) for column in (*columns, "arrived_at")])
        table = pa.Table.from_pylist([vars(row) for row in rows], schema=schema)
        session.register("rows", table)
        session.execute(f"create table {name} as select *, arrived_at is not null as arrival_known from rows")
        session.unregister("rows")

    return TopicEvents(load, **limits)


INSTANT = pa.timestamp("us", tz="UTC")
VIEW_TYPES = {
    "viewer_id": pa.int64(), "watched_at": INSTANT, "arrived_at": INSTANT, "content_id": pa.string(),
    "event_id": pa.string(), "genre": pa.string(), "watch_duration_sec": pa.int32(),
    "completion_pct": pa.decimal128(28, 9),
}  # fmt: skip
REACTION_TYPES = {
    "viewer_id": pa.int64(),
    "event_ts": INSTANT,
    "arrived_at": INSTANT,
    "event_type": pa.string(),
}
LESSON_TYPES = {
    "learner_id": pa.string(), "happened_at": INSTANT, "arrived_at": INSTANT, "event_type": pa.string(),
    "subject": pa.string(), "seconds": pa.int32(),
}  # fmt: skip


def tile_rows(spec: TileTable, rows: Iterable[tuple[Any, ...]]) -> Callable[..., Iterable[pa.RecordBatch]]:
    """Stored rows of a tile, of the days that are asked for."""
    names = [column.name for column in spec.columns]
    held = [dict(zip(names, row, strict=True)) for row in rows]

    def read(columns: Sequence[str], first: date, last: date) -> Iterable[pa.RecordBatch]:
        wanted = [row for row in held if first <= row[spec.day] <= last]
        table = pa.Table.from_pylist(wanted, schema=schema_to_pyarrow(spec.schema))
        return table.select([*spec.entity.key_names, spec.day, *columns]).to_batches()

    return read


def grouped(rows: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def completed(rows: Iterable[View]) -> int:
    return sum(row.completion_pct is not None and row.completion_pct >= Decimal("0.9") for row in rows)


def stored(views: Sequence[View], reactions: Sequence[Interaction]) -> dict[str, Any]:
    """The training tables as an export leaves them that knew these events."""
    watch = [
        tile_row(
            WATCH, viewer_id=viewer, watch_date=day, watch_seconds=sum(v.watch_duration_sec or 0 for v in rows),
            watch_time_minutes=minutes(sum(v.watch_duration_sec or 0 for v in rows)), views=len(rows),
            content_started=len({v.content_id for v in rows} - {None}), completions=completed(rows),
            genres_watched=len({v.genre for v in rows} - {None}), last_event_at=max(v.watched_at for v in rows),
        )
        for (viewer, day), rows in grouped(views, lambda v: (v.viewer_id, day_of(v.watched_at))).items()
    ]  # fmt: skip
    genre = [
        tile_row(
            GENRE, viewer_id=viewer, watch_date=day, genre=name,
            watch_seconds=sum(v.watch_duration_sec or 0 for v in rows), views=len(rows), completions=completed(rows),
            last_event_at=max(v.watched_at for v in rows),
        )
        for (viewer, day, name), rows in grouped(
            views, lambda v: (v.viewer_id, day_of(v.watched_at), v.genre)
        ).items()
        if name is not None
    ]  # fmt: skip
    interactions = [
        tile_row(
            INTERACTIONS, viewer_id=viewer, interaction_date=day,
            **{f"{kind}{'es' if kind == 'search' else 's'}": sum(r.event_type == kind for r in rows)
               for kind in ("like", "share", "search")},
            last_event_at=max(r.event_ts for r in rows),
        )
        for (viewer, day), rows in grouped(reactions, lambda r: (r.viewer_id, day_of(r.event_ts))).items()
    ]  # fmt: skip
    return {
        WATCH.name: tile_rows(WATCH, watch),
        GENRE.name: tile_rows(GENRE, genre),
        INTERACTIONS.name: tile_rows(INTERACTIONS, interactions),
    }


def viewer_inputs(views: Sequence[View], reactions: Sequence[Interaction], **given: Any) -> ServedInputs:
    limits = {name: given.pop(name) for name in ("watermark", "complete_from") if name in given}
    return ServedInputs(
        {
            "view_events": events(views, VIEW_TYPES, **limits),
            "content_interactions": events(reactions, REACTION_TYPES, **limits),
        },
        **given,
    )


def asked(key: str, labels: Sequence[tuple[Any, datetime]]) -> pa.Table:
    return pa.table(
        {
            key: [label for label, _ in labels],
            "label_time": pa.array([when for _, when in labels], INSTANT),
        }
    )


def spread_over(domains: Iterable[str], seconds: int) -> dict[str, list[tuple[datetime, int]]]:
    return {domain: [(MIDNIGHT, seconds)] for domain in domains}


label_times = st.one_of(moments, st.builds(lambda at, lag: at + lag, moments, lags))


viewer = st.integers(0, 4)
HELD = ("nothing", "all", "late events missing", "events beyond the lake")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    views=st.lists(views, max_size=50).map(with_ids),
    reactions=st.lists(reactions, max_size=20),
    labels=st.lists(st.tuples(viewer, label_times), min_size=1, max_size=20),
    spread=st.sampled_from(SPREADS),
    held=st.sampled_from(HELD),
    exported=moments,
    later=st.lists(views, min_size=1, max_size=2),
    happened=st.booleans(),
)
def test_every_value_is_what_a_read_returned(
    views: list[View],
    reactions: list[Interaction],
    labels: list[tuple[int, datetime]],
    spread: int,
    held: str,
    exported: datetime,
    later: list[View],
    happened: bool,
) -> None:
    """Without stored tiles, and with tiles that lack late events or know some that the lake does not hold."""
    known = [view for view in views if view.arrived_at and view.arrived_at <= exported]
    tiles = {
        "nothing": {},
        "all": stored(views, reactions),
        "late events missing": stored(known, reactions),
        "events beyond the lake": stored(views + later, reactions),
    }[held]
    domains = (*VIEWERS.domains, *SEQUENCES.domains)
    inputs = viewer_inputs(views, reactions, spreads=spread_over(domains, spread), tiles=tiles)
    meaning: ServedMeaning = "happened" if happened else "served"
    recent = served_values(SEQUENCES, asked("viewer_id", labels), inputs, meaning=meaning)
    assert recent.to_pylist() == [
        sequence_values(*label, views, spread=spread, happened=happened) for label in labels
    ]
    found = served_values(VIEWERS, asked("viewer_id", labels), inputs, meaning=meaning)
    assert found.to_pylist() == [
        viewer_values(*label, views, reactions, spread=spread, happened=happened) for label in labels
    ]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(lessons, max_size=40),
    labels=st.lists(
        st.tuples(st.sampled_from(["7", "007", "日本", "nobody"]), label_times), min_size=1, max_size=15
    ),
    spread=st.sampled_from(SPREADS),
    with_tiles=st.booleans(),
)
def test_a_domain_that_reads_events_and_a_text_key(
    rows: list[Lesson], labels: list[tuple[str, datetime]], spread: int, with_tiles: bool
) -> None:
    lesson = grouped(rows, lambda one: (one.learner_id, day_of(one.happened_at)))
    tile = [
        (
            learner, day, sum(one.event_type == "started" for one in found),
            sum(one.seconds or 0 for one in found), sum(one.event_type == "finished" for one in found),
            max(one.happened_at for one in found),
        )
        for (learner, day), found in lesson.items()
    ]  # fmt: skip
    inputs = ServedInputs(
        {"lesson_events": events(rows, LESSON_TYPES)},
        {LESSONS.name: tile_rows(LESSONS, tile)} if with_tiles else {},
        spread_over(LEARNERS.domains, spread),
    )
    found = served_values(LEARNERS, asked("learner_id", labels), inputs)
    assert found.to_pylist() == [learner_values(*label, rows, spread=spread) for label in labels]


HOUR = timedelta(hours=1)


def test_stored_rows_serve_for_the_days_of_which_nothing_arrived_later() -> None:
    """Only the day of a late event is computed: another day's stored row is used as it is."""
    early = [View(1, MIDNIGHT - timedelta(days=days), MIDNIGHT - timedelta(days=days)) for days in (2, 3)]
    late = dataclasses.replace(early[0], arrived_at=MIDNIGHT + HOUR, watch_duration_sec=6)
    views = [*early, late]
    tiles = stored(views, [])
    inputs = viewer_inputs(views, [], tiles=tiles)
    labels = asked("viewer_id", [(1, MIDNIGHT), (1, MIDNIGHT + HOUR)])
    found = served_values(VIEWERS, labels, inputs).to_pylist()
    assert [row[f"completions_{LONG}d"] for row in found] == [0, 0]
    # Stored rows that differ from the events in what no total shows are recognisable in the result.
    rows = [
        tile_row(
            WATCH, viewer_id=1, watch_date=day_of(MIDNIGHT) - timedelta(days=days), watch_seconds=seconds,
            views=number, content_started=100 * days, last_event_at=MIDNIGHT,
        )
        for days, seconds, number in ((2, 66, 2), (3, 60, 1))
    ]  # fmt: skip
    inputs = viewer_inputs(views, [], tiles={**tiles, WATCH.name: tile_rows(WATCH, rows)})
    found = served_values(VIEWERS, labels, inputs).to_pylist()
    assert [row[f"titles_{SHORT}d"] for row in found] == [301, 500]


def test_the_spread_of_the_labels_time_moves_its_window() -> None:
    """A spread that was changed counts from the moment of the change, for each domain by itself."""
    views = [View(59, MIDNIGHT - timedelta(days=LONG + 1), MIDNIGHT - timedelta(days=LONG))]
    reactions = [Interaction(59, view.watched_at, view.arrived_at) for view in views]
    spreads = {"watch": [(MIDNIGHT - HOUR, 0), (MIDNIGHT + timedelta(seconds=10), 60)]}
    labels = [(59, MIDNIGHT + timedelta(seconds=second)) for second in (-1, 0, 10, 58, 59)]
    found = served_values(
        VIEWERS, asked("viewer_id", labels), viewer_inputs(views, reactions, spreads=spreads)
    ).to_pylist()
    minutes = [row[f"watch_minutes_{LONG}d"] for row in found]
    assert minutes == [1, 0, 1, 1, 0]
    assert [row[f"likes_{LONG}d"] for row in found] == [1, 0, 0, 0, 0]


def refused(
    inputs: ServedInputs, labels: Sequence[tuple[int, datetime]], **given: Any
) -> tuple[str, list[Any]]:
    """The error of a strict evaluation, and each label's reason of another."""
    with pytest.raises(LabelsRefused) as error:
        served_values(VIEWERS, asked("viewer_id", labels), inputs, **given)
    found = served_values(VIEWERS, asked("viewer_id", labels), inputs, strict=False, **given).to_pylist()
    assert all((row["refused"] is None) == (row["favorite_genres"] is not None) for row in found), (
        "a refused label has no values, and any other has all"
    )
    return str(error.value), [row["refused"] for row in found]


def test_labels_beyond_what_the_lake_holds_are_refused_with_their_number() -> None:
    labels = [(1, MIDNIGHT), (1, MIDNIGHT + MICROSECOND), (2, MIDNIGHT + HOUR)]
    message, reasons = refused(viewer_inputs([], [], watermark=MIDNIGHT), labels)
    assert message.startswith(
        "2 of 3 labels cannot have a value as served, the first in row 2: the lake holds what arrived in "
        f"content_interactions up to {MIDNIGHT.isoformat()}, and the label is newer: drop these labels, or export"
    )
    assert [reason is None for reason in reasons] == [True, False, False]
    refused(viewer_inputs([], [], watermark=MIDNIGHT), labels, meaning="happened")
    start = MIDNIGHT - timedelta(days=LONG + 1)
    labels = [(1, MIDNIGHT - MICROSECOND), (1, MIDNIGHT)]
    message, reasons = refused(viewer_inputs([], [], complete_from=start), labels)
    assert message.startswith(
        "1 of 2 labels cannot have a value as served, the first in row 1: the lake no longer holds what arrived in "
        f"content_interactions before {start.isoformat()}, and interactions needs it"
    )
    assert [reason is None for reason in reasons] == [False, True]


def test_an_unknown_arrival_refuses_the_labels_that_it_touches() -> None:
    unknown = [View(1, MIDNIGHT - timedelta(days=LONG), None)]
    day = timedelta(days=1)
    labels = [
        # Before the event by more than any clock is ahead, within the window, after it, and of another viewer.
        (1, MIDNIGHT - timedelta(days=LONG) - day - MICROSECOND),
        (1, MIDNIGHT - timedelta(days=LONG) - day),
        (1, MIDNIGHT + day - MICROSECOND),
        (1, MIDNIGHT + day),
        (2, MIDNIGHT),
    ]
    message, reasons = refused(viewer_inputs(unknown, []), labels)
    assert message.startswith(
        "2 of 5 labels cannot have a value as served, the first in row 2: preferences depends on events of view_events "
        "whose arrival is not known"
    )
    assert message.endswith("or use --as happened, which goes by the events' own time")
    assert [reason is None for reason in reasons] == [True, False, False, True, True]
    found = served_values(VIEWERS, asked("viewer_id", labels), viewer_inputs(unknown, []), meaning="happened")
    assert found[f"watch_minutes_{LONG}d"].to_pylist() == [0, 0, 1, 0, 0]


def view_of(query: str) -> Registry:
    """The courses with another rolling view."""
    return dataclasses.replace(SCHOOL, queries={**SCHOOL.queries, "learner_progress_rolling": query})


GROUPED = (
    "select learner_id, 'learning#progress'::text as domain_key, count(*) as lessons_7d, 0 as minutes_28d,"
    " array_agg(subject order by happened_at desc, event_id) as favorite_subjects,"
    " (extract(epoch from max(happened_at)) * 1000)::bigint as last_event_at from lesson_events"
)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (GROUPED.replace("select learner_id,", "select max(learner_id) as learner_id,"), "groups without learner_id"),
        (f"{GROUPED} where lower(subject) = 'a' group by learner_id", r"has LOWER\(subject\)"),
        (f"{GROUPED} group by learner_id limit 3", "has LIMIT 3"),
        (f"{GROUPED} where learner_id <> 'x' group by learner_id", "computes with the value of learner_id"),
        (f"{GROUPED} where seconds > (select 1) group by learner_id", r"has \(SELECT 1\)"),
        (
            f"{GROUPED} group by learner_id having max(happened_at) > now() - interval '1 day'",
            "uses the present time in",
        ),
        (GROUPED.replace("lesson_events", "teachers") + " group by learner_id", "reads teachers, which is neither"),
        (GROUPED.replace("0 as minutes", "sum(seconds) / 2 as minutes") + " group by learner_id", "has SUM"),
        (f"{GROUPED} where happened_at at time zone 'Asia/Tokyo' > '2026-01-01' group by learner_id", "Tokyo"),
    ],
)  # fmt: skip
def test_a_view_that_cannot_be_served_this_way_is_refused(query: str, message: str) -> None:
    registry = view_of(query)
    with pytest.raises(ViewNotPortable, match=message):
        ServedFeatures(registry, registry.entity("learner"), ["progress"])
    with pytest.raises(
        ViewNotPortable, match=f"no attribute of learner can be computed as served: .*{message}"
    ):
        choose_served(registry, None)


def test_a_view_over_events_goes_by_the_labels_clock() -> None:
    """Two windows: one of exact hours, and one of whole days that the spread moves; lists with NULL in order."""
    registry = view_of(
        f"{GROUPED} where happened_at > now() - interval '6 hours' or "
        "((happened_at at time zone 'UTC')::date::timestamp at time zone 'UTC') + interval '2 days' > now() "
        "and subject is null group by learner_id"
    )
    features = choose_served(registry, None)
    rows = [
        Lesson("7", MIDNIGHT - 6 * HOUR, MIDNIGHT, subject="edge", event_id="1"),
        Lesson("7", MIDNIGHT - 5 * HOUR, MIDNIGHT, subject="inside", event_id="1"),
        Lesson("7", MIDNIGHT - 25 * HOUR, MIDNIGHT, subject=None, event_id="2"),
        Lesson("7", MIDNIGHT - 25 * HOUR, MIDNIGHT, subject=None, event_id="1"),
    ]
    moved = spread_of("7", 86_400)
    assert timedelta(hours=1) < moved, "the spread moves this learner's day"
    inputs = ServedInputs(
        {"lesson_events": events(rows, {**LESSON_TYPES, "event_id": pa.string()})},
        spreads=spread_over(features.domains, 86_400),
    )
    times = [
        MIDNIGHT - MICROSECOND,
        MIDNIGHT,
        MIDNIGHT + HOUR,
        MIDNIGHT + moved - MICROSECOND,
        MIDNIGHT + moved,
    ]
    found = served_values(features, asked("learner_id", [("7", time) for time in times]), inputs)
    assert found["favorite_subjects"].to_pylist() == [
        None, ["inside", None, None], [None, None], [None, None], None,
    ]  # fmt: skip
