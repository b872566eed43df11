"""dbt has arrivals noted, deletes those that it read, and brings both to what was deployed before."""

from __future__ import annotations

from collections.abc import Callable

from relations import insert_events
from streams import MIDNIGHT, watch
from workshop import assert_all_ok

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.progress import waiting_since
from dagster_prefs.settings import load_settings

DbtOn = Callable[..., Dbt]
READERS = ["view_events_parsed", "view_events"]


def waiting(engine: EngineConfiguration) -> dict[str, int]:
    with engine.connect() as connection:
        return {
            topic: found.messages
            for topic, found in waiting_since(connection, engine, load_settings().registry()).items()
        }


def noted(engine: EngineConfiguration) -> int:
    with engine.connect() as connection:
        ((count,),) = connection.execute("select count(*) from raw_arrivals").fetchall()
    return int(count)


def test_what_was_read_is_deleted_and_the_rest_kept(deployed: EngineConfiguration, dbt_on: DbtOn) -> None:
    with deployed.connect() as connection:
        insert_events(connection, [watch(n, n, MIDNIGHT) for n in range(3)])
    assert (waiting(deployed), noted(deployed)) == ({"view_events": 3}, 3)
    # The typed events alone have not read what their parsed messages have not.
    assert_all_ok(dbt_on(deployed).run("run", ["view_events"]))
    assert (waiting(deployed), noted(deployed)) == ({"view_events": 3}, 3)
    assert_all_ok(dbt_on(deployed).run("run", ["view_events_parsed"]))
    assert (waiting(deployed), noted(deployed)) == ({}, 3)
    with deployed.connect() as writer, writer.transaction():
        insert_events(writer, [watch(7, 7, MIDNIGHT)])
        assert_all_ok(dbt_on(deployed).run("run", READERS))
        assert (waiting(deployed), noted(deployed)) == ({}, 0)
    assert (waiting(deployed), noted(deployed)) == ({"view_events": 1}, 1)
    with deployed.connect() as connection:
        connection.execute("delete from raw_view_events")
    assert_all_ok(dbt_on(deployed).run("run", READERS))
    assert (waiting(deployed), noted(deployed)) == ({}, 0)


def test_tables_from_before_are_watched_from_the_next_run_on(
    deployed: EngineConfiguration, dbt_on: DbtOn
) -> None:
    with deployed.connect() as connection:
        insert_events(connection, [watch(n, n, MIDNIGHT) for n in range(3)])
    assert_all_ok(dbt_on(deployed).run("run", READERS))
    with deployed.connect() as connection:
        connection.execute("drop function prefs_note_arrival cascade; drop table raw_arrivals")
        insert_events(connection, [watch(n, n, MIDNIGHT) for n in range(3, 5)])
    assert_all_ok(dbt_on(deployed).run("run", ["view_events"]))
    assert_all_ok(dbt_on(deployed).run("run", ["config.materialized:table_with_connector"]))
    assert waiting(deployed) == {"view_events": 2}
    assert_all_ok(dbt_on(deployed).run("run", READERS))
    assert (waiting(deployed), noted(deployed)) == ({}, 0)
    with deployed.connect() as connection:
        insert_events(connection, [watch(9, 9, MIDNIGHT)])
    assert waiting(deployed) == {"view_events": 1}
