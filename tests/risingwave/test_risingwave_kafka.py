"""Kafka on a real RisingWave: counts, feeds made again, recreated topics, secrets, and what is refused."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from risingwave_server import NO_SERVER, PROJECT, URL, database, refused, rows, run, skipped, until
from shipped import REGISTRY

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.canaries import CanaryKey, canary_events, canary_key
from dagster_prefs.events.topics import broker_ids, note_topics
from dagster_prefs.freshness.measures import measure_ingestion

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)

MODELS = ("+kafka_view_events", "+view_events", "+ingest_progress")
PASSWORD = "hunter2-of-the-key"
COUNTS = """
    select
      (select count(*) from raw_view_events),
      (select count(*) from view_events),
      (select count(*) from view_events_parsed where reason is not null)
"""


@dataclass
class World:
    """A deployed database and topics of its own."""

    engine: EngineConfiguration
    folder: Path
    bootstrap: str
    topics: dict[str, str]
    admin: Any

    def dbt(self, **environment: str) -> Dbt:
        names = {
            f"PREFS_KAFKA_TOPIC_{topic.replace('.', '_').upper()}": n for topic, n in self.topics.items()
        }
        base = {"PREFS_KAFKA_BOOTSTRAP": self.bootstrap, "PREFS_KAFKA_START": "earliest"}
        return Dbt(self.engine, PROJECT, self.folder, {**base, **names, **environment})

    def send(self, topic: str, messages: list[bytes]) -> None:
        producer: Any = Producer({"bootstrap.servers": self.bootstrap})
        for message in messages:
            producer.produce(topic, message)
        assert producer.flush(30) == 0

    def make(self, topic: str) -> None:
        self.admin.create_topics([NewTopic(topic, 2, 1)])[topic].result(30)
        until(lambda: topic in self.admin.list_topics(timeout=10).topics, lambda: "topic not there")

    def delete(self, topic: str) -> None:
        self.admin.delete_topics([topic])[topic].result(30)
        until(lambda: topic not in self.admin.list_topics(timeout=10).topics, lambda: "topic still there")

    def sources(self) -> dict[str, int]:
        found = rows(self.engine, "select source, count(*) from raw_view_events group by source")
        return {source: int(count) for source, count in found}


@pytest.fixture(scope="module")
def world(shell_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    bootstrap = shell_environment.get("PREFS_KAFKA_BOOTSTRAP")
    if not bootstrap:
        pytest.skip("PREFS_KAFKA_BOOTSTRAP names no brokers")
    mark = uuid.uuid4().hex[:12]
    names = ("user.events", "view_events", "content_interactions", "items")
    with database() as engine:
        made = World(
            engine,
            tmp_path_factory.mktemp("target"),
            bootstrap,
            {name: f"prefs-{mark}-{name}" for name in names},
            AdminClient({"bootstrap.servers": bootstrap}),
        )
        made.make(made.topics["view_events"])
        try:
            run(made.dbt(), *MODELS)
            yield made
        finally:
            with engine.connect() as connection:
                connection.execute("drop sink if exists kafka_view_events_feed")
                connection.execute("drop source if exists kafka_view_events")
            made.delete(made.topics["view_events"])


def view(event: str, **changed: Any) -> bytes:
    body = {
        "event_id": event, "viewer_id": 7, "content_id": "c", "genre": "drama", "watch_duration_sec": 60,
        "completion_pct": 1, "watched_at": (datetime.now(UTC) - timedelta(hours=1)).isoformat(),
    }  # fmt: skip
    return json.dumps({**body, **changed}).encode()


# What is wrong, one of each kind; every other message is good, and every tenth of those comes twice.
BAD = [b"{", b"42", b"[]", b"\xff\xfe", b"", view("", viewer_id=8), view("x1", viewer_id="seven"),
       view("x2", watched_at="yesterday"), view("x3", completion_pct=1.5), view("x4", watch_duration_sec=-1),
       view("x5", watched_at="2999-01-01T00:00:00Z")]  # fmt: skip


def test_raw_is_typed_and_rejected_and_duplicates(world: World) -> None:
    good = [view(f"e{n}") for n in range(300)]
    again = good[::10]
    world.send(world.topics["view_events"], [*good[:150], *BAD, *good[150:], *again])
    expected = (len(good) + len(BAD) + len(again), len(good), len(BAD))
    until(lambda: rows(world.engine, COUNTS) == [expected], lambda: (rows(world.engine, COUNTS), expected))
    assert world.sources() == {f"kafka:{world.topics['view_events']}": expected[0]}
    places = rows(
        world.engine, "select source_partition, min(source_offset), max(source_offset), count(*)"
        " from raw_view_events group by source_partition"
    )  # fmt: skip
    assert sum(int(count) for *_, count in places) == expected[0]
    assert all(low == 0 and high == count - 1 for _, low, high, count in places)
    again_results = run(world.dbt(), *MODELS)
    assert skipped(again_results), {name: result.message for name, result in again_results.items()}


def test_a_feed_that_is_made_again_reads_nothing_twice(world: World) -> None:
    before = rows(world.engine, "select source_partition, source_offset, arrived_at from raw_view_events")
    made = run(world.dbt(PREFS_KAFKA_START="latest"), "kafka_view_events")
    assert made["kafka_view_events"].message.startswith("CREATE_SOURCE")
    world.send(world.topics["view_events"], [view("after the feed was made again")])
    query = "select source_partition, source_offset, arrived_at from raw_view_events"
    until(lambda: len(rows(world.engine, query)) > len(before), lambda: len(before))
    after = rows(world.engine, query)
    assert len(after) == len(before) + 1
    assert set(before) < set(after)
    run(world.dbt(), "kafka_view_events")


def test_the_canary_comes_through_kafka_and_nobody_elses(world: World) -> None:
    """An impostor comes before it, another deployment's beside it, and copies of it behind it."""
    topic, moment = world.topics["view_events"], datetime.now(UTC)
    own, other = (
        json.loads(canary_events(REGISTRY, key, moment)["view_events"])
        for key in (canary_key(world.engine), CanaryKey.random())
    )
    world.send(topic, [view("mine", viewer_id=-1), json.dumps(own | {"viewer_id": 7}).encode()])
    world.send(topic, [json.dumps(body).encode() for body in (other, own, own, own | {"genre": "copied"})])
    reasons = "select reason, count(*) from view_events_parsed where {} group by reason order by reason"
    expected = [
        ("canary of another deployment", 1), ("reserved event_id", 1), ("reserved viewer_id", 1), (None, 3),
    ]  # fmt: skip
    query = reasons.format("event_id like 'canary:%' or viewer_id < 0")
    until(lambda: rows(world.engine, query) == expected, lambda: rows(world.engine, query))
    seen = rows(world.engine, "select event_id, genre, watched_at from view_events where viewer_id < 0")
    assert seen == [
        (own["event_id"], seen[0][1], moment.replace(microsecond=moment.microsecond // 1000 * 1000))
    ]
    # No index beside the key that RisingWave keeps the relation by.
    indexes = rows(
        world.engine, "select name from rw_catalog.rw_indexes where name like '%view_events_parsed%'"
    )
    assert indexes == [("view_events_parsed_by_arrived_at",)]


def test_a_recreated_topic_is_told_apart_and_read_from_its_start(world: World) -> None:
    topic = world.topics["view_events"]
    # Every row of the first life is a view of it that must stay.
    first = world.sources()[f"kafka:{topic}"]
    with world.engine.connect() as session:
        note_topics(session, world.engine, broker_ids(world.bootstrap, [topic]), now=datetime.now(UTC))
    world.delete(topic)
    world.make(topic)
    world.send(topic, [view(f"second life {n}") for n in range(5)])
    names = {**world.topics}
    measured = {
        measure.name: measure
        for measure in measure_ingestion(
            world.engine, REGISTRY, KafkaSource(world.bootstrap, names), now=datetime.now(UTC), by_id=True
        )
    }  # fmt: skip
    assert measured["view_events"].level == "error"
    assert "recreated; run `prefs topics renew`" in measured["view_events"].reason
    with world.engine.connect() as session:
        lives = note_topics(
            session, world.engine, broker_ids(world.bootstrap, [topic]), now=datetime.now(UTC)
        )
        assert lives[topic].state == "recreated"
        again = note_topics(
            session, world.engine, broker_ids(world.bootstrap, [topic]), now=datetime.now(UTC)
        )
        assert (again[topic].state, again[topic].generation) == ("noted", 2)
    run(world.dbt(), "kafka_view_events")
    until(lambda: world.sources().get(f"kafka:{topic}#2") == 5, world.sources)
    assert world.sources()[f"kafka:{topic}"] >= first
    raw, typed, rejected = rows(world.engine, COUNTS)[0]
    (duplicates,) = rows(
        world.engine,
        "select count(*) - count(distinct event_id) from view_events_parsed where reason is null",
    )[0]
    assert raw == typed + rejected + duplicates
    second = rows(world.engine, "select count(*) from view_events where event_id like 'second life %'")
    assert second == [(5,)]
    assert skipped(run(world.dbt(), "kafka_view_events"))


def test_what_does_not_work_leaves_the_old_feed_at_work(world: World) -> None:
    absent = f"absent-{uuid.uuid4().hex[:8]}"
    message = refused(world.dbt(PREFS_KAFKA_TOPIC_VIEW_EVENTS=absent), "kafka_view_events")
    assert message == (
        f"Kafka has no topic {absent}: create it, or set its name in Kafka with PREFS_KAFKA_TOPIC_…"
    )
    message = refused(world.dbt(PREFS_KAFKA_BOOTSTRAP="127.0.0.1:1"), "kafka_view_events")
    assert message.startswith("RisingWave got no answer from Kafka at 127.0.0.1:1: check ")
    message = refused(world.dbt(PREFS_KAFKA_SASL_MECHANISM="PLAIN"), "kafka_view_events")
    assert "PREFS_KAFKA_SECURITY_PROTOCOL=PLAINTEXT and PREFS_KAFKA_SASL_MECHANISM=PLAIN" in message
    before = sum(world.sources().values())
    world.send(world.topics["view_events"], [view("the old feed is at work")])
    until(lambda: sum(world.sources().values()) == before + 1, world.sources)
    assert skipped(run(world.dbt(), "kafka_view_events"))


@pytest.mark.parametrize("secrets", ["off", "on"])
def test_credentials_are_in_no_artifact(world: World, monkeypatch: pytest.MonkeyPatch, secrets: str) -> None:
    # The brokers speak plain text, where librdkafka keeps this passphrase and has no use for it.
    monkeypatch.setenv("PREFS_KAFKA_SSL_KEY_PASSWORD", PASSWORD)
    dbt = world.dbt(PREFS_RISINGWAVE_SECRETS=secrets)
    assert run(dbt, "kafka_view_events")["kafka_view_events"].message.startswith("CREATE_SOURCE")
    written = [path for path in world.folder.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if PASSWORD.encode() in path.read_bytes()] == []
    kept = str(rows(world.engine, "select * from deployments"))
    assert PASSWORD not in kept
    (definition,) = rows(
        world.engine, "select definition from rw_catalog.rw_sources where name = 'kafka_view_events'"
    )
    # Without secrets the catalog of the engine has it, which the documentation says.
    assert (PASSWORD in definition[0]) == (secrets == "off")
    assert ("secret public.prefs_kafka_ssl_key_password" in definition[0]) == (secrets == "on")
    assert skipped(run(dbt, "kafka_view_events"))


def test_messages_behind_the_lateness_bound_are_not_stored(world: World) -> None:
    topic = world.topics["view_events"]
    run(world.dbt(PREFS_KAFKA_LATENESS_SECONDS="600"), "kafka_view_events")
    before = sum(world.sources().values())
    producer: Any = Producer({"bootstrap.servers": world.bootstrap})
    now = int(datetime.now(UTC).timestamp() * 1000)
    producer.produce(topic, view("sets the watermark"), partition=0, timestamp=now)
    producer.produce(topic, view("sets the watermark too"), partition=1, timestamp=now)
    assert producer.flush(30) == 0
    until(lambda: sum(world.sources().values()) == before + 2, world.sources)
    for partition in (0, 1):
        producer.produce(topic, view(f"late {partition}"), partition=partition, timestamp=now - 3_600_000)
        producer.produce(topic, view(f"in time {partition}"), partition=partition, timestamp=now - 60_000)
    assert producer.flush(30) == 0
    until(lambda: sum(world.sources().values()) >= before + 4, world.sources)
    events = {str(event) for (event,) in rows(world.engine, "select event_id from view_events")}
    assert {"in time 0", "in time 1"} <= events
    assert not {"late 0", "late 1"} & events
    run(world.dbt(), "kafka_view_events")


def test_retention_of_raw_rows_lowers_no_view(world: World) -> None:
    from dataclasses import replace

    engine = replace(world.engine, schema="kept")
    environment = {"PREFS_KAFKA_BOOTSTRAP": "", "PREFS_RAW_RETENTION_SECONDS": "5"}
    dbt = Dbt(engine, PROJECT, world.folder / "kept", environment)
    run(dbt, "+view_events")
    columns = "source, source_partition, source_offset, data"
    insert = f"insert into kept.raw_view_events ({columns}) values ('test', 0, %s, %s)"
    with engine.connect() as connection:
        for place in range(3):
            connection.execute(insert, (place, view(f"old {place}")))
    count = "select (select count(*) from kept.raw_view_events), (select count(*) from kept.view_events)"
    until(lambda: rows(engine, count) == [(0, 3)], lambda: rows(engine, count))
    with engine.connect() as connection:
        connection.execute(insert, (3, view("new")))
    until(
        lambda: rows(engine, "select count(*) from kept.view_events") == [(4,)], lambda: rows(engine, count)
    )
