"""What keeps the embedded engine from following the events is named with its remedy, and heals by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
from shipped import REGISTRY
from waiting import PATIENCE_SECONDS, wait_for

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.defs import freshness
from dagster_prefs.dynamodb.publisher import PublishError
from dagster_prefs.freshness import embedded
from dagster_prefs.freshness.alerts import load_levels
from dagster_prefs.freshness.embedded import DISK, FOLLOWER, SERVER, _judge, _State, measure_embedded
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.metrics import render_metrics
from dagster_prefs.freshness.status import Status
from dagster_prefs.live.follower import Follower, Publish, Work
from dagster_prefs.live.presence import follow_lock, rebuilding_session
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings


def follower_of(world: Any, folder: Path) -> Measure:
    return next(one for one in measure_embedded(world.engine, REGISTRY, folder) if one.name == FOLLOWER)


def idle(world: Any, folder: Path) -> bool:
    """Whether the follower has nothing left to do."""
    return "follows, nothing waits" in follower_of(world, folder).reason


@contextmanager
def process(world: Any, endpoint: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`prefs follow`, as the supervisor starts it."""
    environment = {
        **os.environ,
        "PREFS_ENGINE_PORT": str(world.engine.port),
        "PREFS_ENGINE_DATABASE": world.engine.database,
        "PREFS_ENGINE_USER": world.engine.user,
        "PREFS_DATA_DIR": str(folder),
        "AWS_ENDPOINT_URL": endpoint,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "dagster_prefs", "follow"], env=environment, stdout=subprocess.DEVNULL
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def thread(world: Any, publish: Publish) -> Iterator[None]:
    stop = threading.Event()
    follower = Follower(world.engine, lambda: Work(REGISTRY, publish), process="the test")
    running = threading.Thread(target=follower.run, args=[stop])
    running.start()
    try:
        yield
    finally:
        stop.set()
        running.join()


def nowhere(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
    """Nobody is served here."""


def test_a_killed_follower_is_told_and_the_next_one_heals(
    world: Any, aws_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        freshness.Webhook, "tell", lambda self, changed, at: told.extend(one.text for one in changed)
    )
    settings = Settings(
        engine_port=world.engine.port,
        engine_database=world.engine.database,
        engine_user=world.engine.user,
        aws_endpoint_url=aws_endpoint,
        data_dir=tmp_path,
    )
    made = freshness.build(Platform(settings), alert_webhooks=["https://hooks.example.com/x"])
    sensor = made.get_repository_def().get_sensor_def(freshness.FOLLOWER_SENSOR)
    assert (sensor.minimum_interval_seconds or 0) <= 10
    cursor: str | None = None

    def tick() -> list[str]:
        nonlocal cursor
        told.clear()
        with dg.DagsterInstance.ephemeral() as instance:
            found = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor))
        assert not found.run_requests
        assert not found.asset_events, "what belongs to no run is never deleted"
        cursor = found.cursor
        return list(told)

    def metric(name: str) -> float:
        text = render_metrics(
            Status(world.now, 0.0, tuple(measure_embedded(world.engine, REGISTRY, tmp_path)))
        )
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        return float(line.split()[-1])

    nobody = follower_of(world, tmp_path)
    assert (nobody.level, metric("prefs_follower_alive")) == ("skipped", 0)
    assert "`prefs up` starts a follower" in nobody.reason
    assert tick() == []

    with process(world, aws_endpoint, tmp_path) as following:
        wait_for(lambda: idle(world, tmp_path))
        assert metric("prefs_follower_alive") == 1
        assert metric("prefs_follower_step_age_seconds") < PATIENCE_SECONDS
        assert tick() == []

        # One that hangs holds its lock, and says nothing.
        following.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(embedded, "GONE_SECONDS", 0.2)
        hangs = wait_for(lambda: (found := follower_of(world, tmp_path)).level == "error" and found)
        assert "has not given a sign of life" in hangs.reason
        monkeypatch.undo()
        monkeypatch.setattr(
            freshness.Webhook, "tell", lambda self, changed, at: told.extend(one.text for one in changed)
        )
        following.send_signal(signal.SIGCONT)
        wait_for(lambda: follower_of(world, tmp_path).level == "ok")
        # So that what waits afterwards is what comes afterwards.
        wait_for(lambda: idle(world, tmp_path))

        following.kill()
        following.wait()
    died = wait_for(lambda: (found := follower_of(world, tmp_path)).level == "error" and found)
    assert "ended" in died.reason
    assert "run `prefs up`" in died.reason
    assert metric("prefs_follower_alive") == 0
    (line,) = tick()
    assert "engine/follower: ok → error" in line
    assert "run `prefs up`" in line
    assert tick() == [], "it is told once"
    world.watch(1)
    assert "1 messages" in follower_of(world, tmp_path).reason
    assert metric("prefs_follower_waiting_messages") == 1
    assert Status(world.now, 0.0, (follower_of(world, tmp_path),)).exit_code == 2

    with thread(world, nowhere):
        wait_for(lambda: idle(world, tmp_path))
        assert follower_of(world, tmp_path).reason.startswith("the test follows, nothing waits")
        assert metric("prefs_follower_waiting_messages") == 0
        (line,) = tick()
        assert "engine/follower: error → ok" in line
        assert load_levels(cursor) == {}
    assert follower_of(world, tmp_path).level == "skipped", "one that was stopped is missed by nobody"


def test_a_problem_and_who_holds_it_up_are_named_until_they_are_gone(world: Any, tmp_path: Path) -> None:
    broken = threading.Event()
    broken.set()

    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        if broken.is_set():
            raise PublishError("DynamoDB is down: start it")

    def level() -> str:
        return follower_of(world, tmp_path).level

    with thread(world, publish):
        wait_for(lambda: level() == "error")
        assert "DynamoDB is down: start it" in follower_of(world, tmp_path).reason
        assert follower_of(world, tmp_path).values["follower_alive"] == 1
        broken.clear()
        wait_for(lambda: level() == "ok")
        world.execute("set application_name = 'prefs apply'")
        world.execute(
            "select pg_advisory_lock(hashtext('dagster-prefs'), hashtext(%s))", [world.engine.schema]
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "GONE_SECONDS", 0.2)
            waits = wait_for(lambda: (found := follower_of(world, tmp_path)).level == "warn" and found)
        assert "has waited for prefs apply for" in waits.reason
        world.execute("select pg_advisory_unlock_all()")
        wait_for(lambda: level() == "ok")


def test_a_view_within_its_interval_does_not_wait(world: Any, tmp_path: Path) -> None:
    (view,) = [one for one in REGISTRY.kept.values() if one.every_seconds]
    assert view.every_seconds is not None

    def waiting(relation: str, *, rebuilt_seconds_ago: float, since: str = "now()") -> float:
        world.execute("delete from live_pending")
        world.execute(f"insert into live_pending (relation, since) values (%s, {since})", [relation])
        world.execute(
            "update live_views set as_of = clock_timestamp() - %s * interval '1 second' where relation = %s",
            [rebuilt_seconds_ago, relation],
        )
        return follower_of(world, tmp_path).values["waiting_views"]

    assert waiting(view.relation, rebuilt_seconds_ago=1) == 0
    assert waiting(view.relation, rebuilt_seconds_ago=view.every_seconds + 1) == 1
    assert waiting(view.relation, rebuilt_seconds_ago=1, since="'-infinity'") == 1
    domain = next(iter(REGISTRY.contract.domains.values()))
    assert waiting(domain.sink, rebuilt_seconds_ago=1) == 1
    assert waiting(domain.relation, rebuilt_seconds_ago=1) == 1


def test_an_engine_that_is_down_is_named(world: Any, tmp_path: Path, free_port: Callable[[], int]) -> None:
    found = {
        one.name: one
        for one in measure_embedded(replace(world.engine, port=free_port()), REGISTRY, tmp_path / "new")
    }
    assert {name: one.level for name, one in found.items()} == {
        SERVER: "error",
        DISK: "ok",
        FOLLOWER: "unknown",
    }
    assert "run `prefs up`" in found[SERVER].reason
    assert "continues by itself when the engine answers" in found[FOLLOWER].reason
    assert measure_embedded(replace(world.engine, kind="risingwave"), REGISTRY, tmp_path) == []


def test_a_full_disk_is_named_until_it_has_room(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk() -> Measure:
        return next(one for one in measure_embedded(world.engine, REGISTRY, tmp_path) if one.name == DISK)

    assert disk().level == "ok"
    # The room of this machine counts as too little, for a moment.
    monkeypatch.setattr(embedded, "NEARLY_FULL_BYTES", 1 << 62)
    assert disk().level == "warn"
    monkeypatch.setattr(embedded, "FULL_BYTES", 1 << 62)
    assert disk().level == "error"
    assert f"are free at {tmp_path}, so that the engine cannot write: free some space" in disk().reason
    assert follower_of(world, tmp_path).level == "skipped"
    # A follower that the disk keeps from working cannot write down that it is alive.
    world.execute(
        "insert into live_follower (process, seen_at) values ('host:1', now() - interval '1 minute')"
    )
    assert "so that the engine cannot write: free some space" in follower_of(world, tmp_path).reason
    monkeypatch.undo()
    assert disk().level == "ok"
    assert disk().values["disk_free_bytes"] > 0


def test_a_follower_whose_second_session_rebuilds_is_at_work(world: Any, tmp_path: Path) -> None:
    world.execute(
        "insert into live_follower (process, seen_at) values ('host:1', now() - interval '1 minute')"
    )
    with world.engine.connect() as its_own, world.engine.connect() as beside:
        its_own.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [follow_lock(world.engine)])
        assert "has not given a sign of life" in follower_of(world, tmp_path).reason
        beside.execute("select set_config('application_name', %s, false)", [rebuilding_session(world.engine)])

        def rebuild() -> None:
            with pytest.raises(psycopg.errors.QueryCanceled):
                beside.execute("select pg_sleep(60)")

        rebuilding = threading.Thread(target=rebuild)
        rebuilding.start()
        try:
            wait_for(lambda: "rebuilds a view" in follower_of(world, tmp_path).reason)
        finally:
            beside.cancel()
            rebuilding.join()


STATE = _State(1000.0, "host:1", None, 2.0, 7, "idle", None, 0, 0, 0, 0, None)


@pytest.mark.parametrize(
    ("changed", "level", "reason"),
    [
        ({"uptime": 3.0, "silent": 9.0, "pid": None}, "warn", "the engine started 3 s ago"),
        ({"uptime": 60.0, "silent": 90.0, "pid": None}, "error", "run `prefs up`"),
        ({"silent": 30.0, "state": "active"}, "ok", "at one step for 30 s"),
        ({"silent": 300.0, "state": "active"}, "warn", "at one step for 300 s"),
        ({"silent": 60.0, "pid": None, "problem": "disk full"}, "error", "its last problem was: disk full"),
        ({"process": None, "silent": None}, "ok", "it is starting"),
    ],
)
def test_what_is_told_of_a_follower(changed: dict[str, Any], level: str, reason: str) -> None:
    found = _judge(STATE._replace(**changed))
    assert found[0] == level
    assert reason in found[1]
