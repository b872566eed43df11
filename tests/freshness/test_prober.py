"""The canary that the follower of the embedded engine sends: without Dagster, bounded, and told to whoever reads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from psycopg import sql
from shipped import REGISTRY

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.defs import freshness
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.canaries import is_proven, key_of
from dagster_prefs.freshness.canary import CanaryState, PathState, Probe, Tick, epoch_ms, judge_ticks
from dagster_prefs.freshness.prober import KEPT, STATE, Prober, interval_seconds, prober_ticks
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

TOPICS = [topic for topic in REGISTRY.topics.values() if topic.entity is not None and topic.time is not None]
THRESHOLDS = REGISTRY.contract.freshness.canary


@pytest.fixture
def engine(
    copied_database: Callable[..., AbstractContextManager[EngineConfiguration]],
    deployed_template: EngineConfiguration,
) -> Iterator[EngineConfiguration]:
    with copied_database("prober", deployed_template) as copied:
        yield copied


def raw(engine: EngineConfiguration, query: str, *values: Any) -> dict[str, list[tuple[Any, ...]]]:
    with engine.connect() as connection:
        return {
            topic.name: connection.execute(
                sql.SQL(query).format(sql.Identifier(topic.raw)), values
            ).fetchall()
            for topic in TOPICS
        }


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_canaries_are_sent_timed_and_deleted_again(engine: EngineConfiguration, tmp_path: Path) -> None:
    old = epoch_ms(datetime.now(UTC) - KEPT) - 1
    insert = (
        "insert into {} (source, source_partition, source_offset, data) values (%s, 0, %s, %s) returning 1"
    )
    raw(engine, insert, "canary", old, b"{}")
    raw(engine, insert, "file:a", old, b"{}")
    newest = "select max(source_offset) from {} where source = 'canary'"

    def read() -> dict[str, int | None]:
        return {"watch": raw(engine, newest)["view_events"][0][0]}

    def probe(*_: Any) -> Probe:
        return Probe(lambda moment: pytest.fail("sent as the sensor does"), [read], ["watch"], THRESHOLDS)

    stop = threading.Event()
    thread = threading.Thread(target=Prober(engine, REGISTRY, probe, tmp_path).run, args=[stop])
    thread.start()
    try:
        until(lambda: bool(prober_ticks(tmp_path)))
        (tick,) = prober_ticks(tmp_path)
        assert not tick.is_late(datetime.now(UTC))
        path = CanaryState.loads(tick.cursor).paths["watch"]
        assert (len(path.latencies), path.sent_ms, path.lost) == (1, None, 0)
        assert (tmp_path / STATE).stat().st_mode & 0o077 == 0
    finally:
        stop.set()
        thread.join()
    # One for each topic, as from one moment, and proven; what is too old is gone, and what others wrote is not.
    sent = raw(engine, "select source_offset, data from {} where source = 'canary' order by 1")
    ((moment,),) = {tuple(offset for offset, _ in rows) for rows in sent.values()}
    with engine.connect() as connection:
        key = key_of(connection, engine)
    for rows in sent.values():
        assert is_proven(json.loads(rows[0][1])["event_id"], moment, [key])
    assert raw(engine, "select source_offset from {} where source <> 'canary'") == {
        topic.name: [(old,)] for topic in TOPICS
    }
    assert prober_ticks(tmp_path) == [], "stopped in order, it is not missed"


def test_what_keeps_it_from_probing_is_told_until_it_works(
    engine: EngineConfiguration, tmp_path: Path
) -> None:
    reasons = ["no credentials"]

    def probe(*_: Any) -> Probe:
        if reasons:
            raise PrefsError(reasons.pop())
        return Probe(
            lambda moment: None, [lambda: {"watch": epoch_ms(datetime.now(UTC))}], ["watch"], THRESHOLDS
        )

    stop = threading.Event()
    thread = threading.Thread(target=Prober(engine, REGISTRY, probe, tmp_path).run, args=[stop])
    thread.start()
    try:
        until(lambda: bool(prober_ticks(tmp_path)))
        found = judge_ticks(prober_ticks(tmp_path), REGISTRY, now=datetime.now(UTC))
        assert {(one.level, one.reason) for one in found} == {("unknown", "no credentials")}
        until(lambda: prober_ticks(tmp_path)[0].problem is None)
    finally:
        stop.set()
        thread.join()


def test_the_next_canary_is_readable_before_the_last_one_is_too_old() -> None:
    assert interval_seconds(THRESHOLDS) == 4 <= THRESHOLDS.error_seconds - 1
    assert interval_seconds(Freshness(1, 1)) == 1
    assert interval_seconds(Freshness(600, 900)) == 60


def test_whoever_probed_last_is_believed_and_a_follower_that_died_is_named() -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def tick(ago: float, latency: float, **given: Any) -> Tick:
        state = CanaryState({"watch": PathState(None, (latency,))})
        return Tick((now - timedelta(seconds=ago)).timestamp(), state.dumps(), **given)

    def watch(*ticks: Tick) -> Any:
        return next(one for one in judge_ticks(ticks, REGISTRY, now=now) if one.name == "watch")

    sensor, follower = tick(30, 2.0), tick(3, 0.3, from_follower=True)
    assert watch(sensor, follower).lag_seconds == watch(follower, sensor).lag_seconds == 0.3
    dead = watch(tick(121, 0.3, from_follower=True))
    assert (dead.level, dead.reason) == (
        "unknown",
        "the follower has sent no canary since 2026-03-01 11:57:59 UTC: run `prefs up`",
    )
    assert watch(tick(121, 0.3)).level == "ok", "a sensor ticks once a minute at best"


def test_the_sensor_of_dagster_stands_back_while_the_follower_probes(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, engine_port=1, aws_endpoint_url="http://127.0.0.1:1")
    sensor = next(
        one
        for one in freshness.build(Platform(settings)).sensors or ()
        if one.name == freshness.CANARY_SENSOR
    )

    def ticked(at: float) -> str:
        (tmp_path / STATE).write_text(json.dumps({"at": at, "cursor": "{}", "problem": None}))
        with dg.DagsterInstance.ephemeral() as instance:
            return sensor.evaluate_tick(dg.build_sensor_context(instance)).skip_message or ""

    assert ticked(time.time()) == "the follower of the embedded engine sends the canary"
    assert "cannot be reached" in ticked(time.time() - 600)
