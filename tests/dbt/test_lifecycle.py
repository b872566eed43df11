"""What `dbt run` does to a database that already holds something: changes, refusals, interruptions."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from declared import COURSES
from psycopg import sql
from relations import insert_events
from streams import MIDNIGHT, watch
from waiting import wait_for
from warm import Warm, WarmProcess
from workshop import PROJECT, Workshop, assert_all_ok

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt, NodeResult
from dagster_prefs.local.services import LocalServices

DbtOn = Callable[..., Dbt]
TILE = "models/engagement/viewer_watch_metrics_1d.sql"
TILE_CONTRACT = "models/engagement/viewer_watch_metrics_1d.yml"
ROLLING = "models/engagement/viewer_engagement_rolling.sql"


def picture(engine: EngineConfiguration) -> dict[str, tuple[Any, ...]]:
    """Relation → kind, definition, number of indexes, comments and who may read it."""
    with engine.connect() as connection:
        rows = connection.execute(
            "select c.relname, c.relkind::text, case when c.relkind in ('v', 'm') then pg_get_viewdef(c.oid) end,"
            " (select count(*) from pg_index where indrelid = c.oid),"
            " (select string_agg(objsubid || description, '|' order by objsubid) from pg_description"
            "   where objoid = c.oid and classoid = 'pg_class'::regclass),"
            " c.relacl::text"
            " from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind in ('v', 'm', 'r')"
        ).fetchall()
    return {row[0]: tuple(row[1:]) for row in rows}


def scalar(engine: EngineConfiguration, query: str) -> Any:
    with engine.connect() as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def failure(results: list[NodeResult], name: str) -> str:
    """The message of the one model that failed."""
    failed = {result.name: result.message for result in results if result.status == "error"}
    assert list(failed) == [name]
    return failed[name]


def test_second_run_replaces_nothing(deployed: EngineConfiguration, dbt_on: DbtOn) -> None:
    query = "select array_agg(oid || relname order by oid) from pg_class where relnamespace = 'public'::regnamespace"
    before, pictured = scalar(deployed, query), picture(deployed)
    results = dbt_on(deployed).run("run")
    assert_all_ok(results)
    assert scalar(deployed, query) == before
    assert picture(deployed) == pictured
    models = {result.name for result in results if result.unique_id.startswith("model.")}
    deployed_now = scalar(deployed, "select array_agg(relation) from deployments where state = 'deployed'")
    assert models <= set(deployed_now)


def test_changed_sql_of_one_model_is_applied_and_its_dependents_stay(
    deployed: EngineConfiguration, dbt_on: DbtOn, workshop: Workshop
) -> None:
    with deployed.connect() as connection:
        insert_events(connection, [watch(n, n % 2, MIDNIGHT) for n in range(4)])
        connection.execute("grant select on viewer_watch_metrics_1d, viewer_engagement_rolling to public")
        connection.execute(
            "create view somebodys_report as select viewer_id, views from viewer_watch_metrics_1d"
        )
    assert_all_ok(dbt_on(deployed).run("run"))
    before = picture(deployed)
    workshop.change(TILE, "count(*) as views", "count(*) + 100 as views")
    results = dbt_on(deployed, workshop.folder).run("run", ["viewer_watch_metrics_1d"])
    assert_all_ok(results)
    after = picture(deployed)
    assert after.keys() == before.keys()
    assert "+ 100" in after["viewer_watch_metrics_1d__query"][1]
    assert "+ 100" in scalar(
        deployed, "select definition from deployments where relation = 'viewer_watch_metrics_1d'"
    )
    unchanged = {name for name in before if name != "viewer_watch_metrics_1d__query"}
    # deployments is compared by its shape only, as every table is.
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    # Dependents were recreated on the new rows, the views of others included.
    assert scalar(deployed, "select sum(views) from somebodys_report") == 204
    assert scalar(deployed, "select count(*) from viewer_engagement_rolling") == 2
    assert scalar(deployed, "select count(*) from sink_engagement_watch") == 2


def test_a_change_that_breaks_a_dependent_is_refused(
    deployed: EngineConfiguration, dbt_on: DbtOn, workshop: Workshop
) -> None:
    before = picture(deployed)
    workshop.change(TILE, "as watch_seconds,", "as seconds_watched,")
    workshop.change(TILE_CONTRACT, "name: watch_seconds", "name: seconds_watched")
    message = failure(
        dbt_on(deployed, workshop.folder).run("run", ["viewer_watch_metrics_1d"]), "viewer_watch_metrics_1d"
    )
    assert "the changed viewer_watch_metrics_1d breaks" in message
    assert "watch_seconds" in message
    assert "Nothing was changed" in message
    assert picture(deployed) == before
    # The same run over everything changes nothing either, because no dependent was changed with it.
    failed = dbt_on(deployed, workshop.folder).run("run", ["viewer_watch_metrics_1d+"])
    assert failure(failed, "viewer_watch_metrics_1d") == message
    assert picture(deployed) == before


def test_a_renamed_column_goes_through_when_its_readers_change_with_it(
    deployed: EngineConfiguration, dbt_on: DbtOn, workshop: Workshop
) -> None:
    before = picture(deployed)
    workshop.change(TILE, "as watch_seconds,", "as seconds_watched,")
    workshop.change(TILE_CONTRACT, "name: watch_seconds", "name: seconds_watched")
    workshop.change(ROLLING, "sum(watch_seconds)", "sum(seconds_watched)")
    fingerprints = "models/generated/operations/tile_fingerprints.sql"
    text = (workshop.folder / fingerprints).read_text()
    others, last = text.rsplit("union all", 1)
    workshop.change(fingerprints, last, last.replace("watch_seconds", "seconds_watched"))
    assert others in (workshop.folder / fingerprints).read_text()
    assert_all_ok(dbt_on(deployed, workshop.folder).run("run", ["viewer_watch_metrics_1d+"]))
    assert picture(deployed).keys() == before.keys()
    assert scalar(deployed, "select count(seconds_watched) from viewer_watch_metrics_1d") == 0


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("count(*) as views", "count(*)::int as views", "views integer"),
        ("count(*) as views", "count(*) as plays", "plays bigint"),
        ("max(watched_at) as last_event_at", "max(watched_at) as last_event_at, 1 as more", "more integer"),
    ],
    ids=["wrong type", "wrong name", "too many"],
)  # fmt: skip
def test_a_broken_contract_is_refused(
    deployed: EngineConfiguration, dbt_on: DbtOn, workshop: Workshop, old: str, new: str, found: str
) -> None:
    before = picture(deployed)
    workshop.change(TILE, old, new)
    message = failure(
        dbt_on(deployed, workshop.folder).run("run", ["viewer_watch_metrics_1d"]), "viewer_watch_metrics_1d"
    )
    assert "the columns of viewer_watch_metrics_1d are not those of its contract" in message
    assert found in message
    assert "Change the SQL or the YAML" in message
    assert picture(deployed) == before


def test_a_contract_is_also_about_order(
    deployed: EngineConfiguration, dbt_on: DbtOn, workshop: Workshop
) -> None:
    before = picture(deployed)
    workshop.change(TILE, "    viewer_id,\n", "")
    workshop.change(TILE, "max(watched_at) as last_event_at", "max(watched_at) as last_event_at, viewer_id")
    message = failure(
        dbt_on(deployed, workshop.folder).run("run", ["viewer_watch_metrics_1d"]), "viewer_watch_metrics_1d"
    )
    assert "It has: watch_date date, watch_seconds bigint" in message
    assert picture(deployed) == before


@pytest.mark.parametrize(
    "ddl",
    [
        "create table user_category_profile (precious int)",
        "create view raw_items as select 1 as precious",
        "create materialized view viewer_engagement_rolling as select 1 as precious",
        "create table deployments (precious int)",
        "create table online_published (precious int)",
    ],
)
def test_relations_of_others_are_refused_and_untouched(
    engine: EngineConfiguration, dbt_on: DbtOn, ddl: str
) -> None:
    with engine.connect() as connection:
        connection.execute(ddl)
    before = picture(engine)
    name = ddl.split(" (")[0].split(" as ")[0].split()[-1]
    try:
        messages = [result.message for result in dbt_on(engine).run("run") if not result.ok]
    except Exception as error:
        messages = [str(error)]
    assert len(messages) == 1
    assert f"holds relations that this project did not make: {name}" in messages[0]
    assert "rename them, or choose another PREFS_ENGINE_SCHEMA or PREFS_ENGINE_DATABASE" in messages[0]
    left = picture(engine)
    if name != "deployments":
        # Our own empty record of deployments may be there; it is how we know what is ours.
        left.pop("deployments", None)
    assert left == before


def test_full_refresh_keeps_what_arrived(deployed: EngineConfiguration, dbt_on: DbtOn) -> None:
    with deployed.connect() as connection:
        insert_events(connection, [watch(n, n, MIDNIGHT) for n in range(5)])
        connection.execute("insert into ingest_files (source, lines) values ('file:x#1', 5)")
        connection.execute("insert into online_published values ('t', 'engagement#watch', 1, 'f')")
    before = picture(deployed)
    assert_all_ok(dbt_on(deployed).run("run", arguments=["--full-refresh"]))
    assert picture(deployed) == before
    assert scalar(deployed, "select count(*) from raw_view_events") == 5
    assert scalar(deployed, "select count(*) from view_events") == 5
    assert scalar(deployed, "select lines from ingest_files") == 5
    assert scalar(deployed, "select count(*) from online_published") == 1


StartDbt = Callable[..., WarmProcess]


@pytest.fixture
def start_dbt(warm: Warm) -> StartDbt:
    """`start_dbt(engine, target, environment={}, project=PROJECT, select=[])`: `dbt run`, as a user starts it."""

    def start(
        engine: EngineConfiguration,
        target: Path,
        environment: Mapping[str, str] | None = None,
        project: Path = PROJECT,
        select: Sequence[str] = (),
    ) -> WarmProcess:
        return warm.start(
            ["dbt", "run", *project_options(target, project), *(["--select", *select] if select else [])],
            environment={
                **os.environ,
                "PREFS_ENGINE_PORT": str(engine.port),
                "PREFS_ENGINE_DATABASE": engine.database,
                **(environment or {}),
            },
            merge=True,
        )

    return start


def project_options(target: Path, project: Path = PROJECT) -> list[str]:
    """dbt's options for the project, with this folder for all that it writes."""
    return [
        "--project-dir", str(project), "--profiles-dir", str(project), "--target-path", str(target),
        "--log-path", str(target / "logs"),
    ]  # fmt: skip


def test_two_runs_at_once_wait_for_each_other(
    engine: EngineConfiguration,
    embedded_server: EngineConfiguration,
    copied_database: Callable[..., Any],
    tmp_path: Path,
    start_dbt: StartDbt,
) -> None:
    # The foreign project has a fifth of the models.
    runs = [start_dbt(engine, tmp_path / f"target{n}", project=COURSES) for n in range(2)]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    with copied_database("run_alone", embedded_server.with_database("template1")) as alone:
        assert_all_ok(Dbt(alone, COURSES, tmp_path / "alone").run("run"))
        assert picture(engine) == picture(alone)


def test_a_killed_run_is_completed_by_the_next(
    engine: EngineConfiguration,
    dbt_on: DbtOn,
    tmp_path: Path,
    deployed_template: EngineConfiguration,
    start_dbt: StartDbt,
) -> None:
    run = start_dbt(engine, tmp_path / "target")
    for line in run.stdout:
        if "OK created" in line and "materialized" in line:
            break
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    complete = picture(deployed_template)
    assert len(picture(engine)) < len(complete)
    assert_all_ok(dbt_on(engine).run("run"))
    assert picture(engine) == complete
    assert scalar(engine, "select count(*) from deployments where state <> 'deployed'") == 0


def test_a_view_is_served_whose_builder_is_killed_and_the_next_run_builds_it(
    deployed: EngineConfiguration, dbt_on: DbtOn, workshop: Workshop, start_dbt: StartDbt, tmp_path: Path
) -> None:
    builds = "select count(*) from live_builds"
    left = "select count(*) from pg_class where relname like '%\\_\\_built%'"
    with deployed.connect() as connection:
        insert_events(connection, [watch(n, n % 2, MIDNIGHT) for n in range(4)])
    assert_all_ok(dbt_on(deployed).run("run"))
    before = picture(deployed)
    held = "(select 0 * length(pg_advisory_xact_lock_shared(4711)::text))"
    workshop.change(TILE, "count(*) as views", f"count(*) + 100 + {held} as views")
    views = "select array_agg(views order by viewer_id) from viewer_watch_metrics_1d"
    with deployed.connect() as holder, holder.transaction():
        holder.execute("select pg_advisory_xact_lock(4711)")
        run = start_dbt(
            deployed, tmp_path / "target", project=workshop.folder, select=["viewer_watch_metrics_1d"]
        )
        waiting = "select count(*) from pg_locks where not granted and locktype = 'advisory' and objid = 4711"
        wait_for(lambda: scalar(deployed, waiting) == 1 or run.poll() is not None)
        # Nobody waits for it: neither readers nor whoever takes the lock of the follower's steps.
        assert scalar(deployed, views) == [2, 2]
        lock = "select pg_try_advisory_xact_lock(hashtext('dagster-prefs'), hashtext('public'))"
        assert scalar(deployed, lock) is True
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        # Its session notices that soon, though its statement never ends.
        wait_for(lambda: scalar(deployed, waiting) == 0)
    assert (scalar(deployed, builds), scalar(deployed, left)) == (1, 2)
    assert scalar(deployed, views) == [2, 2]
    assert_all_ok(dbt_on(deployed, workshop.folder).run("run", ["viewer_watch_metrics_1d"]))
    assert scalar(deployed, views) == [102, 102]
    assert (scalar(deployed, builds), scalar(deployed, left)) == (0, 0)
    changed = {"viewer_watch_metrics_1d__query"}
    assert {name: shape for name, shape in picture(deployed).items() if name not in changed} == {
        name: shape for name, shape in before.items() if name not in changed
    }


def test_secrets_are_in_no_file_and_no_record(
    engine: EngineConfiguration, services: LocalServices, tmp_path: Path, start_dbt: StartDbt, warm: Warm
) -> None:
    secrets = {
        "PREFS_ENGINE_PASSWORD": services.passfile.read_text().rpartition(":")[2].strip(),
        "AWS_ACCESS_KEY_ID": "AKIAHUNTER2",
        "AWS_SECRET_ACCESS_KEY": "hunter2-of-the-cloud",
    }
    # What dbt keeps of a parsed project is searched, so it is parsed with these.
    parsed_here = {"DBT_PARTIAL_PARSE": "false"}
    target = tmp_path / "target"
    run = start_dbt(engine, target, secrets | parsed_here)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    offline = warm.run(
        ["dbt", "compile", "--target", "risingwave", "--no-introspect", "--no-populate-cache",
         *project_options(tmp_path / "offline")],
        environment={**os.environ, **secrets, **parsed_here, "PREFS_ENGINE": "risingwave"},
    )  # fmt: skip
    assert offline.returncode == 0, offline.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "sink_engagement_watch.sql" for path in files)
    for secret in secrets.values():
        assert secret not in output
        assert secret not in offline.stdout
        assert [path.name for path in files if secret.encode() in path.read_bytes()] == []
        with engine.connect() as connection:
            found = connection.execute(
                sql.SQL("select relation from deployments where deployments::text like {}").format(
                    sql.Literal(f"%{secret}%")
                )
            ).fetchall()
        assert found == []
