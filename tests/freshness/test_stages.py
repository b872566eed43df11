"""Each stage is made really stale; exactly the expected measures turn, and turn back."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from psycopg import sql
from shipped import REGISTRY

from dagster_prefs.declarations.contract import FreshnessThresholds
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.dynamodb.lease import Lease
from dagster_prefs.events.progress import waiting_since
from dagster_prefs.freshness.measures import measure_views

READ_OFTEN = ("raw_arrivals", "view_events_parsed", "view_events", "viewer_watch_metrics_1d")
ENGAGEMENT = {f"online/{domain.name}" for domain in REGISTRY.contract.domains.values()}


def test_all_in_step_is_ok_and_stays_ok_when_nothing_arrives(busy: Any) -> None:
    assert busy.bad() == {}
    busy.later(hours=3)
    assert busy.bad() == {}, "a quiet topic is not a stale view"


def test_every_reading_is_served_by_an_index(registry: Registry, busy: Any) -> None:
    """Else a look would cost more with every viewer: PostgreSQL reads a whole table only where it must."""
    busy.execute(
        sql.SQL("alter database {} set enable_seqscan = off").format(sql.Identifier(busy.engine.database))
    )

    def scans() -> dict[str, tuple[int, int]]:
        rows = busy.execute(
            "select relname, seq_scan, idx_scan from pg_stat_user_tables where idx_scan is not null"
        )
        return {name: (whole, by_index) for name, whole, by_index in rows}

    def others() -> bool:
        mine = "datname = current_database() and pid <> pg_backend_pid()"
        return bool(busy.execute(f"select count(*) from pg_stat_activity where {mine}")[0][0])

    def wait_for_others() -> None:
        # A session's counts are there once it is gone.
        deadline = time.monotonic() + 120
        while others():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    wait_for_others()
    before = scans()
    busy.watch(1, age=30)
    assert {measure.level for measure in (*busy.views(), *busy.online())} == {"ok", "error"}
    with busy.engine.connect() as connection:
        assert set(waiting_since(connection, busy.engine, registry)) == {"view_events"}
    wait_for_others()
    after = scans()
    assert {name for name in after if after[name][0] > before[name][0]} == set()
    assert all(after[name][1] > before[name][1] for name in READ_OFTEN)


def test_messages_that_wait_redden_their_topic_alone(busy: Any) -> None:
    busy.watch(1, age=4)
    busy.watch(2, age=1)
    measure = busy.measures()["views/view_events"]
    assert (measure.level, measure.values["waiting"]) == ("warn", 2)
    assert measure.lag_seconds == pytest.approx(4)
    busy.later(seconds=1)
    assert busy.bad() == {"views/view_events": "error"}
    busy.refresh()
    busy.publish()
    busy.export()
    assert busy.bad() == {}


def test_an_invalid_message_is_visible_once_it_was_read(busy: Any) -> None:
    busy.arrive("user.events", "{", age=10)
    assert busy.bad() == {"views/user_events": "error"}
    busy.refresh()
    assert busy.bad() == {}


def test_a_view_that_was_not_refreshed_is_named(busy: Any) -> None:
    busy.shop("u2", age=30)
    busy.refresh("user_events_parsed", "user_events", "user_category_profile", age=20)
    assert busy.bad() == {
        "views/user_brand_profile": "error",
        "views/user_recent_activity": "error",
        "views/user_recent_sequence": "error",
        "views/user_category_affinity_decayed": "error",
    }
    busy.refresh()
    assert busy.bad() == {}


def test_typed_events_that_lag_behind_their_parsed_messages(busy: Any) -> None:
    busy.watch(3, age=30)
    busy.refresh("view_events_parsed", age=20)
    measure = busy.measures()["views/view_events"]
    assert (measure.level, measure.values["waiting"]) == ("error", 1)
    assert measure.lag_seconds == pytest.approx(30)
    busy.refresh()
    busy.publish()
    busy.export()
    assert busy.bad() == {}


def test_what_stands_still_is_not_hidden_by_what_keeps_coming(busy: Any) -> None:
    """Typed events and a view that no refresh reaches, while messages come and their upstream is refreshed."""
    for age in (50, 40, 20, 2):
        busy.watch(3, age=age)
        busy.shop("u3", age=age)
    busy.refresh("view_events_parsed", "user_events_parsed", "user_events", "user_category_profile", age=1)
    measures = busy.measures()
    typed, view = measures["views/view_events"], measures["views/user_brand_profile"]
    assert (typed.level, view.level) == ("error", "error")
    assert 25 <= (typed.lag_seconds or 0) <= 50
    assert view.lag_seconds == pytest.approx(50)


def test_an_erased_subject_is_not_missing(busy: Any) -> None:
    busy.shop("gone", age=30)
    busy.execute(
        "insert into erased_subjects (subject_kind, subject_id, erased_at) values ('shop_user', 'gone', %s)",
        [busy.now],
    )
    busy.refresh()
    assert busy.bad() == {}


def test_old_events_outside_every_window_are_not_missing(world: Any) -> None:
    world.watch(1, age=10, days_ago=60)
    world.like(1, age=10, days_ago=60)
    world.refresh()
    world.publish()
    world.export()
    assert world.bad() == {}


def test_an_event_from_the_future_is_a_warning(busy: Any) -> None:
    busy.shop("u3", days_ago=-0.5)
    busy.refresh()
    bad = busy.bad()
    assert set(bad.values()) == {"warn"}
    assert "views/user_events" in bad
    reason = busy.measures()["views/user_events"].reason
    assert "future" in reason
    assert "clocks" in reason


def test_an_engine_whose_clock_is_ahead_is_unknown_and_not_green(busy: Any) -> None:
    busy.watch(1, age=-3600)
    measure = busy.measures()["views/view_events"]
    assert (measure.level, measure.lag_seconds) == ("unknown", 0)
    assert "arrived 3600 s in the future" in measure.reason


def test_a_publisher_that_stopped_reddens_every_domain(busy: Any) -> None:
    for viewer in range(5):
        busy.watch(viewer, age=20)
        busy.like(viewer, age=20)
    busy.refresh(age=10)
    assert busy.bad() == dict.fromkeys(ENGAGEMENT, "error")
    measure = busy.measures()["online/watch"]
    assert measure.values["different"] == 5
    assert measure.lag_seconds == pytest.approx(10)
    assert "last_event_at" in measure.notes["attributes"]
    assert "materialize online/watch" in measure.reason
    busy.publish()
    assert busy.bad() == {}


def test_missing_and_extra_items_are_told_apart(busy: Any) -> None:
    key = {"viewer_id": {"N": "7"}, "domain_key": {"S": "engagement#watch"}}
    item = busy.client.get_item(TableName=busy.table.name, Key=key)["Item"]
    busy.client.delete_item(TableName=busy.table.name, Key=key)
    busy.client.put_item(TableName=busy.table.name, Item=item | {"viewer_id": {"N": "4711"}})
    busy.later(seconds=30)
    (watch,) = [measure for measure in busy.online() if measure.name == "watch"]
    assert (watch.values["missing"], watch.values["extra"], watch.values["different"]) == (1, 1, 0)
    assert watch.level == "error"
    assert watch.notes["ids"] == "7, 4711"
    (followed,) = (one for one in busy.online(publishes=False, follows=True) if one.name == "watch")
    assert "run `prefs publish --full`" in followed.reason
    assert "reconcile" not in followed.reason


def test_a_fresh_difference_is_not_yet_late(busy: Any) -> None:
    busy.watch(1)
    busy.refresh(age=1)
    measures = {measure.name: measure for measure in busy.online()}
    assert measures["watch"].values["different"] == 1
    assert measures["watch"].level == "ok"
    busy.later(seconds=2)
    assert {measure.level for measure in busy.online() if measure.name == "watch"} == {"warn"}


def test_a_difference_from_the_future_is_unknown_and_not_green(busy: Any) -> None:
    """The engine's clock is ahead, or ours is behind: the age of what differs cannot be told."""
    busy.watch(1, age=-3600)
    busy.refresh(age=-3600)
    watch = {measure.name: measure for measure in busy.online()}["watch"]
    assert (watch.level, watch.lag_seconds, watch.values["different"]) == ("unknown", 0, 1)
    assert "became visible 3600 s in the future" in watch.reason
    busy.publish()
    assert {measure.level for measure in busy.online()} == {"ok"}


def test_a_difference_of_unknown_age_is_watched_for_as_long_as_the_promise(busy: Any) -> None:
    key = {"viewer_id": {"N": "4711"}, "domain_key": {"S": "engagement#watch"}}
    busy.client.put_item(TableName=busy.table.name, Item=key)
    busy.execute("delete from deployments where relation = 'viewer_engagement_rolling'")
    waits: list[float] = []
    measures = {measure.name: measure for measure in busy.online(wait=waits.append)}
    assert waits == [busy.contract.domain("watch").freshness.error_seconds]
    assert (measures["watch"].level, measures["watch"].values["extra"]) == ("error", 1)

    def published(seconds: float) -> None:
        busy.client.delete_item(TableName=busy.table.name, Key=key)

    measures = {measure.name: measure for measure in busy.online(wait=published)}
    assert (measures["watch"].level, measures["watch"].values["extra"]) == ("ok", 0)


def test_a_sink_that_stands_still_is_named_as_stuck(busy: Any) -> None:
    """RisingWave's row times, in whose stead the last refresh stands here, tell it from single losses."""
    for viewer in range(40):
        busy.watch(viewer, age=20)
    busy.refresh(age=10)
    stuck = {m.name: m for m in busy.online(publishes=False)}["watch"]
    assert "the sink sink_engagement_watch is stuck: drop it" in stuck.reason
    busy.publish()
    busy.client.delete_item(
        TableName=busy.table.name, Key={"viewer_id": {"N": "7"}, "domain_key": {"S": "engagement#watch"}}
    )
    single = {m.name: m for m in busy.online(publishes=False)}["watch"]
    assert single.level == "error"
    assert "run `prefs reconcile`" in single.reason


def test_a_follower_that_does_not_run_is_seen_before_anything_lags(busy: Any) -> None:
    def watch() -> Any:
        (measure,) = (m for m in busy.online(publishes=False, follows=True) if m.name == "watch")
        return measure

    nobody = watch()
    assert (nobody.level, nobody.lag_seconds) == ("warn", 0)
    assert "it has never been published: run `prefs publish --follow`" in nobody.reason
    lease = Lease(
        busy.store("watch"),
        label="host:1",
        mode="follow",
        lease_seconds=10,
        wall=lambda: busy.now.timestamp(),
    )
    assert lease.acquire(threading.Event())
    lease.record("feed", round(busy.now.timestamp() * 1000) - 4000, refused=0)
    busy.later(seconds=5)
    alive = watch()
    assert (alive.level, alive.notes["publisher"]) == ("ok", "host:1")
    assert alive.values["token_age_seconds"] == pytest.approx(9, abs=0.01)
    assert alive.values["follower_silent_seconds"] == pytest.approx(5, abs=0.01)
    busy.later(seconds=-600)
    ahead = watch()
    assert ahead.level == "unknown"
    assert "host:1 was last heard 595 s in the future" in ahead.reason
    busy.later(seconds=660)
    silent = watch()
    assert silent.level == "error"
    assert "host:1 has been silent for 65 s: start `prefs publish --follow`" in silent.reason
    lease.record("feed", None, refused=2)
    assert (watch().level, watch().values["refused_rows"]) == ("error", 2)
    lease.record("feed", None, refused=0)
    lease.release()
    stopped = watch()
    assert stopped.level == "warn"
    assert "host:1 was stopped 0 s ago" in stopped.reason


class Broken:
    """A DynamoDB client that refuses one operation, or leaves all of it unprocessed."""

    def __init__(self, client: Any, operation: str, error: Exception | None = None) -> None:
        self._client = client
        self._operation = operation
        self._error = error

    def __getattr__(self, name: str) -> Any:
        if name != self._operation:
            return getattr(self._client, name)

        def refuse(**arguments: Any) -> Any:
            if self._error:
                raise self._error
            return {"Responses": {}, "UnprocessedKeys": arguments["RequestItems"]}

        return refuse


@pytest.mark.parametrize(
    ("operation", "error", "said"),
    [
        ("batch_get_item", EndpointConnectionError(endpoint_url="http://nowhere"), "cannot be reached"),
        (
            "scan",
            ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, "Scan"),
            "refused",
        ),
        ("batch_get_item", None, "unprocessed"),
    ],
)
def test_dynamodb_that_does_not_answer_is_unknown(
    busy: Any, monkeypatch: pytest.MonkeyPatch, operation: str, error: Exception | None, said: str
) -> None:
    monkeypatch.setattr("dagster_prefs.freshness.online.time.sleep", lambda seconds: None)
    measures = busy.online(client=Broken(busy.client, operation, error))
    assert {measure.level for measure in measures} == {"unknown"}
    assert all(said in measure.reason for measure in measures)


def test_a_day_that_changed_after_its_export_is_named(busy: Any) -> None:
    busy.watch(1, age=10, days_ago=1)
    busy.refresh()
    busy.publish()
    bad = busy.bad()
    assert bad == {"offline/viewer_watch_daily": "warn", "offline/viewer_genre_daily": "warn"}
    measure = busy.measures()["offline/viewer_watch_daily"]
    assert measure.values == {"days_missing": 0, "days_changed": 1, "days_foreign": 0}
    assert (busy.today - timedelta(days=1)).isoformat() in measure.reason
    busy.export()
    assert busy.bad() == {}


def test_a_day_that_was_never_exported_ages(busy: Any) -> None:
    busy.watch(1, age=10, days_ago=9)
    busy.refresh()
    busy.publish()
    measure = busy.measures()["offline/viewer_watch_daily"]
    assert measure.level == "error"
    assert measure.values == {"days_missing": 1, "days_changed": 0, "days_foreign": 0}
    midnight = busy.now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=8)
    assert measure.lag_seconds == pytest.approx((busy.now - midnight).total_seconds())
    busy.export()
    assert busy.bad() == {}


def test_rows_that_only_the_table_has_are_kept_by_an_export_and_wrong_of_a_sink(busy: Any) -> None:
    busy.execute("delete from raw_view_events where convert_from(data, 'utf8') like '%\"viewer_id\": 3,%'")
    busy.refresh()
    assert {measure.level for measure in busy.offline()} == {"ok"}
    by_sink = {measure.name: measure for measure in busy.offline(by_sink=True)}
    assert by_sink["viewer_watch_daily"].values == {"days_missing": 0, "days_changed": 1, "days_foreign": 0}
    assert by_sink["viewer_watch_daily"].level == "warn"
    assert by_sink["viewer_interactions_daily"].level == "ok"


def test_today_is_never_missing_in_the_training_tables(world: Any) -> None:
    world.watch(1)
    world.refresh()
    assert {measure.level for measure in world.offline()} == {"ok"}


def test_an_engine_that_is_down_is_unknown_everywhere(world: Any) -> None:
    world.engine = replace(world.engine, port=1)
    measures = world.measures().values()
    assert {measure.level for measure in measures} == {"unknown"}
    assert all("cannot be reached" in measure.reason for measure in measures)


def test_a_missing_relation_hides_no_other(busy: Any) -> None:
    busy.execute("drop view user_brand_profile__query")
    busy.execute("drop table user_brand_profile")
    bad = busy.bad()
    assert bad == {"views/user_brand_profile": "unknown"}
    assert "run `dbt build` first" in busy.measures()["views/user_brand_profile"].reason


def test_a_threshold_missing_from_the_contract_is_unknown(busy: Any) -> None:
    freshness = busy.contract.freshness
    contract = replace(
        busy.contract,
        freshness=FreshnessThresholds({}, freshness.views, freshness.export, freshness.canary),
    )
    levels = {
        m.name: m for m in measure_views(busy.engine, replace(REGISTRY, contract=contract), now=busy.now)
    }
    assert levels["user_events"].level == "unknown"
    assert "no freshness threshold for topic user.events" in levels["user_events"].reason
    assert levels["user_brand_profile"].level == "ok"


def test_a_refresh_at_work_softens_an_error(busy: Any) -> None:
    busy.watch(1, age=30)
    with busy.engine.connect() as dbt:
        dbt.execute("set application_name to 'dbt'")
        measure = busy.measures()["views/view_events"]
        assert measure.level == "warn"
        assert "a refresh is running" in measure.reason
    assert busy.measures()["views/view_events"].level == "error"
