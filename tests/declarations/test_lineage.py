"""Column lineage: what each attribute is made from, by hand and by trying; and who refuses a stale one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from project_copies import EXAMPLE, FOREIGN, ROOT, Copy
from psycopg import sql
from shipped import LONG, SHORT

from dagster_prefs.cli import cli
from dagster_prefs.declarations import trace as trace_module
from dagster_prefs.declarations.generate import check_current, generate_files
from dagster_prefs.declarations.lineage import (
    LINEAGE,
    ROWS,
    VALUES,
    Column,
    Kind,
    Lineage,
    LineageError,
    Sources,
    column_of,
    decisive,
    load_lineage,
    origin,
)
from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.declarations.stale import StaleRegistry
from dagster_prefs.declarations.trace import trace, trace_all
from dagster_prefs.engine.connection import EngineConfiguration

# By hand, from the SQL of the models: topic → relation.column → (fields that it is made from, fields that choose
# or order the value, other fields that decide which rows count), each without the topic.
WATCH_ROWS = "event_id viewer_id watched_at"
GENRE_ROWS = f"{WATCH_ROWS} genre watch_duration_sec"
SHOP_ROWS = "event_id user_id event_time"
EXPECTED: Mapping[Path, Mapping[str, Mapping[str, tuple[str, str, str]]]] = {
    EXAMPLE: {
        "view_events": {
            f"watch.watch_minutes_{SHORT}d": ("watch_duration_sec", "", WATCH_ROWS),
            f"watch.watch_minutes_{LONG}d": ("watch_duration_sec", "", WATCH_ROWS),
            f"watch.titles_{SHORT}d": ("content_id", "", WATCH_ROWS),
            f"watch.completions_{LONG}d": ("", "completion_pct", WATCH_ROWS),
            f"watch.genres_watched_{LONG}d": ("genre", "", WATCH_ROWS),
            "watch.last_event_at": ("watched_at", "", "event_id viewer_id"),
            "preferences.favorite_genre": ("genre", "watch_duration_sec", WATCH_ROWS),
            "preferences.favorite_genres": ("genre", "watch_duration_sec", WATCH_ROWS),
            "preferences.favorite_genre_shares": ("watch_duration_sec", "genre", WATCH_ROWS),
            f"preferences.completion_rate_{LONG}d": ("", "completion_pct", GENRE_ROWS),
            f"preferences.minutes_per_view_{LONG}d": ("watch_duration_sec", "", f"{WATCH_ROWS} genre"),
            "preferences.last_event_at": ("watched_at", "", "event_id viewer_id genre watch_duration_sec"),
            "sequence.recent_content_ids": ("content_id", "event_id watched_at", "viewer_id"),
            "sequence.recent_watched_at": ("watched_at", "event_id", "viewer_id"),
            "sequence.recent_completions": ("completion_pct", "event_id watched_at", "viewer_id"),
            "sequence.last_event_at": ("watched_at", "", "event_id viewer_id"),
            "viewer_watch_daily.views": ("", "", WATCH_ROWS),
            "viewer_watch_daily.watch_date": ("watched_at", "", "event_id viewer_id"),
        },
        "content_interactions": {
            f"interactions.likes_{LONG}d": ("", "event_type", "event_id viewer_id event_ts"),
            f"interactions.shares_{LONG}d": ("", "event_type", "event_id viewer_id event_ts"),
            f"interactions.searches_{LONG}d": ("", "event_type", "event_id viewer_id event_ts"),
            "interactions.last_event_at": ("event_ts", "", "event_id viewer_id"),
        },
        "user.events": {
            "user_category_profile.category": ("category", "", SHOP_ROWS),
            "user_category_profile.affinity_score": ("", "event_type", f"{SHOP_ROWS} category"),
            "user_category_profile.unique_items_interacted": ("item_id", "", f"{SHOP_ROWS} category"),
            "user_category_profile.last_engaged_at": ("event_time", "", "event_id user_id category"),
            "user_brand_profile.brand": ("brand", "", SHOP_ROWS),
            "user_brand_profile.brand_affinity": ("", "event_type", f"{SHOP_ROWS} brand"),
            "user_brand_profile.purchase_count": ("", "event_type", f"{SHOP_ROWS} brand"),
            "user_brand_profile.last_brand_interaction": ("event_time", "", "event_id user_id brand"),
            "user_price_sensitivity.price_tier": ("", "price", SHOP_ROWS),
            "user_price_sensitivity.views": ("", "event_type", f"{SHOP_ROWS} price"),
            "user_price_sensitivity.purchases": ("", "event_type", f"{SHOP_ROWS} price"),
            "user_price_sensitivity.conversion_rate": ("", "event_type", f"{SHOP_ROWS} price"),
            "user_recent_activity.category": ("category", "", SHOP_ROWS),
            "user_recent_activity.recent_interactions": ("", "", f"{SHOP_ROWS} category"),
            "user_recent_activity.window_start": ("event_time", "", "event_id user_id category"),
            "user_recent_activity.window_end": ("event_time", "", "event_id user_id category"),
            "user_recent_activity.first_event_at": ("event_time", "", "event_id user_id category"),
            "user_recent_activity.last_event_at": ("event_time", "", "event_id user_id category"),
            "user_category_affinity_decayed.decayed_weight": (
                "event_time", "event_type", "event_id user_id category",
            ),
            "user_category_affinity_now.category": ("category", "", SHOP_ROWS),
            "user_category_affinity_now.affinity_score": (
                "event_time", "event_type", "event_id user_id category",
            ),
            "user_category_affinity_now.last_engaged_at": ("event_time", "", "event_id user_id category"),
            "user_recent_sequence.recent_item_ids": ("item_id", "event_id event_time", "user_id"),
            "user_recent_sequence.recent_event_types": ("event_type", "event_id event_time", "user_id"),
            "user_recent_sequence.recent_event_times": ("event_time", "event_id", "user_id"),
            "user_recent_sequence.last_event_at": ("event_time", "", "event_id user_id"),
            "user_price_tier_drift.baseline_tier": ("", "price", f"{SHOP_ROWS} event_type"),
            "user_price_tier_drift.recent_tier": ("", "price", f"{SHOP_ROWS} event_type"),
            "user_price_tier_drift.baseline_level": ("", "price", f"{SHOP_ROWS} event_type"),
            "user_price_tier_drift.recent_level": ("", "price", f"{SHOP_ROWS} event_type"),
            "user_price_tier_drift.drift": ("", "price", f"{SHOP_ROWS} event_type"),
            "user_price_tier_drift.direction": ("", "price", f"{SHOP_ROWS} event_type"),
            "category_cross_affinity.related_category": ("category", "", f"{SHOP_ROWS} event_type"),
            "category_cross_affinity.confidence": ("", "", f"{SHOP_ROWS} event_type category"),
            "category_cross_affinity_lift.support": ("user_id", "", "event_id event_time event_type category"),
            "category_cross_affinity_lift.lift": ("user_id", "", "event_id event_time event_type category"),
        },
    },
    FOREIGN: {
        "lesson_events": {
            "progress.lessons_7d": ("", "event_type", "event_id learner_id happened_at"),
            "progress.minutes_28d": ("seconds", "", "event_id learner_id happened_at"),
            "progress.favorite_subjects": ("subject", "seconds", "event_id learner_id happened_at"),
            "progress.last_event_at": ("happened_at", "", "event_id learner_id"),
        },
    },
}  # fmt: skip
PROJECTS = pytest.mark.parametrize("project", [EXAMPLE, FOREIGN], ids=lambda project: project.name)


def lineage_of(project: Path) -> tuple[Registry, Lineage]:
    registry = load_registry(project)
    return registry, load_lineage(project, registry)


def by_weight(sources: Sources) -> tuple[set[Column], set[Column], set[Column]]:
    made = {one for one, kinds in sources.items() if kinds & VALUES}
    chosen = {one for one, kinds in sources.items() if kinds - ROWS} - made
    return made, chosen, sources.keys() - made - chosen


@PROJECTS
def test_every_attribute_comes_from_the_fields_that_its_sql_reads(project: Path) -> None:
    registry, lineage = lineage_of(project)
    for topic, attributes in EXPECTED[project].items():
        for name, expected in attributes.items():
            wanted = tuple({Column(topic, one, is_field=True) for one in part.split()} for part in expected)
            assert by_weight(lineage.fields(column_of(name, registry, lineage))) == wanted, name
    served = {
        f"{domain.name}.{attribute}"
        for domain in registry.contract.domains.values()
        for attribute in domain.attributes
    }
    read = {
        f"{view.relation}.{name}"
        for view in registry.preferences.values()
        for name in view.reads
        if name not in registry.entity(view.entity).key_names
    }
    assert served | read <= {name for attributes in EXPECTED[project].values() for name in attributes}
    # Every column of every view comes from fields, except for a constant.
    for relation, found in lineage.relations.items():
        assert found.untraced == ""
        for column in found.columns:
            assert lineage.fields(Column(relation, column)), f"{relation}.{column}"


@PROJECTS
def test_lineage_goes_step_by_step_and_back(project: Path) -> None:
    registry, lineage = lineage_of(project)
    for domain in registry.contract.domains.values():
        for attribute in domain.attributes:
            column = Column(domain.relation, attribute)
            for source in lineage.sources(column):
                assert column in lineage.readers(source)
            for field in lineage.fields(column):
                assert column in lineage.goes_to(field)
                assert registry.topic(field.of).by_name[field.name]


def test_one_attribute_in_full() -> None:
    registry, lineage = lineage_of(EXAMPLE)
    column = column_of(f"watch.completions_{LONG}d", registry, lineage)
    assert column == column_of(f"viewer_engagement_rolling.completions_{LONG}d", registry, lineage)
    tile = "viewer_watch_metrics_1d"
    assert lineage.sources(column) == {
        Column(tile, "completions"): {"aggregation"},
        Column(tile, "viewer_id"): {"group"},
        Column(tile, "watch_date"): {"filter"},
    }
    assert decisive(lineage.sources(Column(tile, "completions"))) == {
        Column("view_events", "completion_pct"): {"condition"}
    }
    assert origin(column, lineage) == (
        "Chosen or ordered by view_events.completion_pct; rows decided by view_events.event_id, "
        "view_events.viewer_id, view_events.watched_at."
    )


def test_the_commands_of_the_documentation_say_what_it_says() -> None:
    text = (ROOT / "docs/lineage.md").read_text()
    ((named, shown),) = re.findall(r"prefs lineage (\S+)\n```\n\n```\n(column .*?)```", text, re.S)
    done = CliRunner().invoke(cli, ["lineage", named])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(shown)
    answer = json.loads(CliRunner().invoke(cli, ["lineage", "user.events.price", "--json"]).output)
    assert {
        "of": "user_price_sensitivity",
        "name": "price_tier",
        "how": "condition, filter, group",
    } in answer["goes_to"]
    stores = json.loads(CliRunner().invoke(cli, ["lineage", "view_events.genre", "--json"]).output)["stores"]
    assert "Iceberg viewer_genre_daily, column genre" in [one["text"] for one in stores]


def test_an_unknown_name_names_near_ones() -> None:
    registry, lineage = lineage_of(EXAMPLE)
    with pytest.raises(
        LineageError, match=rf"unknown column 'watch\.titles_7': did you mean watch\.titles_{SHORT}d"
    ):
        column_of("watch.titles_7", registry, lineage)
    with pytest.raises(LineageError, match="unknown column 'nothing'"):
        column_of("nothing", registry, lineage)
    # A topic whose name is not that of its typed relation.
    brand = Column("user.events", "brand", is_field=True)
    assert column_of("user.events.brand", registry, lineage) == brand


COLUMNS = {"a": ("k", "x", "y", "day"), "b": ("k", "z", "flag"), "c": ("id", "name")}


def traced(query: str, column: str) -> dict[str, set[Kind]]:
    found = trace(query, COLUMNS, {"c": frozenset({"id"})})
    assert found.untraced == ""
    sources = Lineage({}, {}, {"v": found}).sources(Column("v", column))
    return {str(one): set(kinds) for one, kinds in sources.items()}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("select x as v from a", {"a.x": {"identity"}}),
        ("select x::int + y as v from a", {"a.x": {"transformation"}, "a.y": {"transformation"}}),
        ("select coalesce(sum(x), 0) as v from a", {"a.x": {"aggregation"}}),
        ("select count(*) as v from a where y > 1", {"a.y": {"filter"}}),
        ("select case when x > 0 then y end as v from a", {"a.x": {"condition"}, "a.y": {"transformation"}}),
        ("select case x when 1 then 'one' end as v from a", {"a.x": {"condition"}}),
        ("select count(*) filter (where x = 1) as v from a", {"a.x": {"condition"}}),
        ("select array_agg(x order by y) as v from a", {"a.x": {"aggregation"}, "a.y": {"order"}}),
        (
            "select row_number() over (partition by x order by y) as v from a",
            {"a.x": {"group"}, "a.y": {"order"}},
        ),
        ("select x as v from a union all select z from b", {"a.x": {"identity"}, "b.z": {"identity"}}),
        (
            "select x as v from a union select z from b",
            {"a.x": {"identity", "group"}, "b.z": {"identity", "group"}},
        ),
        ("select distinct x as v from a", {"a.x": {"identity", "group"}}),
        (
            "select x as v, max(y) as m from a group by 1 having max(y) > 3",
            {"a.x": {"identity", "group"}, "a.y": {"filter"}},
        ),
        ("select x + 1 as v from a group by v", {"a.x": {"transformation", "group"}}),
        (
            "select a.x as v from a join b using (k)",
            {"a.x": {"identity"}, "a.k": {"join"}, "b.k": {"join"}},
        ),
        # A relation with one row a key adds none by a left join, and so has no part in the others' columns.
        ("select a.x as v from a left join c on c.id = a.k", {"a.x": {"identity"}}),
        (
            "select c.name as v from a left join c on c.id = a.k",
            {"c.name": {"identity"}, "c.id": {"join"}, "a.k": {"join"}},
        ),
        (
            "select a.x as v from a left join b on b.k = a.k",
            {"a.x": {"identity"}, "a.k": {"join"}, "b.k": {"join"}},
        ),
        (
            "with s as (select k, sum(z) as z from b where flag group by k) "
            "select a.x as v from a left join s on s.k = a.k",
            {"a.x": {"identity"}},
        ),
        (
            "with s as (select k, sum(z) as z from b where flag group by k) "
            "select s.z as v from a left join s on s.k = a.k",
            {"b.z": {"aggregation"}, "b.flag": {"filter"}, "b.k": {"group", "join"}, "a.k": {"join"}},
        ),
        (
            "select x as v from a where exists (select 1 from b where b.k = a.k and b.flag)",
            {"a.x": {"identity"}, "a.k": {"filter"}, "b.k": {"filter"}, "b.flag": {"filter"}},
        ),
        (
            "select x as v from a where k in (select k from b where z > 0)",
            {"a.x": {"identity"}, "a.k": {"filter"}, "b.k": {"filter"}, "b.z": {"filter"}},
        ),
        ("select (select max(z) from b) as v, x from a", {"b.z": {"aggregation"}}),
        (
            "select v from (select *, row_number() over (partition by k order by day desc) as place from "
            "(select k, x as v, day from a) as i) as o where place = 1",
            {"a.x": {"identity"}, "a.k": {"group"}, "a.day": {"filter"}},
        ),
        ("select x as v from a order by y limit 3", {"a.x": {"identity"}, "a.y": {"order"}}),
        ("select x as v from a order by y", {"a.x": {"identity"}}),
        ("select one as v from a cross join unnest(array[a.x, a.y]) as u(one)", None),
    ],
)  # fmt: skip
def test_constructs_of_sql(query: str, expected: dict[str, set[Kind]] | None) -> None:
    if expected is None:
        assert {"a.x", "a.y"} <= traced(query, "v").keys()
    else:
        assert traced(query, "v") == expected


def test_a_count_of_another_views_rows_comes_from_what_decides_about_them() -> None:
    registry = load_registry(EXAMPLE)
    queries = {
        "watched": "select viewer_id from view_events where genre = 'drama'",
        "counted": "select count(*) as v from watched",
    }
    columns = {"view_events": tuple(registry.topics["view_events"].by_name)}
    relations = trace_all(queries, columns, {})
    lineage = Lineage(registry.topics, registry.entities, relations)
    assert lineage.sources(Column("counted", "v")) == {}
    (genre,) = [one for one in lineage.fields(Column("counted", "v")) if one.name == "genre"]
    assert genre == Column("view_events", "genre", is_field=True)


def test_a_cte_may_have_the_name_of_a_relation() -> None:
    queries = {
        "one": "with view_events as (select viewer_id as v from view_events), two as (select v from view_events) "
        "select v from two",
        "two": "select v from one",
    }
    found = trace_all(queries, {"view_events": ("viewer_id",)}, {})
    assert found["two"].columns == {"v": {Column("one", "v"): {"identity"}}}
    assert found["one"].columns == {"v": {Column("view_events", "viewer_id"): {"identity"}}}


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("create table t (a int)", "not a query"),
        ("select from from", "sqlglot cannot read it"),
        ("select * from unknown", "whose columns are not known"),
        ("select nowhere from a", "nowhere, which is a column of none"),
    ],
)
def test_what_cannot_be_traced_says_why_and_stops_nothing(query: str, reason: str) -> None:
    found = trace(query, COLUMNS)
    assert reason in found.untraced
    assert not found.columns
    lineage = Lineage({}, {}, {"odd": found})
    with pytest.raises(LineageError, match=f"the columns of odd could not be traced: .*{reason}"):
        column_of("odd.v", load_registry(EXAMPLE), lineage)


def test_what_sqlglot_stumbles_over_stops_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(tree: object) -> None:
        raise KeyError("lateral")

    monkeypatch.setattr(trace_module, "build_scope", stumble)
    assert trace("select x from a", COLUMNS).untraced == "sqlglot cannot read it: KeyError: 'lateral'"


def test_a_stale_or_missing_lineage_is_refused(courses_copy: Copy) -> None:
    generate_files(courses_copy.folder, courses_copy.compiled)
    registry, file = check_current(courses_copy.folder), courses_copy.folder / LINEAGE
    assert load_lineage(courses_copy.folder, registry).relations
    content = json.loads(file.read_text())
    for changed, message in (
        ({"files": "0"}, "stale: it was made from other files than"),
        ({"format": 0}, "format 0, and this version reads"),
        ({"relations": {"r": {"rows": {"a.b": "guess"}, "columns": {}}}}, "unknown kind guess"),
    ):
        file.write_text(json.dumps(content | changed))
        with pytest.raises(LineageError, match=message):
            load_lineage(courses_copy.folder, registry)
        with pytest.raises(StaleRegistry, match="run `prefs generate`"):
            check_current(courses_copy.folder)
    file.write_text("{")
    with pytest.raises(LineageError, match="it is not JSON"):
        load_lineage(courses_copy.folder, registry)
    file.unlink()
    with pytest.raises(LineageError, match="is missing: run `prefs generate`"):
        load_lineage(courses_copy.folder, registry)
    with pytest.raises(StaleRegistry, match="run `prefs generate`"):
        check_current(courses_copy.folder)
    generate_files(courses_copy.folder, courses_copy.compiled)
    assert json.loads(file.read_text()) == content


def test_the_docs_of_a_sink_say_where_each_attribute_comes_from(courses_copy: Copy) -> None:
    file = courses_copy.folder / "models/generated/sinks/sink_learning_progress.yml"
    assert "Minutes spent in the 28-day window. Made from lesson_events.seconds;" in file.read_text()
    # As if the view had been changed by hand: docs and lineage follow the compiled SQL, and dbt's own hashes them.
    queries = courses_copy.compiled(courses_copy.folder, ())
    queries["learner_lessons_1d"] = queries["learner_lessons_1d"].replace("sum(seconds)", "count(lesson_id)")
    courses_copy.change("models/learner_lessons_1d.sql", "sum(seconds)", "count(lesson_id)")
    changed = generate_files(courses_copy.folder, lambda folder, relations: queries)
    assert "models/generated/sinks/sink_learning_progress.yml" in changed
    assert changed[-3:] == ["generated/declared.sql", LINEAGE, "registry.json"]
    assert "28-day window. Made from lesson_events.lesson_id;" in file.read_text()
    check_current(courses_copy.folder)


# Values that a field may have, by type, besides those that the declaration accepts.
def some_value(random_: random.Random, kind: str, accepted: tuple[str, ...]) -> Any:
    if accepted:
        return random_.choice(accepted)
    return {
        "text": lambda: random_.choice([None, *(f"{number:02}" for number in range(20))]),
        "int": lambda: random_.randrange(0, 5000),
        "bigint": lambda: random_.randrange(0, 5000),
        "decimal": lambda: random_.choice([0, 0.1, 0.5, 0.9, 1, 30, 120, 900]),
        "boolean": lambda: random_.choice([True, False]),
    }[kind]()


def typed_events(registry: Registry, topic: str, random_: random.Random) -> list[dict[str, Any]]:
    """Events as a typed relation holds them: three entities over ten days, the newest today."""
    declared = registry.topic(topic)
    key = registry.entity(declared.entity).key if declared.entity else None
    now = datetime.now(UTC).replace(microsecond=0)
    events = []
    for number in range(60):
        row = {
            one.name: some_value(random_, one.type, one.accepted)
            for one in declared.fields
            if one.type != "timestamptz"
        }
        row[declared.identity] = f"e{number}"
        if key:
            row[key.name] = number % 3 if key.type == "bigint" else f"somebody {number % 3}"
        if declared.time:
            row[declared.time] = now - timedelta(hours=4 * number)
        events.append(row)
    return events


class Views:
    """The registry's queries as plain views over temporary tables of typed events."""

    def __init__(self, connection: psycopg.Connection[Any], registry: Registry) -> None:
        self.connection, self.registry = connection, registry
        types = {"text": "text", "int": "int", "decimal": "numeric"}
        for topic in registry.topics.values():
            columns = [
                sql.SQL("{} {}").format(sql.Identifier(one.name), sql.SQL(types.get(one.type, one.type)))
                for one in topic.fields
            ]
            connection.execute(
                sql.SQL("create temp table {} ({})").format(
                    sql.Identifier(topic.relation), sql.SQL(", ").join(columns)
                )
            )
        for relation in [*registry.tiles, *(one for one in registry.queries if one not in registry.tiles)]:
            query = registry.queries[relation]
            connection.execute(f'create temp view "{relation}" as {query}'.encode())

    def load(self, topic: str, events: list[dict[str, Any]]) -> None:
        declared = self.registry.topic(topic)
        table, names = sql.Identifier(declared.relation), list(declared.by_name)
        self.connection.execute(sql.SQL("truncate {}").format(table))
        statement = sql.SQL("insert into {} ({}) values ({})").format(
            table,
            sql.SQL(", ").join(map(sql.Identifier, names)),
            sql.SQL(", ").join([sql.Placeholder()] * len(names)),
        )
        with self.connection.cursor() as cursor:
            cursor.executemany(statement, [[row[name] for name in names] for row in events])

    def values(self) -> dict[Column, list[str]]:
        """Every column's values, as a sorted list: which row has which is part of other columns."""
        found = {}
        for relation in self.registry.queries:
            cursor = self.connection.execute(sql.SQL("select * from {}").format(sql.Identifier(relation)))
            names = [one.name for one in cursor.description or ()]
            columns: Iterator[Any] = zip(*cursor.fetchall(), strict=True)
            for name, values in zip(names, columns, strict=True):
                found[Column(relation, name)] = sorted(map(repr, values))
        return found


@PROJECTS
def test_changing_a_field_changes_only_what_comes_from_it(
    project: Path, database: EngineConfiguration
) -> None:
    registry, lineage = lineage_of(project)
    random_ = random.Random(19)
    moved: set[tuple[Column, Column]] = set()
    with database.connect() as connection:
        views = Views(connection, registry)
        events = {name: typed_events(registry, name, random_) for name in registry.topics}
        for name, rows in events.items():
            views.load(name, rows)
        before = views.values()
        assert all(before.values())
        for name, rows in events.items():
            topic = registry.topic(name)
            key = registry.entity(topic.entity).key.name if topic.entity else ""
            free = [one for one in topic.fields if one.name not in (topic.identity, topic.time, key)]
            # Several times, because a count may happen to stay the same.
            for one in free * 3:
                changed = [
                    row | {one.name: some_value(random_, one.type, one.accepted)} if number % 2 else row
                    for number, row in enumerate(rows)
                ]
                views.load(name, changed)
                field = Column(name, one.name, is_field=True)
                for column, values in views.values().items():
                    if values != before[column]:
                        moved.add((column, field))
                        assert field in lineage.fields(column), f"{field} changes {column}"
            views.load(name, rows)
    # Not because nothing ever changes: what a value is made from or chosen by does change it.
    for column in before:
        for field in decisive(lineage.fields(column)):
            topic = registry.topic(field.of)
            key = registry.entity(topic.entity).key.name if topic.entity else ""
            if lineage.fields(column)[field] - ROWS and field.name not in (topic.identity, topic.time, key):
                assert (column, field) in moved, f"{field} should change {column}"
