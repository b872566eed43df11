"""A learner of the foreign project is erased everywhere: messages, views, DynamoDB, Iceberg, training sets."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from declared import COURSES
from foreign import REGISTRY, TODAY, School, lesson

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.dynamodb.store import domain_stores
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.erasure.erase import ErasureReport, Stores, erase
from dagster_prefs.erasure.events import REDACTED, Subject, SubjectRefused
from dagster_prefs.erasure.export import SubjectExport, export_subject
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days
from dagster_prefs.iceberg.tables import tile_tables
from dagster_prefs.training.training_set import LabelJoin, build_training_set
from dagster_prefs.training.windows import choose_features

(SPEC,) = tile_tables(REGISTRY).values()
NOW = datetime.now(UTC)
# Other learners than the erased 007, although a number or a part of them is the same.
LEARNERS = ("007", "7", "0070", "a/007")


def test_a_learner_is_erased_and_nobody_else(
    engine: EngineConfiguration, aws_endpoint: str, tmp_path: Path
) -> None:
    school = School(engine, Dbt(engine, COURSES, tmp_path / "target", {}))
    school.send(lesson(learner, days) for learner in LEARNERS for days in (1, 3))
    school.send(
        [
            # Rejected, and about the learner all the same.
            b'{"event_id": "odd", "learner_id": "007", "event_type": "slept"}',
            b'{"event_id": "loose", "learner": {"id": "007"}}',
            b'{"event_id": "number", "learner_id": 7, "event_type": "slept"}',
        ]
    )
    school.refresh()
    client = dynamodb_client(aws_endpoint, "eu-central-1")
    table = provision(client, REGISTRY.contract)["learner"]
    (store,) = domain_stores(engine, client, REGISTRY.contract, {"learner": table})
    publish_domain(store)
    catalog = open_catalog("sqlite", (tmp_path / "lake").as_uri())
    for day in stale_days(engine, SPEC, exported_days(catalog, SPEC), until=TODAY):
        assert export_day(engine, catalog, SPEC, day).status == "written"
    labels = pa.table({"learner_id": LEARNERS, "label_time": pa.array([NOW] * 4, pa.timestamp("us", "UTC"))})
    (tmp_path / "sets").mkdir()
    pq.write_table(labels, tmp_path / "sets" / "labels.parquet")
    catalog.create_namespace("ml")
    build_training_set(
        catalog,
        LabelJoin(
            str(tmp_path / "sets" / "labels.parquet"),
            choose_features(REGISTRY, None),
            NOW + timedelta(days=1),
        ),
        "ml.set",
        manifest=tmp_path / "set.json",
    )

    def learners(name: str) -> list[str]:
        return sorted(catalog.load_table(name).scan().to_arrow()["learner_id"].to_pylist())

    def items() -> list[str]:
        found = client.scan(TableName=table.name, ConsistentRead=True)["Items"]
        return sorted(item["learner_id"]["S"] for item in found)

    stores = Stores(
        engine=engine,
        registry=REGISTRY,
        catalog=lambda: catalog,
        dynamodb=lambda: client,
        table_prefix="",
        refresh=school.refresh,
    )
    subject, folders = Subject.named(REGISTRY, "learner", " 007 "), [tmp_path / "sets"]

    def erased() -> ErasureReport:
        return erase(stores, subject, now=datetime.now(UTC), training_sets=folders)

    def exported() -> SubjectExport:
        return export_subject(stores, subject, now=datetime.now(UTC), training_sets=folders)

    everybody, others = sorted(LEARNERS), sorted(LEARNERS[1:])
    assert (items(), learners("ml.set")) == (everybody, everybody)
    pa.csv.write_csv(labels, tmp_path / "sets" / "labels.csv")
    export = exported()
    (tmp_path / "sets" / "labels.csv").unlink()
    assert export.counts == {
        "messages": {"raw_lesson_events": 4},
        "rows": {
            "learner_lessons_1d": 2,
            "learner_progress_rolling": 1,
            "lesson_events": 2,
            # Rejected for its type, with a valid id.
            "lesson_events_parsed": 3,
            # On the embedded engine what a sink reads is a view.
            "sink_learning_progress": 1,
        },
        "items": {"learner_profiles": 1},
        "training": {"training.learner_lessons_daily": 2, "ml.set": 1},
        "served_log": {},
        "training_earlier": {},
        "labels": {str(tmp_path / "sets" / f"labels.{kind}"): 1 for kind in ("csv", "parquet")},
    }
    (item,) = export.as_dict()["items"]["learner_profiles"]
    assert (item["learner_id"], item["domain_key"], item["lessons_7d"]) == ("007", "learning#progress", 2)
    report = erased()
    assert report.held
    assert report.subject.kind == "learner"
    held = {(one.store, one.place, one.unit): (one.before, one.after) for one in report.holdings}
    assert held["engine", "raw_lesson_events", "messages"] == (4, 0)
    assert held["engine", "lesson_events", "rows"] == (2, 0)
    assert held["dynamodb", "learner_profiles", "items"] == (1, 0)
    assert held["iceberg", "training.learner_lessons_daily", "rows"] == (2, 0)
    assert held["iceberg", "ml.set", "rows"] == (1, 0)
    assert {after for _, after in held.values()} == {0}
    assert report.training_sets == [str(tmp_path / "sets" / "labels.parquet")]
    assert items() == others
    assert learners("training.learner_lessons_daily") == sorted(2 * others)
    assert learners("ml.set") == others
    assert school.execute("select distinct learner_id from learner_progress_rolling order by 1") == [
        (learner,) for learner in others
    ]
    kept = [bytes(data) for (data,) in school.execute("select data from raw_lesson_events")]
    assert kept.count(REDACTED) == 4
    assert not any(b'"007"' in data for data in kept)
    assert school.execute("select subject_kind, subject_id from erased_subjects") == [("learner", "007")]
    # A replay of an old event brings nothing back, and running it again finds nothing.
    school.send([lesson("007", 3)])
    school.refresh()
    assert school.execute("select count(*) from lesson_events where learner_id = '007'") == [(0,)]
    again = erased()
    assert (again.first_erased, again.newer_events) == (False, 0)
    assert learners("training.learner_lessons_daily") == sorted(2 * others)
    # What only the history of a table holds is stored all the same.
    others_set = catalog.load_table("ml.set")
    row = others_set.scan().to_arrow().slice(0, 1)
    place = row.schema.get_field_index("learner_id")
    others_set.append(
        row.set_column(place, row.schema.field(place), pa.array(["007"], row.schema.field(place).type))
    )
    catalog.load_table("ml.set").delete("learner_id = '007'")
    export = exported()
    assert export.erased_at is not None
    assert (export.training["ml.set"], [row["learner_id"] for row in export.earlier["ml.set"]]) == (
        [],
        ["007"],
    )
    assert not any(export.messages.values())


@pytest.mark.parametrize(
    ("kind", "given", "rule"),
    [
        ("viewer", "1", r"'viewer' is not an entity of this project: use `prefs erase learner ID`"),
        (
            "learner",
            "canary:prefs",
            "learner canary:prefs is a canary: ids from canary: on belong to no person",
        ),
        ("learner", " ", "is not a learner .*must be a text of 1 to 2,048 bytes"),
    ],
)
def test_what_is_no_learner_is_refused(kind: str, given: str, rule: str) -> None:
    with pytest.raises(SubjectRefused, match=rule):
        Subject.named(REGISTRY, kind, given)


def test_who_is_not_erasable_is_refused(courses: Registry) -> None:
    entity = dataclasses.replace(courses.entity("learner"), erasable=False)
    kept = dataclasses.replace(courses, entities={"learner": entity})
    with pytest.raises(SubjectRefused, match="is not erasable: the project declares no erasable entity"):
        Subject.named(kept, "learner", "7")
