"""Each stage of the whole way is broken once; the checks that must turn are written down, and no other does.

Events go the way of production: Kafka, ingester, views, publisher, DynamoDB, client. What broke a stage is taken
back in the end, and one evaluation later everything is well again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from declared import PROJECT
from kafka_cluster import Cluster
from shipped import REGISTRY, VIEWER_KEY

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.declarations.reserved import CANARY_NUMBER, CANARY_TEXT, canary_of
from dagster_prefs.dynamodb.publisher import PublishError
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.canaries import OF_ANOTHER_DEPLOYMENT
from dagster_prefs.events.kafka import ingest_topic
from dagster_prefs.events.rejected import rejected_counts
from dagster_prefs.freshness.canary import (
    CanaryState,
    Probe,
    canary_paths,
    canary_views,
    epoch_ms,
    read_domains,
    read_views,
    send_canary,
)
from dagster_prefs.freshness.measures import measure_ingestion
from dagster_prefs.serving.profiles import ProfileClient

DOMAINS = tuple(domain.name for domain in REGISTRY.contract.domains.values())
CANARY = {*(f"canary/{name}" for name in DOMAINS), "canary/shop_user"}
CANARY_IN_DYNAMODB = CANARY - {"canary/shop_user"}
TYPED = {"views/user_events", "views/view_events", "views/content_interactions"}


class Flow:
    """A platform whose stages can be stopped one by one; its time passes while the canary is waited for."""

    def __init__(self, world: Any, cluster: Cluster, profiles: ProfileClient, registry: Registry) -> None:
        self.world = world
        self.registry = registry
        world.cluster = self.cluster = cluster
        self.ingesting = self.refreshing = True
        self.sink_errors: list[str] = []
        self.state = CanaryState()
        self.probe = Probe(
            send=lambda moment: send_canary(world.engine, REGISTRY, moment, bootstrap=cluster.bootstrap),
            readers=[
                lambda: read_domains(profiles, canary_of(VIEWER_KEY)),
                lambda: read_views(world.engine, REGISTRY, canary_views(REGISTRY)),
            ],
            paths=canary_paths(REGISTRY),
            thresholds=world.contract.freshness.canary,
            clock=lambda: world.now,
            wait=self.wait,
            poll_seconds=2,
        )

    def produce(self, age: float, days_ago: float = 0) -> None:
        """One event per topic reaches Kafka `age` seconds ago; it happened `days_ago` days before that."""
        self.world.watch(3, age=age, days_ago=days_ago)
        self.world.like(3, age=age, days_ago=days_ago)
        self.world.shop("u3", age=age, days_ago=days_ago)

    def step(self) -> None:
        """Whatever runs does its work once."""
        world = self.world
        if self.ingesting:
            for topic in world.contract.freshness.topics:
                ingest_topic(world.engine, KafkaSource(self.cluster.bootstrap), self.registry.topics[topic])
        if self.refreshing:
            world.refresh()
        try:
            world.publish()
        except PublishError as error:
            self.sink_errors.append(str(error))

    def later(self, seconds: float) -> None:
        # Raw tables and brokers stamp with the real time, which a slow machine brings past the world's.
        self.world.now = max(self.world.now, datetime.now(UTC)) + timedelta(seconds=seconds)

    def wait(self, seconds: float) -> None:
        # Not the real time: how fast this machine is must not decide how late a canary is.
        self.world.later(seconds=seconds)
        self.step()

    def evaluate(self) -> dict[str, str]:
        """One evaluation of everything: the measures that are not ok, with their levels."""
        world = self.world
        measures = {
            **world.measures(),
            **{
                one.key: one
                for one in measure_ingestion(
                    world.engine,
                    REGISTRY,
                    KafkaSource(self.cluster.bootstrap),
                    now=world.now,
                    timeout_seconds=60,
                )
            },
        }
        self.state, canary = self.probe.run(self.state, patience_seconds=6)
        measures |= {one.key: one for one in canary}
        return {key: one.level for key, one in measures.items() if one.level != "ok"}


@pytest.fixture
def flow(busy: Any, cluster: Cluster, aws_endpoint: str, registry: Registry) -> Iterator[Flow]:
    # The broker stamps the canary's messages with the time that it is.
    busy.now = datetime.now(UTC)
    busy.export()
    with ProfileClient(PROJECT, endpoint_url=aws_endpoint, region="eu-central-1") as profiles:
        made = Flow(busy, cluster, profiles, registry)
        assert made.evaluate() == {}
        yield made
        assert made.evaluate() == {}


def error(*keys: str) -> dict[str, str]:
    return dict.fromkeys(keys, "error")


def test_an_ingester_that_stopped_while_kafka_goes_on(flow: Flow) -> None:
    flow.ingesting = False
    flow.produce(age=10)
    topics = [f"ingestion/{topic}" for topic in flow.world.contract.freshness.topics]
    assert flow.evaluate() == error(*topics, *CANARY)
    flow.ingesting = True
    flow.step()


def test_views_that_are_not_refreshed(flow: Flow) -> None:
    flow.refreshing = False
    flow.produce(age=10)
    flow.step()
    flow.later(seconds=10)
    assert flow.evaluate() == error(*TYPED, *CANARY)
    flow.refreshing = True
    flow.step()


def test_dynamodb_that_refuses_every_write(flow: Flow) -> None:
    refusing = True

    def refuse(request: Any, **_: Any) -> AWSResponse | None:
        body = json.dumps({"__type": "com.amazonaws#AccessDeniedException", "Message": "writes are blocked"})
        headers = {"Content-Type": "application/x-amz-json-1.0"}
        return AWSResponse(request.url, 400, headers, Raw(body.encode())) if refusing else None

    for operation in ("BatchWriteItem", "PutItem", "DeleteItem", "UpdateItem"):
        flow.world.client.meta.events.register(f"before-send.dynamodb.{operation}", refuse)
    flow.produce(age=10)
    flow.step()
    assert any("writes are blocked" in said for said in flow.sink_errors)
    flow.later(seconds=10)
    assert flow.evaluate() == error(*[f"online/{domain}" for domain in DOMAINS], *CANARY_IN_DYNAMODB)
    refusing = False
    flow.step()


def test_a_tile_that_changed_after_its_export(flow: Flow) -> None:
    flow.produce(age=0, days_ago=1)
    flow.step()
    tables = ("viewer_watch_daily", "viewer_genre_daily", "viewer_interactions_daily")
    assert flow.evaluate() == {f"offline/{table}": "warn" for table in tables}
    flow.world.export()


def test_a_canary_whose_events_come_to_nothing(flow: Flow) -> None:
    """Its viewer and user are erased, so that the typed events leave them out and all others go on."""
    for kind, subject in (("viewer", str(CANARY_NUMBER)), ("shop_user", CANARY_TEXT)):
        flow.world.execute(
            "insert into erased_subjects (subject_kind, subject_id, erased_at) values (%s, %s, 'infinity')",
            [kind, subject],
        )
    flow.produce(age=0)
    flow.step()
    assert flow.evaluate() == error(*CANARY)
    flow.world.execute("delete from erased_subjects")
    flow.step()


def test_two_deployments_on_one_kafka(registry: Registry, flow: Flow, world: Any) -> None:
    """Each reads the other's canaries, rejects them without calling anybody, and takes none for its own."""
    other = world.engine
    flow.produce(age=0)
    # Later than any of ours, so that it would show in our items if it were taken for one.
    at = flow.world.now + timedelta(minutes=30)
    send_canary(other, REGISTRY, at, bootstrap=flow.cluster.bootstrap)
    flow.step()
    assert flow.evaluate() == {}
    ours = flow.world.execute("select max(last_event_at) from viewer_engagement_rolling where viewer_id = -1")
    assert ours[0][0] < epoch_ms(at)
    counts = rejected_counts(flow.world.engine)
    assert {topic: reasons.get(OF_ANOTHER_DEPLOYMENT) for topic, reasons in counts.items()} == dict.fromkeys(
        flow.world.contract.freshness.topics, 1
    )
    assert rejected_counts(flow.world.engine, open_only=True) == {"view_events": {"not valid JSON": 1}}
    for topic in world.contract.freshness.topics:
        ingest_topic(other, KafkaSource(flow.cluster.bootstrap), registry.topics[topic])
    world.refresh()
    assert world.execute("select watched_at from view_events where viewer_id = -1") == [
        (at.replace(microsecond=at.microsecond // 1000 * 1000),)
    ]
    assert {reason for reasons in rejected_counts(other).values() for reason in reasons} == {
        OF_ANOTHER_DEPLOYMENT
    }


def test_a_canary_that_cannot_be_sent(flow: Flow) -> None:
    """The producer's way is gone, the platform's own works: nothing is known, and nothing else is red."""

    def refuse(moment: datetime) -> None:
        send_canary(flow.world.engine, REGISTRY, moment, bootstrap="127.0.0.1:1", timeout_seconds=0.3)

    working = flow.probe
    flow.probe = replace(working, send=refuse)
    assert flow.evaluate() == dict.fromkeys(CANARY, "unknown")
    flow.probe = working


class Raw(io.BytesIO):
    """A response's body as botocore reads it."""

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield self.read()
