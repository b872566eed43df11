"""Reserved ids from anybody but the probe come to nothing: in the typed events, at the replay, in the catalogs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from oracle import DAY, SECOND, Message, millis
from relations import insert_events, instant, materialized_views, refresh
from shipped import REGISTRY
from streams import NOW

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.canaries import CanaryKey, canary_events, canary_key
from dagster_prefs.events.raw import RawStoreError
from dagster_prefs.events.rejected import rejected_counts
from dagster_prefs.events.replay import ReplayError, export_rejected, replay_file, replay_unchanged
from dagster_prefs.freshness.canary import send_canary

AT = NOW - 60 * SECOND
FOREIGN = CanaryKey("feedfeedfeedfeed", "ab" * 32)
TYPED = {
    "user.events": "user_events",
    "view_events": "view_events",
    "content_interactions": "content_interactions",
}
DbtOn = Callable[..., Dbt]


class Bench:
    """A deployed database; messages go in one after the other, each a millisecond after the one before."""

    def __init__(self, engine: EngineConfiguration, session: psycopg.Connection, order: list[str]) -> None:
        self.engine = engine
        self.session = session
        self.order = order
        self.sent = 0

    def send(self, topic: str, body: dict[str, Any], source: str = "kafka:t") -> None:
        self.sent += 1
        data = json.dumps(body).encode()
        insert_events(
            self.session, [Message(topic, source, 0, self.sent, data, None, NOW + self.sent * 1000)]
        )

    def refresh(self) -> None:
        refresh(self.session, self.order)

    def typed(self, topic: str) -> int:
        return self.rows(f"select count(*) from {TYPED[topic]}")[0][0]

    def reasons(self) -> list[tuple[str, str]]:
        return self.rows('select topic, reason from rejected_events order by "offset"')

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self.session.execute(query).fetchall()


@pytest.fixture
def bench(deployed: EngineConfiguration, dbt_on: DbtOn) -> Iterator[Bench]:
    with deployed.connect() as session:
        session.execute("select set_config('prefs.clock', %s, false)", (instant(NOW).isoformat(),))
        yield Bench(deployed, session, materialized_views(dbt_on(deployed).manifest()))


def view(viewer: Any, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": "e1", "viewer_id": viewer, "genre": "drama", "watch_duration_sec": 60, "completion_pct": 1,
        "watched_at": AT // 1000, **changes,
    }  # fmt: skip


def like(viewer: Any, **changes: Any) -> dict[str, Any]:
    return {"event_id": "e1", "viewer_id": viewer, "event_type": "like", "event_ts": AT // 1000, **changes}


def purchase(user: Any, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": "e1", "user_id": user, "item_id": "i1", "event_type": "purchase", "category": "A",
        "event_time": AT // 1000, **changes,
    }  # fmt: skip


def proven(bench: Bench, at: int = AT) -> str:
    return canary_key(bench.engine).event_id(millis(at))


def test_no_source_brings_a_reserved_id_in(bench: Bench) -> None:
    for source in ("kafka:view_events", "file:canary#0", "canary", "replay:kafka:t", "simulate:1"):
        for viewer in (-1, "-1", " -1.0", -5, -(2**63)):
            bench.send("view_events", view(viewer), source)
            bench.send("content_interactions", like(viewer), source)
        for user in ("canary:prefs", "canary:", " canary:1", "canary:\\x\\"):
            bench.send("user.events", purchase(user), source)
    bench.send("user.events", purchase("canary"))
    bench.refresh()
    assert Counter(bench.reasons()) == {
        ("view_events", "reserved viewer_id"): 25,
        ("content_interactions", "reserved viewer_id"): 25,
        ("user.events", "reserved user_id"): 20,
    }
    assert bench.rows("select user_id from user_events") == [("canary",)]
    for domain in REGISTRY.contract.domains.values():
        assert bench.rows(f"select * from {domain.relation}") == []


def test_the_canary_of_the_probe_counts_on_every_topic(bench: Bench) -> None:
    send_canary(bench.engine, REGISTRY, instant(AT))
    bench.refresh()
    assert bench.reasons() == []
    assert {topic: bench.typed(topic) for topic in TYPED} == dict.fromkeys(TYPED, 1)


def test_what_a_producer_makes_of_a_canary_it_has_read_is_rejected(bench: Bench) -> None:
    """It comes first, so that a message which the rule let through would win over the canary itself."""
    genuine = view(-1, event_id=proven(bench))
    forged = [
        ({"watched_at": AT // 1000 + 1}, "reserved viewer_id"),
        ({"watched_at": (AT + DAY // 2) // 1000}, "reserved viewer_id"),
        ({"viewer_id": -2}, "reserved viewer_id"),
        ({"viewer_id": 42}, "reserved event_id"),
        ({"event_id": "canary:"}, "reserved viewer_id"),
        ({"event_id": "canary:\\x\\", "viewer_id": 42}, "reserved event_id"),
    ]
    for changes, _ in forged:
        bench.send("view_events", genuine | changes)
    bench.send("view_events", genuine)
    bench.send("view_events", genuine)
    bench.refresh()
    assert bench.reasons() == [("view_events", reason) for _, reason in forged]
    assert bench.rows("select viewer_id, views from viewer_watch_metrics_1d") == [(-1, 1)]


def test_a_copied_canary_that_buys_is_nobodys_pair(bench: Bench) -> None:
    for topic_user in ("u1", "u2"):
        for category in ("A", "B"):
            bench.send(
                "user.events", purchase(topic_user, category=category, event_id=f"{topic_user}{category}")
            )
    for later, category in enumerate(("A", "B", "C")):
        at = AT + later * SECOND
        bench.send(
            "user.events",
            purchase("canary:prefs", category=category, event_id=proven(bench, at), event_time=at // 1000),
        )
    bench.refresh()
    assert bench.reasons() == []
    assert bench.typed("user.events") == 7
    assert bench.rows(
        "select category, related_category, pair_buyers, support from category_cross_affinity_lift order by 1"
    ) == [("A", "B", 2, 1), ("B", "A", 2, 1)]


def test_canaries_of_another_deployment_are_nobodys_business(bench: Bench) -> None:
    for topic, body in canary_events(REGISTRY, FOREIGN, instant(AT)).items():
        bench.send(topic, json.loads(body))
    bench.send("view_events", view(-1, event_id=FOREIGN.event_id(1).replace("feed", "beef")))
    bench.refresh()
    assert {reason for _, reason in bench.reasons()} == {"canary of another deployment"}
    assert {topic: bench.typed(topic) for topic in TYPED} == dict.fromkeys(TYPED, 0)
    assert rejected_counts(bench.engine, open_only=True) == {}
    assert rejected_counts(bench.engine)["view_events"] == {"canary of another deployment": 2}
    assert bench.rows("select distinct canary from view_events_parsed where source_offset <> 4") == [
        (FOREIGN.deployment,)
    ]


def test_a_deployment_has_one_key_until_it_is_deleted(bench: Bench) -> None:
    key = canary_key(bench.engine)
    assert canary_key(bench.engine) == key
    assert key.secret not in repr(key)
    bench.send("view_events", view(-1, event_id=key.event_id(AT // 1000)))
    # A key that a second probe made at the same moment: both are this deployment's.
    later = CanaryKey.random()
    bench.session.execute(
        "insert into canary_keys (deployment, secret_hex, made_at) values (%s, %s, %s)",
        (later.deployment, later.secret, datetime.now(UTC) + timedelta(hours=1)),
    )
    assert canary_key(bench.engine) == later
    bench.send("view_events", view(-1, event_id=later.event_id(AT // 1000 + 1), watched_at=AT // 1000 + 1))
    bench.refresh()
    assert (bench.reasons(), bench.typed("view_events")) == ([], 2)
    bench.session.execute("delete from canary_keys")
    bench.refresh()
    assert {reason for _, reason in bench.reasons()} == {"canary of another deployment"}
    assert canary_key(bench.engine).deployment not in (key.deployment, later.deployment)


def test_a_database_without_the_table_is_told_what_to_run(engine: EngineConfiguration) -> None:
    with pytest.raises(RawStoreError, match=r"no table canary_keys .* create it with `dbt run`"):
        send_canary(engine, REGISTRY, instant(AT))


def test_a_replay_is_never_the_probe(registry: Registry, bench: Bench, tmp_path: Path) -> None:
    """Neither a rejected canary as it is, nor a correction that takes the id of a genuine one."""
    bench.send("view_events", view(-1))
    bench.send("view_events", view(-1, event_id=FOREIGN.event_id(AT // 1000)))
    bench.refresh()
    assert replay_unchanged(bench.engine, registry, now=instant(NOW)).left_out == {"reserved viewer_id": 1}
    exported = tmp_path / "rejected.jsonl"
    assert export_rejected(bench.engine, exported) == 1
    line = json.loads(exported.read_text())
    for identity, reason in (
        ("e9", "reserved viewer_id"),
        (proven(bench), "canary of another deployment"),
    ):
        exported.write_text(json.dumps(line | {"payload": view(-1, event_id=identity)}) + "\n")
        with pytest.raises(ReplayError) as refused:
            replay_file(bench.engine, registry, exported, now=instant(NOW))
        assert refused.value.problems == ((1, reason),)
    exported.write_text(json.dumps(line | {"payload": view(7)}) + "\n")
    assert replay_file(bench.engine, registry, exported, now=instant(NOW)).sent == 1


def test_no_secret_leaves_the_table(bench: Bench, dbt_target: Path) -> None:
    send_canary(bench.engine, REGISTRY, instant(AT))
    bench.refresh()
    secret = canary_key(bench.engine).secret
    assert bench.rows(f"select 1 from deployments where strpos(deployments::text, '{secret}') > 0") == []
    assert bench.rows(f"select 1 from pg_views where strpos(definition, '{secret}') > 0") == []
    assert bench.rows(f"select 1 from raw_view_events where position('{secret}'::bytea in data) > 0") == []
    artifacts = [path for path in dbt_target.rglob("*") if path.is_file()]
    assert artifacts
    assert [path for path in artifacts if secret.encode() in path.read_bytes()] == []
