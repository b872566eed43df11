"""`prefs plan` and `prefs apply` on the embedded engine: what differs, how it goes out, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
from click.testing import CliRunner
from relations import insert_events
from shipped import LONG, REGISTRY, SHORT
from streams import MIDNIGHT, watch
from waiting import PATIENCE_SECONDS, wait_for
from workshop import Workshop

from dagster_prefs.cli import cli
from dagster_prefs.declarations.contract import build_contract, parse_contract
from dagster_prefs.defs import deployment as deployment_checks
from dagster_prefs.deploy.apply import ApplyError, apply_plan
from dagster_prefs.deploy.plan import ContractReview, Plan, PlanError, make_plan
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.live.follower import Follower, Work
from dagster_prefs.live.presence import wait_until_applied
from dagster_prefs.platform import Platform, ProfileStore, review_contract
from dagster_prefs.settings import load_settings

DbtOn = Callable[..., Dbt]
TILE = "models/engagement/viewer_watch_metrics_1d.sql"
TILE_CONTRACT = "models/engagement/viewer_watch_metrics_1d.yml"
ROLLING = "models/engagement/viewer_engagement_rolling.sql"
ROLLING_CONTRACT = "models/engagement/viewer_engagement_rolling.yml"
ROLLING_VIEW = "viewer_engagement_rolling"
WATCHED = ("view_events_parsed", "view_events", "viewer_watch_metrics_1d", ROLLING_VIEW, "tile_fingerprints")
FINGERPRINTS = "models/generated/operations/tile_fingerprints.sql"
# What the builds of changed views leave until they end.
BUILDS = (
    "select relation from live_builds union select relname from pg_class where relname like '%\\_\\_built%'"
)


class Store:
    """Where the items would go; remembers what was asked of it."""

    def __init__(self) -> None:
        self.prepared = 0
        self.reconciled: list[str] = []

    def prepare(self) -> None:
        self.prepared += 1

    def reconcile(self, relation: str) -> str:
        self.reconciled.append(relation)
        return f"{relation} reconciled"


def review(fragments: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> ContractReview:
    """The platform's own review; the contract that is shipped is the one of these models."""
    return review_contract(parse_contract(build_contract(manifest)), fragments, manifest)


class Deployment:
    """The changed copy of the project against one database."""

    def __init__(self, engine: EngineConfiguration, dbt: Dbt) -> None:
        self.engine, self.dbt, self.store = engine, dbt, Store()

    def plan(self, **options: Any) -> Plan:
        return make_plan(self.engine, self.dbt, review, **options)

    def apply(self, **options: Any) -> Plan:
        return apply_plan(self.engine, self.dbt, review, self.store, **options)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return connection.execute(query).fetchall()

    def run(self, *statements: str) -> None:
        with self.engine.connect() as connection:
            for statement in statements:
                connection.execute(statement)


@pytest.fixture
def deployment(deployed: EngineConfiguration, dbt_on: DbtOn, workshop: Workshop) -> Deployment:
    with deployed.connect() as connection:
        insert_events(connection, [watch(n, n % 2, MIDNIGHT) for n in range(4)])
        for view in WATCHED:
            connection.execute("select prefs_rebuild(%s)", [view])
    return Deployment(deployed, dbt_on(deployed, workshop.folder))


class Killed(BaseException):
    """The process ends here; nothing of ours may catch it."""


class Reader(threading.Thread):
    """Reads relations all the time and keeps what it saw; a relation that is missing ends it with the error."""

    def __init__(self, engine: EngineConfiguration, *queries: str) -> None:
        super().__init__(daemon=True)
        self.engine, self.queries, self.stopped = engine, queries, threading.Event()
        self.seen: list[set[Any]] = [set() for _ in queries]
        self.reads = 0
        self.error: psycopg.Error | None = None

    def run(self) -> None:
        try:
            with self.engine.connect() as connection:
                while not self.stopped.wait(0.005):
                    for seen, query in zip(self.seen, self.queries, strict=True):
                        seen.add(connection.execute(query).fetchone())
                    self.reads += 1
        except psycopg.Error as error:
            self.error = error

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join(timeout=60)


def test_a_changed_view_goes_out_though_it_is_killed_at_every_step(
    deployment: Deployment, workshop: Workshop
) -> None:
    workshop.change(TILE, "sum(watch_duration_sec)", "2 * sum(watch_duration_sec)")
    workshop.change("models/generated/events/items.sql", '"title"', '"-- its name\\n  title"')
    plan = deployment.plan()
    layout, changed = sorted(plan.relations, key=lambda relation: relation.name)
    assert (layout.name, layout.action, layout.how) == ("items", "changed", "kept")
    assert (changed.name, changed.action, changed.how) == ("viewer_watch_metrics_1d", "changed", "in place")
    assert "2 * SUM(watch_duration_sec)" in changed.diff
    assert {"viewer_engagement_rolling", "tile_fingerprints"} <= set(changed.views)
    assert changed.sinks == ("sink_engagement_watch",)
    assert f"engagement#watch.watch_minutes_{SHORT}d" in changed.attributes
    assert not any(attribute.startswith("engagement#interactions") for attribute in changed.attributes)
    assert "recommendation_service" in changed.consumers
    assert "changed viewer_watch_metrics_1d (in place)" in plan.text()
    assert plan.as_dict()["changes"] is True
    items = deployment.rows("select 'items'::regclass::oid")
    passed: set[str] = set()

    def die_at_each_step_once(step: str) -> None:
        if step not in passed:
            passed.add(step)
            raise Killed

    minutes = f"select sum(watch_minutes_{LONG}d)::int from viewer_engagement_rolling"
    with Reader(deployment.engine, minutes) as reader:
        for _attempt in range(20):
            try:
                deployment.apply(on_step=die_at_each_step_once)
            except Killed:
                continue
            break
    assert reader.error is None
    assert reader.reads > 10
    assert reader.seen == [{(4,), (8,)}]
    assert {step.split()[0] for step in passed} == {
        "prepare",
        "build",
        "reconcile",
        "viewer_engagement_rolling",
    }
    assert deployment.store.reconciled[-1] == "viewer_engagement_rolling"
    assert deployment.rows("select 'items'::regclass::oid") == items
    assert (
        deployment.rows("select 1 from deployments where kind in ('plan', 'pending') or state <> 'deployed'")
        == []
    )


def test_a_renamed_column_goes_out_with_its_readers_and_nobody_misses_a_view(
    deployment: Deployment, workshop: Workshop
) -> None:
    workshop.change(TILE, "as watch_seconds,", "as seconds_watched,")
    workshop.change(TILE_CONTRACT, "name: watch_seconds", "name: seconds_watched")
    workshop.change(ROLLING, "sum(watch_seconds)", "sum(seconds_watched)")
    text = (workshop.folder / FINGERPRINTS).read_text()
    last = text.rsplit("union all", 1)[1]
    workshop.change(FINGERPRINTS, last, last.replace("watch_seconds", "seconds_watched"))
    with Reader(
        deployment.engine,
        f"select sum(watch_minutes_{LONG}d)::int from viewer_engagement_rolling",
        "select count(*) from sink_engagement_watch",
        "select sum(row_count)::int from tile_fingerprints",
    ) as reader:
        deployment.apply()
    assert reader.error is None
    assert reader.reads > 10
    assert reader.seen == [{(4,)}, {(2,)}, {(2,)}]
    assert deployment.rows("select sum(seconds_watched)::int from viewer_watch_metrics_1d") == [(240,)]
    assert not deployment.plan().changes


def test_an_apply_waits_for_readers_without_locking_what_they_read_next(
    deployment: Deployment, workshop: Workshop
) -> None:
    workshop.change(TILE, "sum(watch_duration_sec)", "2 * sum(watch_duration_sec)")
    waiting = (
        "select 1 from pg_locks join pg_database d on d.oid = database where not granted and datname = %s"
    )
    with ThreadPoolExecutor(1) as beside, deployment.engine.connect() as reader:
        with reader.transaction():
            reader.execute("select count(*) from sink_engagement_watch")
            applied = beside.submit(deployment.apply)
            until = time.monotonic() + 60
            while not reader.execute(waiting, [deployment.engine.database]).fetchone():
                assert not applied.done(), applied.exception()
                assert time.monotonic() < until, "the apply does not wait for the reader"
            reader.execute("set local lock_timeout = '5s'")
            assert reader.execute("select count(*) from viewer_watch_metrics_1d").fetchone() == (2,)
        applied.result()


def test_the_old_rows_are_read_while_the_new_ones_are_computed(
    deployment: Deployment, workshop: Workshop
) -> None:
    """Those of the view that changes, and those of one that stands on it."""
    held = "(select 0 * length(pg_advisory_xact_lock_shared(4711)::text))"
    workshop.change(ROLLING, "sum(watch_seconds)", f"2 * sum(watch_seconds) + {held}")
    minutes = f"select sum(watch_minutes_{LONG}d)::int from viewer_engagement_rolling"
    waiting = "select 1 from pg_locks where not granted and locktype = 'advisory' and objid = 4711"

    def applied(of_the_tile: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        with ThreadPoolExecutor(1) as beside, deployment.engine.connect() as holder:
            with holder.transaction():
                holder.execute("select pg_advisory_xact_lock(4711)")
                running = beside.submit(deployment.apply)
                until = time.monotonic() + 60
                while not holder.execute(waiting).fetchone():
                    assert not running.done(), running.exception()
                    assert time.monotonic() < until, "the apply does not compute the view"
                with deployment.engine.connect() as reader:
                    reader.execute("set lock_timeout = '5s'")
                    assert reader.execute(minutes).fetchone() == (before,)
                    assert reader.execute("select count(*) from sink_engagement_watch").fetchone() == (2,)
                    tile = "select sum(watch_seconds)::int from viewer_watch_metrics_1d"
                    assert reader.execute(tile).fetchone() == (of_the_tile,)
                meanwhile()
            running.result()

    def follow() -> None:
        """The follower goes on: an erasure, and events that it has applied when the new rows are read."""
        work.start()
        deployment.run("insert into erased_subjects values ('viewer', '1', now())")
        with deployment.engine.connect() as writer:
            insert_events(writer, [watch(n, n, MIDNIGHT, seconds=600) for n in (4, 5, 6)])
        wait_for(lambda: deployment.rows(minutes) == [(2 + 30,)])
        assert deployment.rows("select relation, filled from live_builds") == [(ROLLING_VIEW, False)]

    before, stop = 4, threading.Event()
    follower = Follower(deployment.engine, lambda: Work(REGISTRY, lambda *_: None), process="the test")
    work = threading.Thread(target=follower.run, args=[stop])
    with Reader(deployment.engine, minutes) as reading:
        applied(of_the_tile=240, meanwhile=follow)
    wait_until_applied(deployment.engine, seconds=PATIENCE_SECONDS)
    stop.set()
    work.join()
    assert reading.error is None
    # What the follower had applied to the old rows was in the new ones too when they were first read.
    assert (8,) not in reading.seen[0]
    assert deployment.rows(minutes) == [(64,)]
    assert deployment.rows(f"select prefs_rebuild('{ROLLING_VIEW}')") == [(0,)]
    assert deployment.rows(f"select relation from live_due union {BUILDS}") == []
    deployment.run(
        "delete from raw_view_events where source_offset > 3",
        "delete from erased_subjects",
        *(f"select prefs_rebuild('{view}')" for view in WATCHED),
    )
    # The rows of the rolling view stay while those of the changed tile are already there.
    before = 8
    workshop.change(TILE, "sum(watch_duration_sec)", "2 * sum(watch_duration_sec)")
    applied(of_the_tile=480)
    assert deployment.rows(minutes) == [(16,)]


def test_tables_keep_what_arrived(deployment: Deployment, workshop: Workshop) -> None:
    kept = "models/generated/operations/erased_subjects.yml"
    column = (workshop.folder / kept).read_text().split("    columns:\n", 1)[1].splitlines()[0]
    indent = column[: len(column) - len(column.lstrip())]
    added = f'{indent}- {{ name: note, data_type: text, description: "Why." }}\n'
    workshop.change(kept, "    columns:\n", "    columns:\n" + added)
    deployment.run(
        "insert into erased_subjects (subject_kind, subject_id, erased_at) values ('viewer', '7', now())"
    )
    table = deployment.rows("select 'erased_subjects'::regclass::oid")
    (changed,) = deployment.apply().of("changed")
    assert (changed.name, changed.how, changed.add_columns) == ("erased_subjects", "in place", ("note text",))
    assert deployment.rows("select 'erased_subjects'::regclass::oid") == table
    assert deployment.rows("select subject_id, note from erased_subjects") == [("7", None)]

    before = deployment.rows("select * from raw_view_events order by source_offset")
    workshop.change("macros/engine/relations.sql", "data bytea not null,", "data text not null,")
    with pytest.raises(
        PlanError, match="raw_view_events: it holds the events that arrived and is never dropped"
    ):
        deployment.apply()
    assert deployment.rows("select * from raw_view_events order by source_offset") == before


def test_orphans_go_only_when_asked_and_relations_of_others_never(
    deployment: Deployment, workshop: Workshop
) -> None:
    for name in ("user_price_tier_drift.sql", "user_price_tier_drift.yml", "user_price_tier_drift_tests.yml"):
        workshop.remove(f"models/shop/{name}")
    done = deployment.apply()
    assert not done.changes
    (orphan,) = done.relations
    assert (orphan.name, orphan.action, orphan.how) == ("user_price_tier_drift", "orphaned", "")
    assert "--drop-orphans drops it" in orphan.why
    there = "select count(*)::int from pg_class where relname = 'user_price_tier_drift'"
    assert deployment.rows(there) == [(1,)]

    deployment.run("create view somebodys as select user_id from user_price_tier_drift")
    with pytest.raises(ApplyError, match=r"cannot be dropped .*somebodys.*drop what depends on it"):
        deployment.apply(drop_orphans=True)
    assert deployment.rows("select count(*)::int from somebodys") == [(0,)]
    deployment.run("drop view somebodys")
    deployment.apply(drop_orphans=True)
    assert deployment.rows(there) == [(0,)]
    assert deployment.rows("select 1 from deployments where relation ~ 'tier_drift' or kind = 'plan'") == []

    # The name is free now, and somebody takes it before the model comes back.
    workshop.restore()
    deployment.run(
        "create table user_price_tier_drift (precious int)", "insert into user_price_tier_drift values (1)"
    )
    with pytest.raises(PlanError, match="user_price_tier_drift: a relation of this name exists"):
        deployment.apply(drop_orphans=True)
    assert deployment.rows("select precious from user_price_tier_drift") == [(1,)]


def test_a_breaking_change_of_the_contract_needs_a_version(
    deployment: Deployment, workshop: Workshop
) -> None:
    workshop.change(ROLLING, f"    coalesce(short_window.titles, 0)::bigint as titles_{SHORT}d,\n", "")
    text = (workshop.folder / ROLLING_CONTRACT).read_text()
    start = text.index(f"      - name: titles_{SHORT}d")
    workshop.change(ROLLING_CONTRACT, text[start : text.index("      - name: ", start + 1)], "")
    version = REGISTRY.contract.version + 1
    with pytest.raises(
        PlanError, match=rf"titles_{SHORT}d: the attribute is removed\): set version to {version}"
    ):
        deployment.apply()
    assert deployment.rows(f"select count(titles_{SHORT}d)::int from viewer_engagement_rolling") == [(2,)]
    workshop.change(
        "models/generated/operations/deployments.yml", f'"version": {version - 1}', f'"version": {version}'
    )
    changes = deployment.apply().contract.changes
    assert ("breaking", f"engagement#watch.titles_{SHORT}d") in [(one.kind, one.domain) for one in changes]
    assert deployment.rows(
        "select count(*)::int from pg_attribute"
        f" where attrelid = 'viewer_engagement_rolling'::regclass and attname = 'titles_{SHORT}d'"
    ) == [(0,)]
    assert not deployment.plan().changes


def test_a_failed_change_leaves_what_ran_before_and_no_change_is_said_to_be_none(
    deployment: Deployment, workshop: Workshop
) -> None:
    workshop.change(TILE, "sum(watch_duration_sec)", "sum(watch_duration_sec) / 0")
    with pytest.raises(
        ApplyError, match=r"viewer_watch_metrics_1d: .*division by zero.*What ran before still serves"
    ):
        deployment.apply()
    assert deployment.rows("select sum(watch_seconds)::int from viewer_watch_metrics_1d") == [(240,)]
    assert deployment.rows(BUILDS) == []
    workshop.restore()
    deployment.apply()

    objects = (
        "select oid, relname, xmin::text from pg_class where relnamespace = 'public'::regnamespace order by 1"
    )
    records = "select * from deployments order by 1"
    before = deployment.rows(objects), deployment.rows(records)
    reconciled = list(deployment.store.reconciled)
    done = deployment.apply()
    assert not done.changes, done.text()
    assert len(done.unchanged) > 30
    assert "nothing to do" in done.text()
    assert (deployment.rows(objects), deployment.rows(records)) == before
    assert deployment.store.reconciled == reconciled


def test_the_check_reports_drift_stranded_readers_and_leftovers(
    deployment: Deployment, workshop: Workshop
) -> None:
    platform = Platform(load_settings())
    platform.engine, platform.dbt = deployment.engine, deployment.dbt
    definitions = dg.Definitions.merge(
        deployment_checks.build(platform), dg.Definitions(assets=[dg.AssetSpec("deployments")])
    )

    def evaluate() -> dict[str, tuple[bool, Any]]:
        result = definitions.resolve_job_def(deployment_checks.JOB).execute_in_process()
        return {
            one.check_name: (one.passed, one.metadata["found"].value)
            for one in result.get_asset_check_evaluations()
        }

    assert {passed for passed, _ in evaluate().values()} == {True}
    workshop.change(TILE, "count(*) as views", "count(*) + 1 as views")
    deployment.run("create view items__next_0123abcd as select 1 as one")
    assert evaluate() == {
        "no_drift": (False, ["viewer_watch_metrics_1d: changed"]),
        "no_stranded_relations": (True, []),
        "no_leftovers": (False, ["items__next_0123abcd"]),
    }


def test_the_store_publishes_what_the_view_became(
    deployment: Deployment, aws_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_endpoint)
    platform = Platform(load_settings())
    platform.engine = deployment.engine
    store = ProfileStore(platform)
    store.prepare()
    assert store.reconcile(ROLLING_VIEW) == "watch: 2 upserts, 0 deletes"
    deployment.run(
        "delete from raw_view_events where source_offset % 2 = 1",
        *(f"select prefs_rebuild('{view}')" for view in WATCHED),
    )
    assert store.reconcile(ROLLING_VIEW) == "watch: 0 upserts, 1 deletes"
    items = platform.dynamodb().scan(TableName="viewer_profiles")["Items"]
    assert [(item["viewer_id"]["N"], Decimal(item[f"watch_minutes_{LONG}d"]["N"])) for item in items] == [
        ("0", 2)
    ]


def test_the_commands_say_and_do_it(
    deployed: EngineConfiguration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PREFS_ENGINE_PORT", str(deployed.port))
    monkeypatch.setenv("PREFS_ENGINE_DATABASE", deployed.database)

    def prefs(*words: str) -> tuple[Any, str]:
        result = CliRunner().invoke(cli, words, standalone_mode=False)
        if result.exception is not None:
            return type(result.exception), str(result.exception)
        return result.return_value, result.stdout

    with deployed.connect() as connection:
        connection.execute("drop view user_category_affinity_now")
        code, text = prefs("plan")
        assert code == 2
        assert "create user_category_affinity_now\n" in text
        code, text = prefs("apply")
        assert not code
        assert text.endswith("done: the deployed relations match the declarations\n")
        code, text = prefs("plan", "--json")
        assert code == 0
        assert json.loads(text)["relations"] == []
        assert connection.execute("select count(*) from user_category_affinity_now").fetchone() == (0,)
        connection.execute("delete from deployments where relation = 'user_category_affinity_now'")
    code, text = prefs("plan")
    assert code == 1
    assert "refused user_category_affinity_now: a relation of this name exists" in text
    assert prefs("apply")[0] is PlanError
