"""Views of a real RisingWave made again from the lake, after its raw messages have left by age."""

from __future__ import annotations

import itertools
import json
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from declared import COURSES
from risingwave_server import NO_SERVER, URL, database, engine_settings, rows, until

from dagster_prefs.deploy.apply import ApplyError
from dagster_prefs.engine.connection import EngineUnavailable
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.iceberg.event_reader import Selection, read_events
from dagster_prefs.iceberg.event_tables import event_tables
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

T = TypeVar("T")

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)

TOPIC, RAW, PARSED, TILE = "lesson_events", "raw_lesson_events", "lesson_events_parsed", "learner_lessons_1d"
VIEWS = {TOPIC, PARSED, TILE, "learner_progress_rolling", "rejected_events", "ingest_progress"}
# As long as the first messages need to be exported on a slow server, and then as long as a rebuild takes there.
RETENTION_SECONDS, LONGER = 120, 7200


def patiently(call: Callable[[], T]) -> T:
    """Call again while a slow server that builds views does not answer in time."""
    for _ in range(5):
        with suppress(EngineUnavailable):
            return call()
    return call()


@dataclass
class World:
    """The foreign project on a database of its own, with what was sent to it."""

    platform: Platform
    brokers: str
    kafka_topic: str
    sent: list[bytes] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    at_once: threading.Lock = field(default_factory=threading.Lock)

    def lesson(self, number: int) -> bytes:
        """The body of a message: every seventh comes again, every eleventh is invalid."""
        if number % 11 == 10:
            return b"no JSON %d" % number
        at = datetime.now(UTC).replace(microsecond=0) - timedelta(days=number % 3)
        return json.dumps(
            {
                "event_id": f"e{number - number % 7 if number % 7 == 1 else number}",
                "learner_id": f"l{number % 5}", "event_type": ("started", "finished")[number % 2],
                "subject": ("maths", None)[number % 2], "seconds": number, "happened_at": at.isoformat(),
            }
        ).encode()  # fmt: skip

    def send(self, count: int) -> None:
        """Send messages, half of them by Kafka and half by INSERT."""
        numbers = [next(self.numbers) for _ in range(count)]
        bodies = [self.lesson(number) for number in numbers]
        producer: Any = Producer({"bootstrap.servers": self.brokers})
        for body in bodies[::2]:
            producer.produce(self.kafka_topic, body)
        topic = self.platform.registry.topics[TOPIC]
        rest = [RawMessage(0, number, body) for number, body in zip(numbers[1::2], bodies[1::2], strict=True)]

        def write() -> None:
            with RawStore(self.platform.engine) as store:
                store.write(topic, "file:lessons#1", rest)

        patiently(write)
        assert producer.flush(30) == 0
        with self.at_once:
            self.sent += bodies

    def arrivals(self) -> list[dict[str, Any]]:
        """What the parsed relation has read, in the order in which it arrived."""
        names = ("source", "source_partition", "source_offset", "arrived_at")
        found = rows(
            self.platform.engine,
            f"select {', '.join(names)} from {PARSED} order by arrived_at, source, source_partition, source_offset",
        )
        return [dict(zip(names, row, strict=True)) for row in found]

    def expected(self) -> dict[str, Any]:
        """What typed events, rejected ones, tiles and the rolling view must hold, by Python alone."""
        # The place of a message tells its body: an offset of Kafka is its turn there, one of a file its number.
        with self.at_once:
            sent = list(self.sent)
        by_kafka = self.in_kafka()
        events: dict[str, dict[str, Any]] = {}
        rejected = 0
        for row in self.arrivals():
            offset = row["source_offset"]
            body = sent[offset] if row["source"].startswith("file:") else by_kafka[offset]
            try:
                event = json.loads(body)
            except ValueError:
                rejected += 1
                continue
            events.setdefault(event["event_id"], event)
        tiles: dict[tuple[str, Any], list[int]] = defaultdict(lambda: [0, 0, 0])
        for event in events.values():
            day = datetime.fromisoformat(event["happened_at"]).date()
            tile = tiles[event["learner_id"], day]
            tile[0] += event["event_type"] == "started"
            tile[1] += event["seconds"]
            tile[2] += event["event_type"] == "finished"
        minutes: dict[str, Decimal] = defaultdict(Decimal)
        for (learner, _), (_, seconds, _) in tiles.items():
            minutes[learner] += seconds
        return {
            "typed": sorted(events),
            "rejected": rejected,
            "tiles": sorted((*key, *values) for key, values in tiles.items()),
            "minutes": {learner: round(seconds / 60, 6) for learner, seconds in minutes.items()},
        }

    def in_kafka(self) -> dict[int, bytes]:
        """Offset → body of what the topic holds, read from the brokers."""
        from confluent_kafka import Consumer, TopicPartition

        consumer: Any = Consumer({"bootstrap.servers": self.brokers, "group.id": uuid.uuid4().hex})
        try:
            _, end = consumer.get_watermark_offsets(TopicPartition(self.kafka_topic, 0), timeout=30)
            consumer.assign([TopicPartition(self.kafka_topic, 0, 0)])
            found: dict[int, bytes] = {}
            while len(found) < end:
                message = consumer.poll(30)
                assert message is not None
                found[message.offset()] = message.value()
            return found
        finally:
            consumer.close()

    def found(self) -> dict[str, Any]:
        """The same as `expected`, from the engine."""
        engine = self.platform.engine
        ((rejected,),) = rows(engine, "select count(*) from rejected_events")
        return {
            "typed": sorted(name for (name,) in rows(engine, f"select event_id from {TOPIC}")),
            "rejected": rejected,
            "tiles": sorted(
                (learner, day, lessons, int(seconds), finishes)
                for learner, day, lessons, seconds, finishes in rows(
                    engine, f"select learner_id, lesson_date, lessons, seconds, finishes from {TILE}"
                )
            ),
            "minutes": dict(rows(engine, "select learner_id, minutes_28d from learner_progress_rolling")),
        }

    def count(self, relation: str) -> int:
        ((count,),) = rows(self.platform.engine, f"select count(*) from {relation}")
        return int(count)

    def settled(self) -> None:
        """Wait until everything that was sent is in every view as it must be."""
        until(lambda: self.count(PARSED) == len(self.sent), lambda: (self.count(PARSED), len(self.sent)))
        assert self.found() == self.expected()

    def in_lake(self) -> list[tuple[Any, ...]]:
        """The places that the raw table of the lake holds."""
        spec = event_tables(self.platform.registry)[TOPIC].raw
        columns = ["source", "source_partition", "source_offset"]
        read = read_events(self.platform.catalog(), spec, Selection(columns=columns)).read_all()
        return sorted(tuple(row[name] for name in columns) for row in read.to_pylist())

    def places(self) -> list[tuple[Any, ...]]:
        return sorted(tuple(row.values())[:3] for row in self.arrivals())

    def retain(self, seconds: int) -> None:
        """Set the age at which raw messages leave; shorter than the settings allow, because a test waits for it."""
        self.platform.dbt._environment["PREFS_RAW_RETENTION_SECONDS"] = str(seconds)

    def leave(self) -> None:
        """Wait until RisingWave has deleted every raw message by its age."""
        until(lambda: self.count(RAW) == 0, lambda: self.count(RAW))


@pytest.fixture(scope="module")
def world(shell_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    brokers, endpoint = (
        shell_environment.get(name) for name in ("PREFS_KAFKA_BOOTSTRAP", "AWS_ENDPOINT_URL")
    )
    if not brokers or not endpoint:
        pytest.skip("PREFS_KAFKA_BOOTSTRAP and AWS_ENDPOINT_URL name no brokers and no DynamoDB")
    with database() as engine, pytest.MonkeyPatch.context() as patch:
        topic = f"{engine.database}_lessons"
        for name, value in {
            **{name: value for name, value in shell_environment.items() if name.startswith("AWS_")},
            "PREFS_PROJECT_DIR": str(COURSES),
            **engine_settings(engine),
            "PREFS_PUBLISH": "sink",
            "PREFS_TABLE_PREFIX": f"{engine.database}_",
            "PREFS_KAFKA_BOOTSTRAP": brokers,
            "PREFS_KAFKA_TOPIC_LESSON_EVENTS": topic,
            "PREFS_DATA_DIR": str(tmp_path_factory.mktemp("state")),
        }.items():
            patch.setenv(name, value)
        admin: Any = AdminClient({"bootstrap.servers": brokers})
        admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
        platform = Platform(load_settings())
        made = World(platform, brokers, topic)
        made.retain(RETENTION_SECONDS)
        try:
            platform.apply()
            yield made
        finally:
            with engine.connect() as connection:
                connection.execute("drop sink if exists kafka_lesson_events_feed")
                connection.execute("drop source if exists kafka_lesson_events")
            admin.delete_topics([topic])[topic].result(30)
            for entity in platform.contract.tables.values():
                platform.dynamodb().delete_table(TableName=platform.settings.table_prefix + entity.name)


def test_views_come_back_from_the_lake_while_events_arrive(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.platform.engine
    world.send(160)
    world.settled()
    (report,) = world.platform.export_events([TOPIC])
    assert (report.failed, report.lost) == ({}, 0)
    held = world.in_lake()
    assert held == world.places()
    world.leave()
    # No view has noticed.
    assert world.found() == world.expected()
    compiled = Dbt.compiled_manifest

    def changed(dbt: Dbt) -> Any:
        manifest = compiled(dbt)
        (node,) = (node for node in manifest["nodes"].values() if node["name"] == PARSED)
        node["compiled_code"] = f"select * from ({node['compiled_code']}) as parsed"
        return manifest

    # A rule for messages that changed would be applied to those that are left alone.
    with monkeypatch.context() as patch:
        patch.setattr(Dbt, "compiled_manifest", changed)
        (refusal,) = world.platform.plan().refusals
    assert f"{PARSED}: it would be made again without the messages that have left {RAW}" in refusal
    assert f"`prefs rebuild {PARSED} --from-lake`" in refusal
    # A retention that is changed takes effect with the rebuild.
    world.retain(LONGER)
    with monkeypatch.context() as patch:
        patch.setattr(Platform, "_restore", lambda *_: 0)
        with pytest.raises(ApplyError, match=f"{len(held)} messages that the views have counted are neither"):
            world.platform.rebuild("all", from_lake=True)
    assert world.found() == world.expected()
    # What the lake does not have yet is only in the raw table.
    world.send(20)
    told: list[str] = []
    stop = threading.Event()
    served: list[int] = []

    def count() -> list[tuple[Any, ...]]:
        return rows(engine, f"select sum(lessons + finishes)::bigint from {TILE}")

    def live() -> None:
        for turn in itertools.count():
            if stop.wait(1.5):
                return
            world.send(4)
            if turn % 10 == 5:
                # As often as the retention asks for.
                world.platform.export_events([TOPIC])
            ((lessons,),) = patiently(count)
            served.append(int(lessons))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        rebuilt = world.platform.rebuild("all", from_lake=True, say=told.append)
    finally:
        stop.set()
        thread.join()
    print(f"{len(world.sent)} messages sent, {len(served)} reads meanwhile")
    assert set(rebuilt) >= VIEWS
    # Of those that arrived meanwhile, some were exported before the lake was read.
    (restored,) = (int(line.split()[1]) for line in told if line.endswith("messages read from the lake"))
    assert len(held) <= restored <= len(world.sent)
    # The old views served until the new ones did, and nobody saw one without its events.
    assert served == sorted(served)
    assert served[0] > 0
    world.settled()
    names = {name for (name,) in rows(engine, "select name from rw_catalog.rw_relations")}
    assert [name for name in names if "__next_" in name] == []
    assert not world.platform.plan().changes
    # The feed writes into the new raw table, and every message went into the lake once.
    world.send(10)
    world.settled()
    (again,) = world.platform.export_events([TOPIC])
    assert (again.failed, again.lost) == ({}, 0)
    assert world.in_lake() == world.places()
    assert len(world.places()) == len(world.sent)


def test_without_the_lake_views_are_made_from_what_was_parsed(world: World) -> None:
    told: list[str] = []
    assert world.platform.rebuild(TILE, from_lake=False, say=told.append) == [TOPIC, TILE]
    assert any(line.startswith(f"{PARSED}: stays as it is") for line in told)
    world.settled()
