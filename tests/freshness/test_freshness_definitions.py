"""Checks, observations, sensors and alerts through Dagster itself, on a real engine and table."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    SensorInstigatorData,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from kafka_cluster import Cluster
from shipped import REGISTRY

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.defs import freshness, offline_store
from dagster_prefs.defs.instance import DAGSTER_YAML
from dagster_prefs.defs.resources import run_tags
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.kafka import ingest_topic
from dagster_prefs.freshness import canary, status
from dagster_prefs.freshness.alerts import AlertError, load_levels
from dagster_prefs.freshness.canary import CanaryState, PathState, Tick, epoch_ms, judge_ticks
from dagster_prefs.freshness.metrics import render_metrics
from dagster_prefs.freshness.probe_store import stored_ticks
from dagster_prefs.freshness.status import Status
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings


def settings(world: Any, endpoint: str, folder: Path, **fields: Any) -> Settings:
    return Settings(
        engine_port=world.engine.port,
        engine_database=world.engine.database,
        engine_user=world.engine.user,
        aws_endpoint_url=endpoint,
        iceberg_warehouse=world.warehouse.as_uri(),
        data_dir=folder,
        **fields,
    )


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    folder = tmp_path / "dagster"
    folder.mkdir()
    with dg.DagsterInstance.local_temp(str(folder)) as made:
        yield made


@pytest.fixture
def platform(busy: Any, aws_endpoint: str, tmp_path: Path) -> Platform:
    return Platform(settings(busy, aws_endpoint, tmp_path))


def definitions(platform: Platform, **options: Any) -> dg.Definitions:
    return dg.Definitions.merge(
        freshness.build(platform, **options), dg.Definitions(executor=dg.in_process_executor)
    )


def run(platform: Platform, instance: dg.DagsterInstance) -> tuple[Any, dict[str, Any]]:
    result = definitions(platform).resolve_job_def(freshness.JOB).execute_in_process(instance=instance)
    checks = {
        "/".join(found.asset_key.path): found
        for found in result.get_asset_check_evaluations()
        if found.check_name != "canary"
    }
    return result, checks


def test_the_job_evaluates_every_check(platform: Platform, instance: dg.DagsterInstance) -> None:
    result, checks = run(platform, instance)
    assert result.success
    keys = freshness.asset_keys(platform)
    expected = [key for stage in ("engine", "views", "online", "offline") for key in keys[stage].values()]
    assert set(checks) == {"/".join(key.path) for key in expected}
    assert all(found.passed for found in checks.values()), checks
    watch = checks["online/watch"].metadata
    assert watch["lag_seconds"].value == 0.0
    assert watch["error_seconds"].value == platform.contract.domain("watch").freshness.error_seconds
    assert watch["sampled"].value >= 40
    # What is measured of events and views, rows included, needs no run of dbt.
    for relation, rows in {
        "raw_view_events": 81,
        "view_events": 80,
        "viewer_watch_metrics_1d": 80,
        "viewer_engagement_rolling": 40,
    }.items():
        (observed,) = instance.fetch_observations(dg.AssetKey(relation), limit=5).records
        assert observed.run_id == result.run_id
        assert observed.asset_observation.metadata["dagster/row_count"].value == rows


def test_what_waits_fails_its_check_and_the_run_goes_on(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    busy.watch(1, age=30)
    result, checks = run(platform, instance)
    assert result.success
    (failed,) = [name for name, found in checks.items() if not found.passed]
    assert failed == "view_events"
    assert checks[failed].severity == dg.AssetCheckSeverity.ERROR
    assert checks[failed].metadata["waiting"].value == 1
    observation = instance.fetch_observations(dg.AssetKey("view_events"), limit=1).records[0]
    assert observation.asset_observation.metadata["lag_seconds"].value >= 30


def test_an_engine_that_is_down_fails_every_check_and_no_run(
    busy: Any, aws_endpoint: str, tmp_path: Path, instance: dg.DagsterInstance, free_port: Any
) -> None:
    busy.engine = replace(busy.engine, port=free_port())
    result, checks = run(Platform(settings(busy, aws_endpoint, tmp_path)), instance)
    assert result.success
    assert [name for name, found in checks.items() if found.passed] == ["engine/disk"]
    assert {found.severity for found in checks.values()} == {dg.AssetCheckSeverity.ERROR}
    assert "cannot be reached" in str(checks["view_events"].metadata["reason"].value)


def test_checks_can_be_selected_one_by_one(platform: Platform, instance: dg.DagsterInstance) -> None:
    job = dg.define_asset_job(
        "one",
        dg.AssetSelection.checks(dg.AssetCheckKey(dg.AssetKey("user_events"), "freshness")),
    )
    made = dg.Definitions.merge(definitions(platform), dg.Definitions(jobs=[job]))
    result = made.resolve_job_def("one").execute_in_process(instance=instance)
    assert [found.asset_key for found in result.get_asset_check_evaluations()] == [dg.AssetKey("user_events")]


def tick(made: dg.Definitions, name: str, instance: dg.DagsterInstance, cursor: str | None) -> Any:
    sensor = made.get_repository_def().get_sensor_def(name)
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    return sensor.evaluate_tick(context)


def test_the_sensor_starts_no_run_and_stores_nothing(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    made = definitions(platform)
    found = tick(made, freshness.WATCH_SENSOR, instance, None)
    assert not found.run_requests
    assert not found.asset_events, "what belongs to no run is never deleted"
    assert load_levels(found.cursor) == {}
    assert "the worst is ok" in (found.skip_message or "")


def test_a_webhook_hears_of_each_transition_once_and_again_after_a_failure(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    heard: dict[str, list[str]] = {"/hook": [], "/other": []}
    answers = [404]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard[self.path].append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(answers.pop() if answers and self.path == "/hook" else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        hooks = [f"http://127.0.0.1:{server.server_port}/{name}" for name in ("hook", "other")]
        made = definitions(platform, alert_webhooks=hooks)
        busy.watch(1, age=30)
        cursor = None
        counts = []
        for step in range(5):
            if step == 3:
                busy.refresh()
                busy.publish()
            found = tick(made, freshness.WATCH_SENSOR, instance, cursor)
            cursor = found.cursor
            counts.append(tuple(map(len, heard.values())))
            assert load_levels(cursor) == ({"views/view_events": "error"} if step in (1, 2) else {})
    finally:
        server.shutdown()
        server.server_close()
    assert [hook for hook, _ in counts] == [1, 2, 2, 3, 3], "refused, told, silent, recovered, silent"
    assert [other for _, other in counts] == [1, 1, 1, 2, 2], (
        "a channel hears nothing twice because another failed"
    )
    assert "views/view_events: error" in heard["/hook"][2]


def test_a_webhook_without_tls_is_refused_at_start(platform: Platform) -> None:
    with pytest.raises(AlertError, match="https"):
        definitions(platform, alert_webhooks=["https://example.com/hook", "http://example.com/hook"])


def test_the_canary_is_off_on_the_embedded_engine_and_works_when_started(
    busy: Any, platform: Platform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freshness, "CANARY_PATIENCE_SECONDS", 0.0)
    made = definitions(platform)
    sensor = made.get_repository_def().get_sensor_def(freshness.CANARY_SENSOR)
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED
    first = tick(made, freshness.CANARY_SENSOR, instance, None)
    assert not first.run_requests
    busy.refresh()
    busy.publish()
    second = tick(made, freshness.CANARY_SENSOR, instance, first.cursor)
    assert not second.asset_events
    left_by_sensor(instance, CanaryState.loads(second.cursor), datetime.now(UTC))
    run(platform, instance)
    for key in freshness.asset_keys(platform)["canary"].values():
        observed = instance.fetch_observations(key, limit=5).records
        windows = [one.asset_observation.metadata.get("canary_window") for one in observed]
        assert [window.value for window in windows if window] == [1]
    assert busy.execute("select count(*) from raw_view_events where source = 'canary'") == [(2,)]


def test_on_the_streaming_engine_the_canary_and_the_sinks_are_checked(tmp_path: Path) -> None:
    platform = Platform(
        Settings(
            engine="risingwave",
            kafka_bootstrap="broker.example.com:9092",
            schedules="on",
            data_dir=tmp_path,
        )
    )
    made = definitions(platform)
    repository = made.get_repository_def()
    assert repository.get_sensor_def(freshness.CANARY_SENSOR).default_status == dg.DefaultSensorStatus.RUNNING
    checks = {
        (key.asset_key.to_user_string(), key.name) for key in made.resolve_asset_graph().asset_check_keys
    }
    assert ("sink_engagement_watch", "freshness") in checks
    assert ("sink_engagement_watch", "canary") in checks
    assert ("user_brand_profile", "canary") in checks
    assert ("raw_view_events", "ingestion_lag") in checks


def test_an_export_that_goes_on_failing_is_started_again_only_later(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    moment = busy.now
    cursor: str | None = None
    made = dg.Definitions.merge(
        offline_store.build(platform, clock=lambda: moment),
        dg.Definitions(executor=dg.in_process_executor),
    )
    job = made.resolve_job_def(offline_store.EXPORT_JOB)

    def look(minutes: float = 0) -> list[Any]:
        """One look of the sensor and, as the daemon would, the runs that it asks for."""
        nonlocal moment, cursor
        moment += timedelta(minutes=minutes)
        found = tick(made, offline_store.EXPORT_SENSOR, instance, cursor)
        cursor = found.cursor
        assert bool(found.run_requests) != bool(found.skip_message)
        keys.extend(request.run_key for request in found.run_requests)
        return [
            job.execute_in_process(instance=instance, tags=request.tags, raise_on_error=False)
            for request in found.run_requests
        ]

    keys: list[str] = []
    assert look() == [], "every day is exported"
    # The tile is ahead of its fingerprint, so that no export of the day can pass.
    busy.watch(1, age=10, days_ago=1)
    busy.refresh()
    busy.watch(2, age=10, days_ago=1)
    busy.refresh("view_events_parsed", "view_events", "viewer_watch_metrics_1d")
    (failed,) = look()
    reasons = [str(event.step_failure_data.error) for event in failed.all_events if event.is_step_failure]
    assert any("tile_fingerprints does not describe" in reason for reason in reasons), reasons
    yesterday = (busy.today - timedelta(days=1)).isoformat()
    assert failed.dagster_run.tags[offline_store.RANGE_START_TAG] == yesterday
    assert failed.dagster_run.tags[offline_store.RANGE_END_TAG] == yesterday

    assert look(minutes=59) == [], "the same again is not worth a run yet"
    assert [result.success for result in look(minutes=1)] == [False]
    assert look(minutes=119) == []
    busy.refresh()
    assert [result.success for result in look()] == [True], "another state of the day is"
    assert look(minutes=5) == []
    assert cursor == "{}"
    assert len(set(keys)) == 3


def test_an_export_at_work_is_waited_for(busy: Any, platform: Platform, instance: dg.DagsterInstance) -> None:
    busy.watch(1, age=10, days_ago=1)
    busy.refresh()
    made = offline_store.build(platform)
    job = made.resolve_job_def(offline_store.EXPORT_JOB)
    run = instance.create_run_for_job(
        job, status=dg.DagsterRunStatus.STARTED, tags=run_tags(platform.settings)
    )
    found = tick(made, offline_store.EXPORT_SENSOR, instance, None)
    assert not found.run_requests
    assert "is active" in (found.skip_message or "")
    instance.report_run_failed(run)
    assert len(tick(made, offline_store.EXPORT_SENSOR, instance, None).run_requests) == 1


def test_an_engine_that_is_down_starts_no_export_and_says_so(
    busy: Any, aws_endpoint: str, tmp_path: Path, instance: dg.DagsterInstance, free_port: Any
) -> None:
    busy.engine = replace(busy.engine, port=free_port())
    made = offline_store.build(Platform(settings(busy, aws_endpoint, tmp_path)))
    found = tick(made, offline_store.EXPORT_SENSOR, instance, None)
    assert not found.run_requests
    assert "cannot be reached" in (found.skip_message or "")


def left_by_sensor(
    instance: dg.DagsterInstance,
    state: CanaryState,
    ticked: datetime,
    status: InstigatorStatus = InstigatorStatus.RUNNING,
) -> None:
    """What Dagster's daemon stores after a tick of the canary's sensor."""
    location = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="dagster_prefs.definitions"))
    origin = RemoteRepositoryOrigin(location, "__repository__").get_instigator_origin(freshness.CANARY_SENSOR)
    data = SensorInstigatorData(last_tick_timestamp=ticked.timestamp(), cursor=state.dumps())
    there = instance.get_instigator_state(origin.get_id(), origin.get_selector().get_id())
    kept = InstigatorState(origin, InstigatorType.SENSOR, status, data)
    (instance.update_instigator_state if there else instance.add_instigator_state)(kept)


def test_the_last_probe_is_read_without_dagster(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    """The reader without Dagster finds what Dagster stored, or leaves it to Dagster."""
    home = Path(instance.root_directory)
    (home / "dagster.yaml").write_text(DAGSTER_YAML)
    assert stored_ticks(home) == []
    assert stored_ticks(tmp_path / "not made yet") == []
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    state = CanaryState({"watch": PathState(None, (1.0, 2.0), 1)})
    left_by_sensor(instance, state, now)
    assert stored_ticks(home) == [Tick(now.timestamp(), state.dumps())]
    assert judge_ticks(stored_ticks(home) or [], REGISTRY, now=now) == freshness.last_probe(
        instance, REGISTRY, now=now
    )
    left_by_sensor(instance, state, now, InstigatorStatus.STOPPED)
    assert stored_ticks(home) == []
    (home / "dagster.yaml").write_text("storage: { postgres: { postgres_url: elsewhere } }")
    assert stored_ticks(home) is None


def test_the_last_probe_is_told_outside_of_its_sensor(instance: dg.DagsterInstance) -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def told() -> dict[str, Any]:
        return {one.name: one for one in freshness.last_probe(instance, REGISTRY, now=now)}

    paths = {*(domain.name for domain in REGISTRY.contract.domains.values()), "shop_user"}
    assert {name: one.level for name, one in told().items()} == dict.fromkeys(paths, "skipped")
    timely = PathState(None, (1.0, 2.0, 1.5))
    late = PathState(epoch_ms(now - timedelta(seconds=70)), (1.0,), 3)
    state = CanaryState({**dict.fromkeys(paths, timely), "preferences": late})
    left_by_sensor(instance, state, now - timedelta(seconds=60))
    found = told()
    assert {name for name, one in found.items() if one.level == "ok"} == paths - {"preferences"}
    assert found["watch"].values == {"lost": 0, "window": 3, "p50_seconds": 1.5, "p99_seconds": 2.0}
    assert "p50 1.5 s and p99 2.0 s of the last 3, 0 lost" in found["watch"].reason
    assert found["preferences"].level == "error"
    assert found["preferences"].lag_seconds == pytest.approx(70)
    samples = render_metrics(Status(now, 0.1, tuple(found.values())))
    assert 'prefs_canary_p99_seconds{name="watch",stage="canary"} 2.0' in samples
    assert 'prefs_canary_lost_total{name="preferences",stage="canary"} 3.0' in samples

    left_by_sensor(instance, state, now - timedelta(minutes=11))
    assert {one.level for one in told().values()} == {"unknown"}
    assert all("Dagster daemon" in one.reason for one in told().values())
    left_by_sensor(instance, state, now, InstigatorStatus.STOPPED)
    assert {one.level for one in told().values()} == {"skipped"}


def test_an_instance_that_cannot_be_read_is_unknown(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> Any:
        raise RuntimeError("no such host")

    monkeypatch.setattr(instance, "all_instigator_state", refuse)
    found = freshness.last_probe(instance, REGISTRY, now=datetime.now(UTC))
    assert {one.level for one in found} == {"unknown"}
    assert all("no such host" in one.reason for one in found)
    # The follower's ticks need no Dagster.
    now = datetime.now(UTC)
    followed = [Tick(now.timestamp(), CanaryState().dumps(), from_follower=True)]
    told = freshness.last_probe(instance, REGISTRY, now=now, followed=followed)
    assert {one.reason for one in told} == {"no canary was sent yet (0 lost)"}


def test_a_lost_canary_is_told_to_people(busy: Any, platform: Platform, instance: dg.DagsterInstance) -> None:
    lost = CanaryState({"watch": PathState(None, (1.0,), 1, True)})
    left_by_sensor(instance, lost, datetime.now(UTC))
    found = tick(definitions(platform), freshness.WATCH_SENSOR, instance, None)
    assert load_levels(found.cursor)["canary/watch"] == "error"


def test_sensors_survive_the_loss_of_everything(
    busy: Any, tmp_path: Path, instance: dg.DagsterInstance, free_port: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine, DynamoDB and brokers are gone: every reading is unknown with its reason, and no tick fails."""
    # The same waits, shorter.
    impatient = partial(status.measure_ingestion, timeout_seconds=0.5)
    monkeypatch.setattr(status, "measure_ingestion", impatient)
    monkeypatch.setattr(canary, "send_canary", partial(canary.send_canary, timeout_seconds=0.5))
    busy.engine = replace(busy.engine, port=free_port())
    gone = f"http://127.0.0.1:{free_port()}"
    platform = Platform(settings(busy, gone, tmp_path, kafka_bootstrap=f"127.0.0.1:{free_port()}"))
    monkeypatch.setattr(freshness, "CANARY_PATIENCE_SECONDS", 0.0)
    made = definitions(platform)
    watched = tick(made, freshness.WATCH_SENSOR, instance, None)
    told = load_levels(watched.cursor)
    keys = freshness.asset_keys(platform)
    expected = {f"{stage}/{name}" for stage in ("ingestion", "views", "online") for name in keys[stage]}
    assert {key for key, level in told.items() if level == "error"} >= expected
    probed = tick(made, freshness.CANARY_SENSOR, instance, None)
    assert (probed.skip_message or "").count("cannot be reached") == len(keys["canary"])
    followed = tick(made, freshness.FOLLOWER_SENSOR, instance, None)
    assert load_levels(followed.cursor) == {"engine/server": "error", "engine/follower": "error"}
    assert not followed.run_requests
    assert not watched.run_requests
    assert not probed.run_requests


def test_the_canary_goes_to_topics_by_their_names_in_kafka(
    registry: Registry,
    busy: Any,
    cluster: Cluster,
    aws_endpoint: str,
    tmp_path: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(freshness, "CANARY_PATIENCE_SECONDS", 0.0)
    cluster.producer.produce("views.v2", None, partition=0)
    assert cluster.producer.flush(60) == 0
    names = {"kafka_bootstrap": cluster.bootstrap, "kafka_topic_names": {"VIEW_EVENTS": "views.v2"}}
    platform = Platform(settings(busy, aws_endpoint, tmp_path, **names))
    tick(definitions(platform), freshness.CANARY_SENSOR, instance, None)
    assert (
        ingest_topic(busy.engine, KafkaSource(cluster.bootstrap), registry.topics["view_events"]).accepted
        == 0
    )
    assert (
        ingest_topic(
            busy.engine,
            KafkaSource(cluster.bootstrap, {"view_events": "views.v2"}),
            registry.topics["view_events"],
        ).accepted
        == 1
    )
    assert (
        ingest_topic(busy.engine, KafkaSource(cluster.bootstrap), registry.topics["user.events"]).accepted
        == 1
    )
