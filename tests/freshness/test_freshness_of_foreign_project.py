"""Freshness of the foreign project: its relations, and a canary of its entity through to its profiles."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

from declared import COURSES
from foreign import REGISTRY, TODAY, School, lesson

from dagster_prefs.declarations.registry import WatchedView
from dagster_prefs.declarations.reserved import canary_of
from dagster_prefs.declarations.watched import watched_views
from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.dynamodb.store import domain_stores
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.freshness.canary import (
    CanaryState,
    Probe,
    canary_paths,
    canary_views,
    read_domains,
    send_canary,
)
from dagster_prefs.freshness.measures import measure_ingestion, measure_offline, measure_online, measure_views
from dagster_prefs.freshness.views import watched_relations
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.serving import ProfileClient


def test_what_is_watched_follows_from_the_queries() -> None:
    typed, tile, rolling = watched_relations(REGISTRY)
    assert typed.relation == "lesson_events"
    assert isinstance(tile, WatchedView)
    assert isinstance(rolling, WatchedView)
    assert [(one.relation, one.time, one.only) for one in tile.upstreams] == [
        ("lesson_events", "happened_at", "true")
    ]
    # The subjects, which are read of the events themselves, have no say in the newest event.
    assert [(one.relation, one.day, one.days) for one in rolling.upstreams] == [
        ("learner_lessons_1d", "lesson_date", 28)
    ]
    assert canary_paths(REGISTRY) == ["progress"]
    assert canary_views(REGISTRY) == {}
    without = "select learner_id, count(*) as lessons from lesson_events group by learner_id"
    unclear, _ = watched_views(
        dataclasses.replace(REGISTRY, queries={**REGISTRY.queries, "learner_lessons_1d": without})
    )
    assert "no last_event_at that is the newest time of its inputs" in unclear.unclear
    joined = (
        "select e.learner_id, max(e.happened_at) as last_event_at from lesson_events e "
        "join lessons on lessons.lesson_id = e.lesson_id group by e.learner_id"
    )
    unclear, _ = watched_views(
        dataclasses.replace(REGISTRY, queries={**REGISTRY.queries, "learner_lessons_1d": joined})
    )
    assert "together with something else" in unclear.unclear


def test_every_stage_is_measured_and_a_canary_reaches_its_profiles(
    engine: EngineConfiguration, aws_endpoint: str, tmp_path: Path
) -> None:
    school = School(engine, Dbt(engine, COURSES, tmp_path / "target", {}))
    client = dynamodb_client(aws_endpoint, "eu-central-1")
    (store,) = domain_stores(engine, client, REGISTRY.contract, provision(client, REGISTRY.contract))
    catalog = open_catalog("sqlite", (tmp_path / "lake").as_uri())

    def flow() -> None:
        school.refresh()
        publish_domain(store)

    def levels() -> dict[str, str]:
        now = datetime.now(UTC)
        measures = [
            *measure_views(engine, REGISTRY, now=now),
            *measure_online(REGISTRY.contract, lambda: [store], now=now, publishes=True, wait=lambda _: None),
            *measure_offline(
                engine,
                REGISTRY,
                lambda: catalog,
                namespace="training",
                start=TODAY,
                now=now,
            ),
            *measure_ingestion(engine, REGISTRY, KafkaSource(), now=now),
        ]
        return {measure.key: measure.level for measure in measures}

    quiet = {
        "views/lesson_events": "ok",
        "views/learner_lessons_1d": "ok",
        "views/learner_progress_rolling": "ok",
        "online/progress": "ok",
        "offline/learner_lessons_daily": "ok",
        "ingestion/lesson_events": "skipped",
    }
    flow()
    assert levels() == quiet
    # A view that does not follow is late by the age of the event.
    school.send([lesson("7", 3)])
    for relation in ("lesson_events_parsed", "lesson_events"):
        school.execute("select prefs_rebuild(%s)", [relation])
    assert levels() == quiet | {"views/learner_lessons_1d": "error"}
    school.execute("select prefs_rebuild('learner_lessons_1d')")
    assert levels() == quiet | {
        "views/learner_progress_rolling": "error",
        # The fingerprints say nothing of a tile that has rows.
        "offline/learner_lessons_daily": "unknown",
    }
    flow()
    assert levels() == quiet
    with ProfileClient(COURSES, endpoint_url=aws_endpoint, region="eu-central-1") as profiles:
        probe = Probe(
            send=lambda moment: send_canary(engine, REGISTRY, moment),
            readers=[lambda: read_domains(profiles, canary_of(REGISTRY.entity("learner").key))],
            paths=canary_paths(REGISTRY),
            thresholds=REGISTRY.contract.freshness.canary,
            wait=lambda _: flow(),
        )
        state, (measure,) = probe.run(CanaryState(), patience_seconds=60)
    assert (measure.name, measure.values["window"], measure.values["lost"]) == ("progress", 1, 0)
    assert len(state.paths["progress"].latencies) == 1
    assert school.execute("select reason from rejected_events") == []
    assert school.execute("select learner_id from learner_lessons_1d where learner_id like 'canary:%'") == [
        ("canary:prefs",)
    ]
    # It is counted in no fingerprint, so that its day is as it was.
    assert school.execute("select tile_date from tile_fingerprints where tile_date >= current_date") == []
