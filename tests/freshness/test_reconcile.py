"""Damage of every kind is found and repaired; what is newer than the row is left alone."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from shipped import SHORT

from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.freshness.online import online_lag
from dagster_prefs.freshness.reconcile import ReconcileError, reconcile_domain

KEY = "engagement#watch"


def reconcile(world: Any, **options: Any) -> Any:
    return reconcile_domain(world.store("watch"), now=world.now, **options)


def item(world: Any, viewer: int) -> dict[str, Any] | None:
    key = {"viewer_id": {"N": str(viewer)}, "domain_key": {"S": KEY}}
    found: dict[str, Any] | None = world.client.get_item(TableName=world.table.name, Key=key).get("Item")
    return found


def put(world: Any, content: dict[str, Any]) -> None:
    world.client.put_item(TableName=world.table.name, Item=content)


def items(world: Any) -> dict[int, dict[str, Any]]:
    pages = world.client.get_paginator("scan").paginate(TableName=world.table.name)
    return {
        int(found["viewer_id"]["N"]): found
        for page in pages
        for found in page["Items"]
        if found["domain_key"]["S"] == KEY
    }


def rows(world: Any) -> dict[int, tuple[Any, ...]]:
    names = ", ".join(world.contract.domain("watch").attributes)
    return {
        row[0]: row[1:] for row in world.execute(f"select viewer_id, {names} from viewer_engagement_rolling")
    }


def damage(world: Any) -> None:
    stale = item(world, 3)
    assert stale is not None
    put(world, stale | {f"titles_{SHORT}d": {"N": "999"}})
    put(
        world,
        stale | {"viewer_id": {"N": "4"}, "favorite": {"S": "x"}, f"watch_minutes_{SHORT}d": {"S": "many"}},
    )
    world.client.delete_item(
        TableName=world.table.name, Key={"viewer_id": {"N": "5"}, "domain_key": {"S": KEY}}
    )
    put(world, stale | {"viewer_id": {"N": "900001"}})
    put(world, {"viewer_id": {"N": "900002"}, "domain_key": {"S": KEY}})


def test_damage_is_counted_repaired_and_gone(busy: Any) -> None:
    assert (reconcile(busy).missing, reconcile(busy).extra) == (0, 0)
    damage(busy)
    dry = reconcile(busy, dry_run=True)
    assert (dry.missing, dry.different, dry.extra, dry.overtaken) == (1, 2, 2, 0)
    assert item(busy, 5) is None
    done = reconcile(busy)
    assert (done.missing, done.different, done.extra, done.overtaken) == (1, 2, 2, 0)
    expected = rows(busy)
    found = items(busy)
    assert set(found) == set(expected)
    for viewer, values in expected.items():
        names = busy.contract.domain("watch").attributes
        assert [Decimal(found[viewer][name]["N"]) for name in names] == [Decimal(v) for v in values]
    again = reconcile(busy)
    assert (again.missing, again.different, again.extra) == (0, 0, 0)


def test_the_publisher_does_not_repair_what_it_believes_to_be_there(busy: Any) -> None:
    damage(busy)
    busy.publish()
    lag = online_lag(busy.store("watch"), now=busy.now)
    assert not lag.in_step
    reconcile(busy)
    lag = online_lag(busy.store("watch"), now=busy.now)
    assert lag.in_step or lag.published_rows != lag.view_rows
    assert lag.differences == ()
    busy.publish()
    lag = online_lag(busy.store("watch"), now=busy.now)
    assert lag.in_step


def test_the_publisher_looks_again_at_what_was_repaired(busy: Any) -> None:
    """A row that goes back to what was published before the repair must be written once more."""
    before = item(busy, 3)
    event = busy.watch(3, content_id="c2")
    busy.refresh()
    assert reconcile(busy).different == 1
    assert item(busy, 3) != before
    busy.execute(
        "delete from raw_view_events where convert_from(data, 'utf8') like %s", [f"%{event['event_id']}%"]
    )
    busy.refresh()
    publish_domain(busy.store("watch"))
    assert item(busy, 3) == before


def test_an_item_that_is_newer_than_its_row_is_left_alone(busy: Any) -> None:
    newer = item(busy, 3)
    assert newer is not None
    newer |= {"last_event_at": {"N": str(int(newer["last_event_at"]["N"]) + 5000)}}
    put(busy, newer)
    report = reconcile(busy)
    assert (report.different, report.overtaken) == (0, 1)
    assert item(busy, 3) == newer


def test_a_change_under_way_is_left_to_its_writer(busy: Any) -> None:
    busy.watch(3)
    busy.refresh()
    waits: list[float] = []

    def meanwhile(seconds: float) -> None:
        waits.append(seconds)
        put(busy, made)

    reconcile(busy)
    made = item(busy, 3)
    assert made is not None
    put(busy, made | {f"titles_{SHORT}d": {"N": "1000"}})
    report = reconcile(busy, grace_seconds=5.0, wait=meanwhile)
    assert waits == [5.0]
    assert (report.different, report.overtaken) == (0, 0)


def test_a_row_that_cannot_be_an_item_is_named_after_the_others_were_repaired(busy: Any) -> None:
    damage(busy)
    query = "viewer_engagement_rolling__query"
    definition = busy.execute(f"select pg_get_viewdef('{query}'::regclass)")[0][0].rstrip(";")
    columns = busy.execute(
        "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 order by attnum",
        (query,),
    )
    spoiled = ", ".join(
        f"case when viewer_id <> 3 then titles_{SHORT}d end as titles_{SHORT}d"
        if name == f"titles_{SHORT}d"
        else name
        for (name,) in columns
    )
    busy.execute(f"create or replace view {query} as select {spoiled} from ({definition}) as rolling")
    busy.execute("select prefs_rebuild('viewer_engagement_rolling')")
    with pytest.raises(ReconcileError, match=f"viewer 3: titles_{SHORT}d is NULL") as caught:
        reconcile(busy)
    report = caught.value.report
    assert (report.missing, report.different, report.extra) == (1, 1, 2)
    assert item(busy, 5) is not None
