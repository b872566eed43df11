"""The follower applies what arrives, has the touched keys published, and says what keeps it from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import psycopg
import pytest
from confluent_kafka import Producer
from psycopg import sql
from relations import insert_events, instant
from shipped import LONG
from streams import MIDNIGHT, NOW, watch
from waiting import PATIENCE_SECONDS, wait_for

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.dynamodb.publisher import PublishError
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.lock import lock_deployment
from dagster_prefs.events import topics
from dagster_prefs.live import follower, steps
from dagster_prefs.live.follower import Follower, Publish, Work
from dagster_prefs.live.presence import FollowedElsewhere, FollowerProblem, read_follower, wait_until_applied
from dagster_prefs.live.trail import make_trail
from dagster_prefs.platform import DomainPublisher, Platform
from dagster_prefs.settings import load_settings


@pytest.fixture
def session(deployed: EngineConfiguration) -> Iterator[psycopg.Connection]:
    with deployed.connect() as connection:
        yield connection


@pytest.fixture
def platform(deployed: EngineConfiguration, aws_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_endpoint)
    made = Platform(load_settings())
    made.engine = deployed
    return made


@contextmanager
def following(engine: EngineConfiguration, registry: Registry, publish: Publish) -> Iterator[list[str]]:
    """A follower at work, and the lines that it says."""
    said: list[str] = []
    with running(Follower(engine, lambda: Work(registry, publish), process="the test", say=said.append)):
        yield said


@contextmanager
def running(follower: Follower) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=follower.run, args=[stop])
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def minutes(platform: Platform) -> dict[str, Decimal]:
    """Viewer → minutes of the long window in the items in DynamoDB, but for the canary's."""
    items = platform.dynamodb().scan(TableName="viewer_profiles")["Items"]
    return {
        item["viewer_id"]["N"]: Decimal(item[f"watch_minutes_{LONG}d"]["N"])
        for item in items
        if item["domain_key"]["S"] == "engagement#watch" and int(item["viewer_id"]["N"]) >= 0
    }


def test_events_reach_dynamodb_and_leave_it(platform: Platform, session: psycopg.Connection) -> None:
    platform.stores()
    with following(platform.engine, platform.registry, DomainPublisher(platform)):
        insert_events(session, [watch(n, n % 3, MIDNIGHT) for n in range(6)])
        wait_for(lambda: minutes(platform) == {"0": 2, "1": 2, "2": 2})
        insert_events(session, [watch(6, 1, MIDNIGHT, seconds=600)])
        wait_until_applied(platform.engine, seconds=PATIENCE_SECONDS)
        assert minutes(platform) == {"0": 2, "1": 12, "2": 2}
        session.execute("insert into erased_subjects values ('viewer', '1', %s)", [instant(NOW)])
        wait_until_applied(platform.engine, seconds=PATIENCE_SECONDS)
        assert minutes(platform) == {"0": 2, "2": 2}
        state = read_follower(session, platform.engine)
        assert state is not None
        assert state.alive(datetime.now(UTC))
        assert state.problem is None


def test_messages_of_kafka_reach_dynamodb(
    platform: Platform, session: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = producer.list_topics(timeout=10).brokers.values()
    monkeypatch.setenv("PREFS_KAFKA_BOOTSTRAP", f"{broker.host}:{broker.port}")
    reading = Platform(load_settings())
    reading.engine = platform.engine
    for name in reading.kafka.topics.values():
        producer.list_topics(name, timeout=10)
    topic = reading.kafka.topics["view_events"]
    # librdkafka's own brokers have no ids of topics.
    monkeypatch.setattr(topics, "broker_ids", lambda bootstrap, names, client: dict.fromkeys(names))
    platform.stores()
    follower = reading.follower()
    with running(follower):
        for data in (watch(1, 1, MIDNIGHT).data, watch(2, 1, MIDNIGHT).data, b"{"):
            producer.produce(topic, data)
        assert producer.flush(10) == 0
        wait_for(lambda: minutes(platform) == {"1": 2})
    rejected = session.execute("select reason from rejected_events").fetchall()
    assert rejected == [("not valid JSON",)]
    assert follower.work.readers.keys() >= {f"Kafka topic {name}" for name in platform.registry.topics}
    # Another follower goes on where this one stopped.
    with running(reading.follower()):
        producer.produce(topic, watch(3, 1, MIDNIGHT).data)
        assert producer.flush(10) == 0
        wait_for(lambda: minutes(platform) == {"1": 3})


def test_what_arrived_while_nobody_followed_is_caught_up_with(
    platform: Platform, session: psycopg.Connection
) -> None:
    insert_events(session, [watch(n, n % 2, MIDNIGHT) for n in range(4)])
    assert platform.refresh() == "4 messages applied; every view is current and every change is published"
    assert minutes(platform) == {"0": 2, "1": 2}
    # The items of a table that was recreated are written again, though nothing changed.
    platform.dynamodb().delete_table(TableName="viewer_profiles")
    platform.refresh()
    assert minutes(platform) == {"0": 2, "1": 2}


def test_only_touched_keys_are_published(
    deployed: EngineConfiguration,
    registry: Registry,
    session: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    published: list[tuple[str, tuple[str, ...] | None]] = []

    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        published.append((domain.name, keys if keys is None else tuple(sorted(keys))))

    with following(deployed, registry, publish):
        wait_for(lambda: len(published) == len(registry.contract.domains))
        assert {keys for _, keys in published} == {None}
        published.clear()
        caplog.set_level("INFO", "dagster_prefs.live.follower")
        insert_events(session, [watch(n, 40 + n, MIDNIGHT) for n in range(2)])
        wait_until_applied(deployed, seconds=PATIENCE_SECONDS)
        last = read_follower(session, deployed)
    assert {name for name, _ in published} == {"watch", "preferences", "sequence"}
    # The id of a step leads from the place of an event to the items that were published because of it.
    lines = [vars(record) for record in caplog.records]
    steps = {
        line["step"]: taken
        for line in lines
        for taken in line.get("taken", [])
        if taken["topic"] == "view_events"
    }
    places = session.execute("select source, source_partition, source_offset from raw_view_events").fetchall()
    assert len(places) == 2
    for source, partition, offset in places:
        (step,) = (
            step
            for step, taken in steps.items()
            if (taken["source"], taken["partition"]) == (source, partition)
            and taken["first_offset"] <= offset <= taken["last_offset"]
        )
        told = {
            line["domain"]
            for line in lines
            if line.get("published_keys") and line["first_step"] <= step <= line["step"]
        }
        assert told == {"watch", "preferences", "sequence"}
    assert last is not None
    assert last.step >= max(steps)
    for domain in ("watch", "preferences", "sequence"):
        assert {key for name, keys in published if name == domain for key in keys or ()} == {"40", "41"}


def test_a_backlog_of_steps_is_published_once(
    deployed: EngineConfiguration,
    registry: Registry,
    session: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "MESSAGES_PER_STEP", 5)
    monkeypatch.setattr(follower, "HELD_SECONDS", PATIENCE_SECONDS)
    published: list[int] = []

    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        if keys and domain.name == "watch":
            waiting = connection.execute("select count(*) from raw_arrivals").fetchone()
            published.append(waiting[0] if waiting else -1)

    with following(deployed, registry, publish):
        wait_for(lambda: read_follower(session, deployed) is not None)
        insert_events(session, [watch(n, n % 7, MIDNIGHT) for n in range(100)])
        wait_until_applied(deployed, seconds=PATIENCE_SECONDS)
        steps_taken = session.execute("select last_value from live_steps").fetchone()
    assert published == [0]
    assert steps_taken is not None
    assert steps_taken[0] >= 20


def test_a_publisher_and_a_step_lock_keys_in_one_order(
    platform: Platform, session: psycopg.Connection
) -> None:
    domain = next(iter(platform.registry.contract.domains.values()))
    store = (
        "insert into live_outbox (domain_key, entity_key, first_step, step) values (%s, %s, %s, %s)"
        " on conflict (domain_key, entity_key) do update set step = excluded.step"
    )
    # The publisher reads the keys by the step that touched them first; a step stores them in their own order.
    for key, step in (("b", 1), ("a", 2)):
        session.execute(store, [domain.key, key, step, step])
    follower = Follower(
        platform.engine, lambda: Work(platform.registry, lambda *_: None), process="the test", say=print
    )
    make_trail(session, platform.engine)
    with platform.engine.connect() as publishing, ThreadPoolExecutor(1) as thread:
        with session.transaction():
            session.execute(store, [domain.key, "a", 3, 3])
            published = thread.submit(follower.publish_changes, publishing)
            wait_for(
                lambda: (
                    session.execute(
                        "select %s = any(pg_blocking_pids(%s))",
                        [session.info.backend_pid, publishing.info.backend_pid],
                    ).fetchone()
                    == (True,)
                )
            )
            session.execute(store, [domain.key, "b", 3, 3])
        assert published.result(PATIENCE_SECONDS)
    assert session.execute("select entity_key, first_step, step from live_outbox order by 1").fetchall() == [
        ("a", 3, 3),
        ("b", 3, 3),
    ]


def test_one_process_follows_at_a_time(
    deployed: EngineConfiguration, registry: Registry, session: psycopg.Connection
) -> None:
    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        """Nobody is served here."""

    with following(deployed, registry, publish):
        wait_for(lambda: read_follower(session, deployed))
        second = Follower(deployed, lambda: Work(registry, publish), process="another")
        with pytest.raises(FollowedElsewhere, match="the test follows this engine already: stop it first"):
            second.run(threading.Event())
    insert_events(session, [watch(1, 1, MIDNIGHT)])
    assert second.catch_up() == 1


def test_it_is_known_before_its_first_step_ends(
    deployed: EngineConfiguration, registry: Registry, session: psycopg.Connection
) -> None:
    with deployed.connect(autocommit=False) as applying:
        lock_deployment(applying, deployed)
        with following(deployed, registry, lambda domain, keys, connection: None):
            try:
                wait_for(lambda: read_follower(session, deployed) is not None)
            finally:
                applying.rollback()


def test_a_problem_is_told_until_it_is_gone(
    deployed: EngineConfiguration, registry: Registry, session: psycopg.Connection
) -> None:
    broken = threading.Event()
    broken.set()

    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        if broken.is_set():
            raise PublishError("DynamoDB is down: start it")

    def problem() -> str | None:
        state = read_follower(session, deployed)
        return state.problem if state else None

    with following(deployed, registry, publish) as said:
        assert wait_for(problem) == "DynamoDB is down: start it"
        insert_events(session, [watch(1, 1, MIDNIGHT)])
        # The views go on meanwhile, and whoever waits is told why.
        wait_for(lambda: session.execute("select from viewer_engagement_rolling").fetchall())
        with pytest.raises(FollowerProblem, match=r"the test\) has a problem: DynamoDB is down: start it"):
            wait_until_applied(deployed, seconds=PATIENCE_SECONDS, patience_seconds=0)
        # What is reported until the next attempt, but solved, stops nobody.
        broken.clear()
        wait_until_applied(deployed, seconds=PATIENCE_SECONDS)
        wait_for(lambda: problem() is None)
    assert said.count("publishing: DynamoDB is down: start it") == 1
    assert said[-1] == "publishing: works again"


def test_a_domain_that_cannot_be_published_holds_up_no_other(
    deployed: EngineConfiguration, registry: Registry, session: psycopg.Connection
) -> None:
    published: list[str] = []
    first, *others = (domain.name for domain in registry.contract.domains.values())

    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        if domain.name == first:
            raise PublishError("viewer 3: its item is too large")
        published.append(domain.name)

    with following(deployed, registry, publish):
        wait_for(lambda: set(published) == set(others))
        state = wait_for(lambda: read_follower(session, deployed))
        wait_for(lambda: state.problem or (read_follower(session, deployed) or state).problem)
    left = session.execute("select relation from live_pending where relation like 'sink%'").fetchall()
    assert left == [(registry.contract.domain(first).sink,)]


def test_it_goes_on_after_the_engine_ended_its_sessions(
    deployed: EngineConfiguration, registry: Registry, session: psycopg.Connection
) -> None:
    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        """Nobody is served here."""

    with following(deployed, registry, publish):
        wait_for(lambda: read_follower(session, deployed))
        session.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        insert_events(session, [watch(1, 1, MIDNIGHT)])
        wait_for(lambda: session.execute("select from viewer_engagement_rolling").fetchall())


def test_it_goes_on_by_the_declarations_that_were_applied_last(
    platform: Platform, session: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    before, (first, *_) = platform.registry, platform.registry.contract.domains.values()
    names = {domain.name for domain in before.contract.domains.values()}
    domains = {**before.contract.domains, first.key: replace(first, name="renamed")}
    after = replace(before, contract=replace(before.contract, domains=domains))
    declared, stamp = before, "first"
    published: list[tuple[str, bool]] = []
    read: list[str] = []

    def reads(name: str) -> Callable[[threading.Event], None]:
        def read_until(stop: threading.Event) -> None:
            read.append(name)
            stop.wait()
            read.append(f"{name} ended")

        return read_until

    def publish(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection) -> None:
        published.append((domain.name, keys is None))

    def work() -> Work:
        return Work(declared, publish, {"events": reads("old" if declared == before else "new")})

    follower = Follower(platform.engine, work, process="the test", applied=lambda: stamp)
    with running(follower):
        wait_for(lambda: {name for name, _ in published} == names)
        published.clear()
        # Declarations that nobody applied are none of its business, even across a lost connection.
        declared = after
        session.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        wait_for(lambda: {name for name, _ in published} == names)
        assert read == ["old"]
        published.clear()
        stamp = "second"
        wait_for(lambda: published)
        assert published == [("renamed", True)]
        wait_for(lambda: read == ["old", "old ended", "new"])
        # An apply that changes none of the declarations ends nobody's reading.
        stamp = "third"
        insert_events(session, [watch(1, 1, MIDNIGHT)])
        wait_until_applied(platform.engine, seconds=PATIENCE_SECONDS)
        assert read == ["old", "old ended", "new"]
        # A run of dbt leaves no stamp, but another deployment; a domain waits for its sink.
        published.clear()
        session.execute(
            sql.SQL("alter view {} rename to missing").format(
                sql.Identifier(platform.engine.schema, first.sink)
            )
        )
        declared = before
        session.execute("update deployments set checksum = 'other' where relation = %s", [first.sink])
        wait_for(lambda: read[3:] == ["new ended", "old"])
        insert_events(session, [watch(2, 1, MIDNIGHT)])
        wait_until_applied(platform.engine, seconds=PATIENCE_SECONDS)
        assert (first.name, True) not in published
        session.execute(
            sql.SQL("alter view {} rename to {}").format(
                sql.Identifier(platform.engine.schema, "missing"), sql.Identifier(first.sink)
            )
        )
        wait_for(lambda: (first.name, True) in published)
    assert read[-1] == "old ended"
