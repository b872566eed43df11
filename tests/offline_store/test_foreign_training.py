"""Tiles of a project with other events and a text key: exported, trained on, and compared with what is served."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from declared import COURSES
from foreign import REGISTRY, TODAY, School, days_ago, lesson
from pyiceberg.catalog import Catalog

from dagster_prefs.declarations.registry import Key
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days
from dagster_prefs.iceberg.tables import tile_tables
from dagster_prefs.iceberg.tiles import TilesUnreadable
from dagster_prefs.training.labels import LabelsRefused, read_labels
from dagster_prefs.training.parity import ParityOptions, ParityReport, check_parity
from dagster_prefs.training.training_set import (
    LabelJoin,
    build_training_set,
    print_training_sql,
    reproduce_training_set,
)
from dagster_prefs.training.windows import choose_features

(SPEC,) = tile_tables(REGISTRY).values()
FEATURES = choose_features(REGISTRY, None)
NOW = datetime.now(UTC)
# 007 is another learner than 7, and a text may hold what a line of text cannot.
LEARNERS = ("7", "007", "a\tb\\n", "Ada Lovelace", "日本")


@pytest.fixture(scope="module")
def taught(
    embedded_server: EngineConfiguration,
    copied_database: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[School]:
    """The school that every test gets a copy of; its target holds the parsed project."""
    with copied_database("taught", embedded_server.with_database("template1")) as engine:
        made = School(engine, Dbt(engine, COURSES, tmp_path_factory.mktemp("target"), {}))
        made.send(
            lesson(learner, days, kind, 30 * place + days, subject)
            for place, learner in enumerate(LEARNERS, 1)
            for days in (0, 1, 7, 8, 28, 29)
            for kind, subject in (("started", "maths"), ("finished", f"subject {place}"))
        )
        made.refresh()
        yield made


@pytest.fixture
def school(taught: School, copied_database: Callable[..., Any]) -> Iterator[School]:
    with copied_database("school", taught.engine) as engine:
        yield School(engine, Dbt(engine, COURSES, taught.dbt.target_dir, {}), made=True)


def export(school: School, catalog: Catalog) -> list[str]:
    days = stale_days(school.engine, SPEC, exported_days(catalog, SPEC), until=TODAY)
    return [export_day(school.engine, catalog, SPEC, day).status for day in days]


def labels(folder: Path, rows: Sequence[tuple[str, int]]) -> str:
    """Labels at the beginning of a day, so many days ago: those of today are never in the future."""
    at = [datetime.combine(days_ago(days), datetime.min.time(), UTC) for _, days in rows]
    path = folder / "labels.parquet"
    table = {
        "learner_id": [learner for learner, _ in rows],
        "label_time": pa.array(at, pa.timestamp("us", "UTC")),
    }
    pq.write_table(pa.table(table), path)
    return str(path)


def test_its_tiles_are_exported_with_their_text_keys(school: School, catalog: Catalog) -> None:
    assert export(school, catalog) == ["written"] * 5
    assert export(school, catalog) == []
    rows = catalog.load_table(SPEC.identifier("training")).scan().to_arrow().to_pylist()
    assert {row["learner_id"] for row in rows} == set(LEARNERS)
    assert len(rows) == 5 * len(LEARNERS)
    assert {(row["lessons"], row["finishes"]) for row in rows} == {(1, 1)}
    # A late event brings back its own day alone.
    school.send([lesson("7", 8, "bookmarked", 5, "maths")])
    school.refresh()
    assert list(stale_days(school.engine, SPEC, exported_days(catalog, SPEC), until=TODAY)) == [days_ago(8)]


def test_canaries_and_erased_learners_are_never_exported(school: School, catalog: Catalog) -> None:
    day = days_ago(1)
    # As tables, so that a test can say what the engine holds.
    school.execute(
        "create table held as select * from learner_lessons_1d union all select 'canary:prefs', lesson_date, lessons,"
        " seconds, finishes, last_event_at from learner_lessons_1d where learner_id = '7'"
    )
    school.execute("create table counted as select * from tile_fingerprints")
    for kept in ("learner_lessons_1d", "tile_fingerprints"):
        school.execute(f"drop view if exists {kept}__query cascade")
        school.execute(f"drop table {kept} cascade")
    school.execute("alter table held rename to learner_lessons_1d")
    school.execute("alter table counted rename to tile_fingerprints")
    assert export_day(school.engine, catalog, SPEC, day).status == "written"
    found = catalog.load_table(SPEC.identifier("training")).scan().to_arrow()["learner_id"].to_pylist()
    assert sorted(found) == sorted(LEARNERS)
    erased = "insert into erased_subjects (subject_kind, subject_id, erased_at) values (%s, '007', now())"
    school.execute(erased, ["teacher"])
    school.execute("update tile_fingerprints set content_hash = 2")
    assert export_day(school.engine, catalog, SPEC, day).status == "written"
    school.execute(erased, ["learner"])
    school.execute("update tile_fingerprints set content_hash = 3")
    with pytest.raises(TilesUnreadable, match=r"still has 1 rows of erased subjects"):
        export_day(school.engine, catalog, SPEC, day)
    # A fingerprint that counts a canary describes something else than what is exported.
    school.execute("delete from erased_subjects")
    school.execute("update learner_lessons_1d set learner_id = 'canary:7' where learner_id = '7'")
    with pytest.raises(TilesUnreadable, match="does not describe"):
        export_day(school.engine, catalog, SPEC, day)


def test_labels_get_what_was_known_the_day_before(school: School, catalog: Catalog, tmp_path: Path) -> None:
    export(school, catalog)
    given = [("7", 0), ("007", 0), ("7", 7), ("nobody", 0), ("日本", 21)]
    source = labels(tmp_path, given)
    made = build_training_set(catalog, LabelJoin(source, FEATURES, NOW), tmp_path / "set.parquet")
    table = pq.read_table(tmp_path / "set.parquet")
    assert table.column_names == ["learner_id", "label_time", "lessons_7d", "minutes_28d"]

    def due(learner: str, label: int) -> tuple[int, Decimal]:
        """Counted from the events: the tiles of the days before the label's, within its windows."""
        if learner not in LEARNERS:
            return 0, Decimal(0)
        place = LEARNERS.index(learner) + 1
        before = [days for days in (0, 1, 7, 8, 28, 29) if days > label]
        seconds = sum(2 * (30 * place + days) for days in before if days <= label + 28)
        lessons = sum(days <= label + 7 for days in before)
        return lessons, (Decimal(seconds) / 60).quantize(Decimal("0.000001"))

    rows = list(zip(*(table[name].to_pylist() for name in ("lessons_7d", "minutes_28d")), strict=True))
    assert rows == [due(*label) for label in given]
    assert (made.rows, made.cold_start_rows) == (5, 1)
    known = json.loads(made.manifest.read_text())
    assert known["entity"] == "learner"
    left_out = {"progress.favorite_subjects": "it is computed from lesson_events, which is not exported"}
    assert known["output"]["left_out"] == left_out
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert again.content_hash == made.content_hash


@pytest.mark.parametrize("dialect", ["trino", "spark", "athena"])
def test_the_join_of_other_engines_has_its_key(catalog: Catalog, tmp_path: Path, dialect: Any) -> None:
    catalog.create_namespace("ml")
    table = pq.read_table(labels(tmp_path, [("7", 0)]))
    catalog.create_table("ml.labels", table.schema).append(table)
    text = print_training_sql(catalog, "ml.labels", dialect, features=FEATURES)
    assert "viewer" not in text
    assert "t.learner_id = p.learner_id" in text
    assert text.count("learner_lessons_daily") == 2


def test_its_labels_are_held_to_its_key(catalog: Catalog, tmp_path: Path) -> None:
    def refused(rows: Any, message: str, key: Any = FEATURES) -> None:
        table = pa.table(
            {"learner_id": rows, "label_time": pa.array([NOW] * len(rows), pa.timestamp("us", "UTC"))}
        )
        pq.write_table(table, tmp_path / "bad.parquet")
        with pytest.raises(LabelsRefused, match=message):
            read_labels(catalog, str(tmp_path / "bad.parquet"), features=key, now=NOW + timedelta(days=1))

    refused(
        ["7", "canary:prefs"], r"row 2: learner ids from canary: on are canaries and have no training data"
    )
    refused(["7", " "], "row 2: learner_id is missing: fill it")
    refused([1.5], "learner_id must be a text, not double")
    refused(["a\x00b"], "row 1: learner_id must be a text of 1 to 2,048 bytes without NUL")
    pq.write_table(
        pa.table(
            {"learner_id": [" 7 ", "007"], "label_time": pa.array([NOW] * 2, pa.timestamp("us", "UTC"))}
        ),
        tmp_path / "labels.parquet",
    )
    found = read_labels(catalog, str(tmp_path / "labels.parquet"), features=FEATURES, now=NOW)
    assert found["learner_id"].to_pylist() == ["7", "007"]
    # The same project with a UUID for its key.
    entity = dataclasses.replace(REGISTRY.entity("learner"), keys=(Key("learner_id", "uuid"),))
    by_uuid = choose_features(dataclasses.replace(REGISTRY, entities={"learner": entity}), None)
    refused(["7"], "row 1: learner_id must be a UUID like", by_uuid)
    refused(
        ["00000000-0000-0000-0000-000000000000"], "learner ids from 00000000-0000-0000-0000- on are", by_uuid
    )
    upper = "0190163D-8694-739B-AEA5-966C26F8AD91"
    pq.write_table(
        pa.table({"learner_id": [upper], "label_time": pa.array([NOW], pa.timestamp("us", "UTC"))}),
        tmp_path / "labels.parquet",
    )
    found = read_labels(catalog, str(tmp_path / "labels.parquet"), features=by_uuid, now=NOW)
    assert found["learner_id"].to_pylist() == [upper.lower()]


def served(school: School, now: datetime, spread: int) -> dict[Any, Any]:
    """What the rolling view says at a moment, with the spread of a text key as the macro `expiry_spread` has it."""
    row_hash = "('x' || left(md5(learner_id), 15))::bit(60)::bigint"
    query = REGISTRY.query("learner_progress_rolling")
    query = query.replace(" > now()", f" + ({row_hash} % {spread}) * interval '1 second' > now()")
    query = query.replace("now()", f"'{now.isoformat()}'::timestamptz")
    rows = school.execute(
        f"select learner_id, lessons_7d, minutes_28d, favorite_subjects, last_event_at from ({query}) as view"
    )
    names = ("lessons_7d", "minutes_28d", "favorite_subjects", "last_event_at")
    return {learner: {"progress": dict(zip(names, values, strict=True))} for learner, *values in rows}


@pytest.mark.parametrize("spread", [1, 3600, 86_400])
def test_what_is_served_equals_what_its_tables_say(school: School, catalog: Catalog, spread: int) -> None:
    export(school, catalog)
    now = datetime.combine(TODAY, datetime.min.time(), UTC) + timedelta(hours=1)
    items = served(school, now, spread)
    assert set(items) == set(LEARNERS)

    def check(items: dict[Any, Any]) -> ParityReport:
        return check_parity(
            school.engine,
            catalog,
            lambda learners: {learner: items[learner] for learner in learners if learner in items},
            features=FEATURES,
            now=now,
            options=ParityOptions(1.0, spread, grace_seconds=0),
        )

    report = check(items)
    assert report.worst == ()
    assert report.passed
    assert report.subjects == len(LEARNERS)
    assert list(report.left_out) == ["progress.favorite_subjects"]
    items["007"]["progress"]["lessons_7d"] += 1
    del items["日本"]
    report = check(items)
    assert not report.passed
    assert report.missing == {"progress": 1}
    assert [(one.subject, one.attribute) for one in report.worst if one.attribute == "lessons_7d"] == [
        ("007", "lessons_7d")
    ]
