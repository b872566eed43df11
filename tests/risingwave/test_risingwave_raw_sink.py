"""Raw messages that a real RisingWave appends to the lake by its own sink: complete, once, and erased on demand."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from declared import COURSES
from offline_store.rest_catalog import rest_server
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Table
from risingwave_server import NO_SERVER, URL, database, engine_settings, rows, until

from dagster_prefs.declarations.names import REDACTED
from dagster_prefs.engine.connection import EngineUnavailable
from dagster_prefs.erasure.erase import ErasureIncomplete, Stores, erase
from dagster_prefs.erasure.events import Subject
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.iceberg.event_export import EventsReport
from dagster_prefs.iceberg.event_reader import all_events
from dagster_prefs.iceberg.event_sink import hours_of
from dagster_prefs.iceberg.event_tables import event_tables
from dagster_prefs.iceberg.files import live_files
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)

TOPIC, SINK = "lesson_events", "sink_raw_lesson_events"
GONE = "learner-who-is-gone"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PREFS_ICEBERG_CREDENTIAL")
COLUMNS = ("source", "source_partition", "source_offset", "data", "arrived_at", "rejected", "learner_id")


@dataclass
class World:
    """The foreign project on a database of its own, with a REST catalog, and the sink's statement."""

    platform: Platform
    kafka_topic: str
    statement: str
    sent: dict[bytes, str | None] = field(default_factory=dict)

    def lesson(self, learner: str, *, framed: bool = False) -> bytes:
        """Make the body of a valid message, which tells itself apart from all others."""
        at = datetime.now(UTC) - timedelta(hours=len(self.sent) % 50)
        body = json.dumps(
            {
                "event_id": uuid.uuid4().hex, "learner_id": learner, "event_type": "started", "seconds": 7,
                "happened_at": at.isoformat(),
            }
        ).encode()  # fmt: skip
        body = b"\x00\x00\x00\x00\x07" + body if framed else body
        self.sent[body] = learner
        return body

    def broken(self, text: str) -> bytes:
        body = f"{text} {uuid.uuid4().hex}".encode() + b"\xff"
        self.sent[body] = None
        return body

    def by_kafka(self, *bodies: bytes) -> None:
        producer: Any = Producer({"bootstrap.servers": os.environ["PREFS_KAFKA_BOOTSTRAP"]})
        for body in bodies:
            producer.produce(self.kafka_topic, body)
        assert producer.flush(30) == 0

    def insert(self, first: int, *bodies: bytes) -> None:
        topic = self.platform.registry.topics[TOPIC]
        with RawStore(self.platform.engine) as store:
            messages = [RawMessage(0, place, body) for place, body in enumerate(bodies, first)]
            store.write(topic, "file:lessons#1", messages)

    @property
    def table(self) -> Table:
        spec = event_tables(self.platform.registry)[TOPIC].raw
        return self.platform.catalog().load_table(spec.identifier(self.platform.settings.iceberg_namespace))

    def in_lake(self) -> list[tuple[Any, ...]]:
        """What the reader of a rebuild gets."""
        spec = event_tables(self.platform.registry)[TOPIC].raw
        namespace = self.platform.settings.iceberg_namespace
        read = all_events(self.platform.catalog(), spec, COLUMNS, namespace=namespace)
        return sorted(tuple(row.values()) for batch in read for row in batch.to_pylist())

    def in_engine(self) -> list[tuple[Any, ...]]:
        return sorted(
            rows(
                self.platform.engine,
                "select source, source_partition, source_offset, data, arrived_at from raw_lesson_events",
            )
        )

    def export(self) -> EventsReport:
        for _ in range(4):
            # A slow server that others use does not answer in time.
            with suppress(EngineUnavailable):
                (report,) = self.platform.export_events([TOPIC])
                break
        else:
            (report,) = self.platform.export_events([TOPIC])
        assert (report.failed, report.lost) == ({}, 0)
        return report

    def completed(self) -> EventsReport:
        """Export until nothing waits for the sink."""
        seen: list[EventsReport] = []

        def complete() -> bool:
            seen.append(self.export())
            return not seen[-1].waiting

        until(complete, lambda: seen[-1])
        return seen[-1]

    def create(self) -> None:
        with self.platform.engine.connect() as connection:
            connection.execute(self.statement)

    def drop(self) -> None:
        with self.platform.engine.connect() as connection:
            connection.execute(f"drop sink if exists {SINK}")


@pytest.fixture(scope="module")
def world(
    shell_environment: Mapping[str, str], services: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    brokers = shell_environment.get("PREFS_KAFKA_BOOTSTRAP")
    if not brokers:
        pytest.skip("PREFS_KAFKA_BOOTSTRAP names no brokers")
    endpoint = f"http://127.0.0.1:{services.aws_port}"
    folder = tmp_path_factory.mktemp("lake")
    with ExitStack() as stack:
        engine = stack.enter_context(database())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        topic = f"{engine.database}_lessons"
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "eu-central-1",
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_ENDPOINT_URL": endpoint,
            "PREFS_PROJECT_DIR": str(COURSES),
            **engine_settings(engine),
            "PREFS_PUBLISH": "changefeed",
            "PREFS_TABLE_PREFIX": f"{engine.database}_",
            "PREFS_KAFKA_BOOTSTRAP": brokers,
            "PREFS_KAFKA_TOPIC_LESSON_EVENTS": topic,
            "PREFS_DATA_DIR": str(tmp_path_factory.mktemp("state")),
            "PREFS_RAW_RETENTION_SECONDS": "7200",
        }.items():
            patch.setenv(name, value)
        bucket = engine.database.replace("_", "-")
        boto3.client("s3", endpoint_url=endpoint).create_bucket(
            Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
        )
        behind = SqlCatalog(
            "lake",
            uri=f"sqlite:///{folder / 'lake.db'}",
            warehouse=f"s3://{bucket}/warehouse",
            **{"s3.endpoint": endpoint, "s3.region": "eu-central-1"},
        )
        rest = stack.enter_context(rest_server(behind, "prefs:open sesame"))
        admin: Any = AdminClient({"bootstrap.servers": brokers})
        admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
        stack.callback(lambda: admin.delete_topics([topic])[topic].result(30))
        # Without the sinks, because few builds have the Java libraries of the catalog that the models name.
        Platform(load_settings()).apply()
        for name, value in {
            "PREFS_EXPORT": "sink",
            "PREFS_ICEBERG_CATALOG": "rest",
            "PREFS_ICEBERG_URI": rest.uri,
            "PREFS_ICEBERG_CREDENTIAL": "prefs:open sesame",
            "PREFS_ICEBERG_WAREHOUSE": f"s3://{bucket}/warehouse",
        }.items():
            patch.setenv(name, value)
        platform = Platform(load_settings())
        platform.provision(platform.dynamodb())
        platform.prepare_training_tables()
        statement = platform.dbt.compiled([SINK])[SINK]
        for given, wanted in {
            "catalog.type = 'rest'": "catalog.type = 'rest_rust'",
            "commit_checkpoint_interval = '60'": "commit_checkpoint_interval = '2'",
            **{f"${{{name}}}": os.environ[name] for name in CREDENTIALS},
        }.items():
            assert given in statement
            statement = statement.replace(given, wanted)
        made = World(platform, topic, statement)
        try:
            yield made
        finally:
            made.drop()
            with engine.connect() as connection:
                connection.execute("drop sink if exists kafka_lesson_events_feed")
                connection.execute("drop source if exists kafka_lesson_events")


def test_the_sink_writes_what_the_engine_has_and_the_export_says_when(world: World) -> None:
    # Some before the sink is made, which it writes too; the rest after.
    world.insert(0, *(world.lesson(f"l{n % 3}") for n in range(20)), world.broken("no JSON"))
    world.by_kafka(*(world.lesson(GONE, framed=n % 2 == 0) for n in range(4)))
    # A canary of another deployment, whose verdict a sink could not take back.
    canary = {
        "event_id": f"canary:{'0' * 16}:1:{'0' * 32}", "learner_id": "canary:prefs", "event_type": "started",
        "happened_at": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    body = json.dumps(canary).encode()
    world.sent[body] = "canary:prefs"
    world.insert(30, body)
    until(lambda: len(world.in_engine()) == len(world.sent), world.in_engine)
    before = world.export()
    assert (before.waiting, before.complete_until is not None) == (len(world.sent), True)
    assert before.complete_until < min(row[4] for row in world.in_engine())
    world.create()
    world.by_kafka(*(world.lesson(f"l{n}") for n in range(10)), world.broken(f"learner_id={GONE}"))
    until(lambda: len(world.in_engine()) == len(world.sent), world.in_engine)
    report = world.completed()
    assert (report.repeated, report.raw_rows) == (0, 0)
    found = world.in_lake()
    assert [row[:5] for row in found] == world.in_engine()
    assert {row[3]: row[6] for row in found} == world.sent
    assert {row[3] for row in found if row[5]} == {
        message for message, learner in world.sent.items() if learner in (None, "canary:prefs")
    }
    days = {str(file.file.partition) for file in world.table.scan().plan_files()}
    assert len(days) >= 2, "valid and rejected messages have partitions of their own"
    # The files tell the arrivals in them, so that an export reads no others.
    assert all(len(hours_of(world.table, file)) <= 2 for file in live_files(world.table))
    # An hour later nothing is missing; now the newest minute is not, as barriers may be late.
    assert report.complete_until is not None
    world.by_kafka(world.lesson("l1"))
    until(lambda: len(world.in_engine()) == len(world.sent), world.in_engine)
    assert world.completed().complete_until >= report.complete_until


def test_an_erased_learner_leaves_the_lake_while_the_sink_writes(world: World) -> None:
    settings = world.platform.settings
    stores = Stores(
        world.platform.engine, world.platform.registry, world.platform.catalog, world.platform.dynamodb,
        settings.table_prefix, lambda: None, settings.iceberg_namespace, True, None, settings.raw_by_sink,
        timedelta(seconds=settings.raw_retention_seconds or 0),
    )  # fmt: skip
    # RisingWave changes no row of a table that deletes by age; the lake is erased nevertheless.
    with pytest.raises(
        ErasureIncomplete, match=r"raw_lesson_events.* leave by themselves until \d+-\d+"
    ) as failure:
        erase(stores, Subject.named(world.platform.registry, "learner", GONE), now=datetime.now(UTC))
    assert "training.raw_lesson_events" not in str(failure.value)
    mine = {body for body, learner in world.sent.items() if learner == GONE or GONE.encode() in body}
    found = world.in_lake()
    assert len(found) == len(world.sent)
    assert {row[3] for row in found} == {REDACTED, *(world.sent.keys() - mine)}
    assert [row[6] for row in found if row[3] == REDACTED] == [None] * len(mine)
    assert all(row[5] for row in found if row[3] == REDACTED)
    # A message of hers comes again: the sink writes it as it is, and the export takes its content away.
    (again,) = [body for body in mine if b"\xff" not in body][:1]
    world.by_kafka(again, world.lesson("l2"))
    until(lambda: len(world.in_engine()) == len(world.sent) + 1, world.in_engine)
    until(
        lambda: not world.completed().waiting and len(world.in_lake()) == len(world.sent) + 1, world.in_lake
    )
    found = world.in_lake()
    assert [row[:3] for row in found] == [row[:3] for row in world.in_engine()]
    assert not {row[3] for row in found} & mine
    assert len([row for row in found if row[3] == REDACTED]) == len(mine) + 1


def test_a_sink_that_is_made_again_doubles_nothing(world: World) -> None:
    before = world.in_lake()
    world.drop()
    # What arrives meanwhile is written by the next sink.
    world.by_kafka(world.lesson("l1"), world.broken("no JSON"))
    world.create()
    world.by_kafka(world.lesson("l0"))
    until(lambda: len(world.in_engine()) == len(before) + 3, world.in_engine)
    repeated = 0

    def complete() -> bool:
        nonlocal repeated
        report = world.export()
        repeated += report.repeated
        return not report.waiting and repeated == len(before)

    until(complete, lambda: (repeated, len(before)))
    after = world.in_lake()
    assert [row[:3] for row in after] == [row[:3] for row in world.in_engine()]
    # What was erased stays so, although the engine still has the bytes and wrote them a second time.
    assert set(before) <= set(after)
    snapshots = len(world.table.metadata.snapshots)
    assert world.export().repeated == 0
    assert len(world.table.metadata.snapshots) == snapshots


def test_a_rebuild_replaces_the_sink_and_the_lake_holds_each_message_once(world: World) -> None:
    platform = world.platform
    # RisingWave's client of the same catalog without Java, by which the models themselves can be deployed.
    platform.dbt._environment["PREFS_ICEBERG_CATALOG"] = "rest_rust"
    world.drop()
    for table in platform.prepare_training_tables():
        # pyiceberg, which is behind this catalog, refuses branches of an empty table; Iceberg's own server does not.
        if table.current_snapshot() is None:
            with table.transaction() as change:
                change.update_snapshot().fast_append().commit()
    platform.apply()
    world.by_kafka(*(world.lesson(f"l{n}") for n in range(3)))
    until(
        lambda: world.in_engine()[-1][3] in world.sent and len(world.in_engine()) >= len(world.sent),
        world.in_engine,
    )
    world.completed()
    before = world.in_lake()
    assert [row[:3] for row in before] == [row[:3] for row in world.in_engine()]
    platform.rebuild("all", from_lake=True)
    world.by_kafka(world.lesson("l1"), world.broken("no JSON"))
    until(lambda: len(world.in_engine()) == len(before) + 2, world.in_engine)
    repeated = 0

    def complete() -> bool:
        nonlocal repeated
        report = world.export()
        repeated += report.repeated
        return not report.waiting and repeated >= len(before)

    until(complete, lambda: (repeated, len(before)))
    after = world.in_lake()
    assert repeated == len(before)
    assert set(before) < set(after)
    assert [row[:5] for row in after] == world.in_engine()
    assert not platform.plan().changes
