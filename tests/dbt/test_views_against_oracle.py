"""Every relation equals the oracle, on random streams, as time passes, and on real shop events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DAY, HOUR, SECOND, Erasure, Message, Oracle
from psycopg import sql
from relations import differences, insert_events, instant, materialized_views, refresh, replace_events
from shipped import LONG, REGISTRY, SHORT
from streams import MIDNIGHT, NOW, messages, quick, touch, watch
from workshop import assert_all_ok

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.engine.spreads import spreads_in_force

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "rees46-2019-10-sample.csv"
SPREAD = 7_200
ROLLING = ["viewer_engagement_rolling", "content_interactions_rolling", "viewer_preferences_rolling"]
# What `dbt run` computes anew: the sinks and tables beside them stay as they are.
VIEWS = ["config.materialized:materialized_view", "config.materialized:view"]
DbtOn = Callable[..., Dbt]


@pytest.fixture
def session(deployed: EngineConfiguration) -> Iterator[psycopg.Connection]:
    with deployed.connect() as connection:
        # Nothing here must survive a crash of the machine.
        connection.execute("set synchronous_commit to off")
        yield connection


@pytest.fixture
def order(deployed: EngineConfiguration, dbt_on: DbtOn) -> list[str]:
    return materialized_views(dbt_on(deployed).manifest())


def set_clock(connection: psycopg.Connection, clock: int) -> None:
    connection.execute("select set_config('prefs.clock', %s, false)", (instant(clock).isoformat(),))


def books_balance(connection: psycopg.Connection, oracle: Oracle) -> None:
    """raw = typed + rejected + duplicates + suppressed, with the engine's own counts on the left."""
    for topic, raw, typed in (
        ("user.events", "raw_user_events", "user_events"),
        ("view_events", "raw_view_events", "view_events"),
        ("content_interactions", "raw_content_interactions", "content_interactions"),
    ):
        row = connection.execute(
            sql.SQL(
                "select (select count(*) from {}), (select count(*) from {}),"
                " (select count(*) from rejected_events where topic = %s)"
            ).format(sql.Identifier(raw), sql.Identifier(typed)),
            (topic,),
        ).fetchone()
        assert row is not None
        assert row[0] == row[1] + row[2] + oracle.duplicates[topic] + oracle.suppressed[topic]


@settings(quick, max_examples=40)
@given(stream=messages())
def test_random_streams(session: psycopg.Connection, order: list[str], stream: list[Message]) -> None:
    replace_events(session, stream)
    set_clock(session, NOW)
    refresh(session, order)
    oracle = Oracle(stream, NOW)
    assert differences(session, oracle) == {}
    books_balance(session, oracle)


@settings(quick, max_examples=15)
@given(
    stream=messages(max_size=40),
    later=st.lists(
        st.sampled_from(
            [
                1, 11 * HOUR + 30 * 60 * SECOND, SHORT * DAY, (SHORT + 1) * DAY, 14 * DAY, LONG * DAY,
                (LONG + 1) * DAY, 105 * DAY,
            ]
        ),
        min_size=1, max_size=3,
    ),
)  # fmt: skip
def test_time_passes_without_an_event(
    session: psycopg.Connection, order: list[str], stream: list[Message], later: list[int]
) -> None:
    replace_events(session, stream)
    for clock in [NOW, *(NOW + wait for wait in sorted(later))]:
        set_clock(session, clock)
        refresh(session, order)
        assert differences(session, Oracle(stream, clock)) == {}


@settings(quick, max_examples=20)
@given(
    stream=messages(max_size=40),
    erased=st.dictionaries(
        st.sampled_from(
            [("viewer", "1"), ("viewer", "-1"), ("viewer", "u1"), ("shop_user", "u1"), ("shop_user", "1")]
        ),
        st.integers(NOW - 30 * DAY, NOW),
        max_size=4,
    ),
)
def test_erased_subjects_stay_out(
    session: psycopg.Connection,
    order: list[str],
    stream: list[Message],
    erased: dict[tuple[str, str], int],
) -> None:
    erasures = [Erasure(kind, subject, at) for (kind, subject), at in erased.items()]
    replace_events(session, stream, erasures)
    set_clock(session, NOW)
    refresh(session, order)
    oracle = Oracle(stream, NOW, erased=erasures)
    assert differences(session, oracle) == {}
    books_balance(session, oracle)


def test_parallel_plans_read_the_same(session: psycopg.Connection, order: list[str]) -> None:
    """Large raw tables are scanned by several workers; what a message says must not depend on it."""
    bodies = [b"true", b"null", b"[]", b"{}", b"nope", b"\xff", b'{"event_id":"a\\u0000b"}', b"[" * 100_000]
    stream = [watch(n, n % 7, MIDNIGHT + n * SECOND) for n in range(500)]
    stream += [Message("view_events", "bad", 0, n, body, None, NOW) for n, body in enumerate(bodies)]
    replace_events(session, stream)
    set_clock(session, NOW)
    for setting in ("min_parallel_table_scan_size", "parallel_setup_cost", "parallel_tuple_cost"):
        session.execute(sql.SQL("set {} to 0").format(sql.Identifier(setting)))
    session.execute("analyze")
    refresh(session, order)
    assert differences(session, Oracle(stream, NOW)) == {}


def version(source: str, price: int, arrived_at: int, item: str = "i", place: int = 0) -> Message:
    """A version of an item, told by its price."""
    body = {"item_id": item, "title": "t", "price": price}
    return Message("items", source, 0, place, json.dumps(body).encode(), None, arrived_at)


def test_history_never_overwrites_reference_data_from_kafka(
    session: psycopg.Connection, order: list[str]
) -> None:
    """Whatever arrives later, and whatever time of arrival is given to it: only Kafka follows Kafka."""
    kafka = [version("kafka:items", 1, NOW - DAY), version("kafka:items#2", 2, NOW - DAY // 2)]
    history = [version("file:kafka:items#1", 3, NOW), version("simulate:7", 4, NOW + DAY)]
    corrected = version("replay:kafka:items", 5, NOW - DAY // 4)
    corrected_history = version("replay:replay:file:h#1", 6, NOW + DAY)
    steps: list[tuple[list[Message], int]] = [
        (history[:1], 3),
        (history, 4),
        ([*history, kafka[0]], 1),
        ([*history, *kafka, corrected_history], 2),
        ([*history, *kafka, corrected_history, corrected], 5),
    ]
    for delivered, price in steps:
        stream = [*delivered, version("file:h#1", 9, NOW, "only in history", 7)]
        replace_events(session, stream)
        refresh(session, order)
        assert differences(session, Oracle(stream, NOW), ["items"]) == {}
        found = session.execute("select item_id, price from items order by 1").fetchall()
        assert found == [("i", price), ("only in history", 9)]


def test_a_sequence_holds_the_last_fifty_in_order(session: psycopg.Connection, order: list[str]) -> None:
    """Sixty events of few moments, in no order of arrival: ties go by event_id, and the rest is cut."""
    numbers = [n * 37 % 60 for n in range(60)]
    stream = [watch(n, 7, MIDNIGHT - n // 20 * SECOND - n % 2) for n in numbers]
    stream += [watch(100 + n, 8, MIDNIGHT) for n in range(50)]
    bought = [
        {
            "event_id": f"b{n}",
            "user_id": "u",
            "item_id": n % 3 or None,
            "event_type": "view",
            "event_time": n % 5,
        }
        for n in numbers
    ]
    for body in bought:
        body["event_time"] = instant(MIDNIGHT - int(str(body["event_time"])) * SECOND).isoformat()
    stream += [
        Message("user.events", "shop", 0, n, json.dumps(body).encode(), None, NOW)
        for n, body in enumerate(bought)
    ]
    replace_events(session, stream)
    set_clock(session, NOW)
    refresh(session, order)
    sequences = ["viewer_recent_sequence", "user_recent_sequence"]
    assert differences(session, Oracle(stream, NOW), sequences) == {}
    lengths = "select cardinality(recent_content_ids) from viewer_recent_sequence order by viewer_id"
    assert session.execute(lengths).fetchall() == [(50,), (50,)]


def test_spread_rolls_viewers_over_one_after_another(deployed: EngineConfiguration, dbt_on: DbtOn) -> None:
    """With a spread, each viewer's day begins abs(viewer_id) mod spread seconds after midnight."""
    before = datetime.now(UTC)
    spread = dbt_on(deployed, environment={"PREFS_EXPIRY_SPREAD_SECONDS": str(SPREAD)})
    # Of the viewers below 0 there is only the canary.
    viewers = [0, 1, -1, 3_600, 7_199, 7_200, 2**63 - 1]
    stream = [watch(index, viewer, MIDNIGHT - LONG * DAY) for index, viewer in enumerate(viewers)]
    stream += [touch(index, viewer, MIDNIGHT - LONG * DAY) for index, viewer in enumerate(viewers)]
    with deployed.connect() as connection:
        replace_events(connection, stream)
    assert_all_ok(spread.run("run", VIEWS))
    order = materialized_views(spread.manifest())
    sizes = []
    with deployed.connect() as connection:
        for after in (-1, 0, 1, 2, 3_599, 3_600, 3_601, 7_199, 7_200):
            clock = MIDNIGHT + DAY + after * SECOND
            set_clock(connection, clock)
            refresh(connection, order)
            assert differences(connection, Oracle(stream, clock, SPREAD)) == {}
            found = connection.execute("select count(*) from viewer_engagement_rolling").fetchone()
            assert found is not None
            sizes.append(found[0])
    assert sizes[0] == len(viewers)
    assert sizes[-1] == 0
    assert len(set(sizes)) > 4
    # The template was deployed without a spread; a training value of that time is one without.
    domains = REGISTRY.contract.domains
    recorded = spreads_in_force(deployed, domains.values(), default=-1)
    assert {name: [seconds for _, seconds in found] for name, found in recorded.items()} == {
        domain.name: [0, SPREAD] for domain in domains.values()
    }
    assert all(before < at <= datetime.now(UTC) for ((_, _), (at, _)) in recorded.values())


def test_the_clock_of_the_database_moves_a_dbt_run(deployed: EngineConfiguration, dbt_on: DbtOn) -> None:
    """What `dbt run` refreshes is as of the clock: values fall and rows leave with no new event."""
    stream = [
        watch(1, 7, MIDNIGHT - (SHORT + 1) * DAY),
        watch(2, 7, MIDNIGHT),
        watch(3, 8, MIDNIGHT - LONG * DAY),
    ]
    with deployed.connect() as connection:
        insert_events(connection, stream)
    seen = []
    for clock in (NOW, NOW + (SHORT + 1) * DAY, NOW + (LONG + 1) * DAY):
        with deployed.connect() as connection:
            connection.execute(
                sql.SQL("alter database {} set prefs.clock = {}").format(
                    sql.Identifier(deployed.database), sql.Literal(instant(clock).isoformat())
                )
            )
        assert_all_ok(dbt_on(deployed).run("run", VIEWS))
        with deployed.connect() as connection:
            assert differences(connection, Oracle(stream, clock)) == {}
            seen.append(
                connection.execute(
                    f"select viewer_id, watch_minutes_{SHORT}d, watch_minutes_{LONG}d"
                    " from viewer_engagement_rolling order by 1"
                ).fetchall()
            )
    assert [[(row[0], int(row[1]), int(row[2])) for row in rows] for rows in seen] == [
        [(7, 1, 2), (8, 0, 1)],
        [(7, 0, 2)],
        [],
    ] or pytest.fail(f"unexpected windows: {seen}")


def test_fingerprint_sees_any_change_and_no_order(session: psycopg.Connection, order: list[str]) -> None:
    """The same rows in another order of arrival give the same hash; one second more gives another."""
    stream = [watch(n, n % 3, MIDNIGHT + n * SECOND) for n in range(12)]
    backwards = [
        Message(
            m.topic, m.source, m.partition, 100 - m.offset, m.data, m.kafka_timestamp, m.arrived_at - m.offset
        )
        for m in reversed(stream)
    ]
    changed = [*stream[:-1], watch(11, 11 % 3, MIDNIGHT + 11 * SECOND, seconds=61)]
    hashes = []
    for version in (stream, backwards, changed):
        replace_events(session, version)
        refresh(session, order)
        hashes.append(
            session.execute(
                "select content_hash from tile_fingerprints where tile = 'viewer_watch_metrics_1d'"
            ).fetchall()
        )
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"the REES46 sample is not at {SAMPLE.name} in shared/data")
def test_real_shop_events(
    registry: Registry, session: psycopg.Connection, deployed: EngineConfiguration, order: list[str]
) -> None:
    """The public sample, through the product's own reader of files."""
    ingest = pytest.importorskip("dagster_prefs.events.ingest")
    ingest.ingest_file(deployed, registry, SAMPLE, ingest.FileOptions("user.events"))
    rows = session.execute(
        "select source, source_partition, source_offset, data,"
        " (extract(epoch from arrived_at) * 1000000)::bigint from raw_user_events"
    ).fetchall()
    stream = [Message("user.events", *row[:3], bytes(row[3]), None, row[4]) for row in rows]
    assert len(stream) == 1_000
    clock = max(m.arrived_at for m in stream)
    set_clock(session, clock)
    refresh(session, order)
    oracle = Oracle(stream, clock)
    assert len(oracle.shop) > 900
    assert differences(session, oracle) == {}
