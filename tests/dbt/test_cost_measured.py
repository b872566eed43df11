"""The formulas of `prefs cost` beside what a simulated run really wrote: DynamoDB, Iceberg and the engine.

Five weeks of 150 viewers are loaded, the last day in small steps, each refreshed and published; then
midnight passes without an event, and the day is exported. The workload's shape is counted from the messages
themselves, so only the formulas stand between it and what was written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql
from relations import RAW_TABLES, materialized_views, refresh
from shipped import GENRE, INTERACTIONS, LONG, SHORT, TILE_TABLES, WATCH
from workshop import PROJECT, assert_all_ok

from dagster_prefs.declarations.contract import Contract, load_contract
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.dynamodb.store import domain_stores
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.local.services import LocalServices
from dagster_prefs.tools.cost import (
    DomainLoad,
    Shape,
    Workload,
    engine_rows,
    estimate,
    event_writes,
    expiry_writes,
    project_shape,
    rows_kept,
    tile_rows,
)
from dagster_prefs.tools.scenario import SimulationPlan

LAST_DAY = date(2026, 3, 14)
MIDNIGHT = datetime(2026, 3, 15, tzinfo=UTC)
DAYS, VIEWERS = 35, 150
PLAN = SimulationPlan(
    MIDNIGHT, viewers=VIEWERS, days=DAYS, view_events=5_500, interactions=800, shop_events=0, items=1
)
# The last day's steps: of ten and of eight hours, four of a quarter of an hour, then what is left.
QUARTER = timedelta(minutes=15)
STEPS = [MIDNIGHT - timedelta(hours=hours) for hours in (24, 14, 6)]
STEPS += [STEPS[-1] + QUARTER * number for number in range(1, 5)] + [MIDNIGHT]

# One second for each viewer: ids count from 1.
SPREAD = VIEWERS

SOURCES = ("view_events", "content_interactions")


@dataclass
class Measured:
    """What the run wrote, and the messages that it was given."""

    events: list[tuple[str, dict[str, Any], datetime]]
    # Valid first deliveries in each step, by topic.
    delivered: list[Counter[str]]
    # Items put or deleted in each step, by domain; the first step fills the table.
    written: list[Counter[str]]
    # The same at midnight, and at the next one with a spread: before it, half through it, at its end.
    midnight: Counter[str]
    spread: list[Counter[str]]
    items: list[dict[str, Any]]
    rows: dict[str, int]
    export: dict[str, Any]
    # Every tile row of the run, by tile.
    tiles: dict[str, pa.Table]
    objects_before: set[Path]
    objects_after: set[Path]


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(PROJECT)


def valid_events() -> Iterator[tuple[str, bytes, dict[str, Any] | None, datetime]]:
    """Every message with its content where it is a valid first delivery, read without the project's parsers."""
    seen = set()
    for topic, message, at in PLAN.events():
        if topic not in SOURCES:
            continue
        content: dict[str, Any] | None = None
        try:
            found = json.loads(message)
            identity = str(found["event_id"])
            int(found["viewer_id"])
            if identity.startswith(("v-", "x-")) and identity not in seen:
                seen.add(identity)
                content = found
        except (ValueError, KeyError, TypeError):
            pass
        yield topic, message, content, at


@pytest.fixture(scope="module")
def measured(
    deployed_template: EngineConfiguration,
    copied_database: Callable[..., Any],
    services: LocalServices,
    dbt_target: Path,
    contract: Contract,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Measured]:
    client = dynamodb_client(f"http://127.0.0.1:{services.aws_port}", "eu-central-1")
    with copied_database("cost", deployed_template) as engine:
        try:
            yield _run(engine, client, dbt_target, contract, tmp_path_factory.mktemp("lake"))
        finally:
            client.delete_table(TableName="cost_viewer_profiles")


def scalar(connection: psycopg.Connection[Any], query: sql.Composable) -> int:
    ((value,),) = connection.execute(query).fetchall()
    return int(value)


def views_behind(manifest: dict[str, Any], names: set[str]) -> list[str]:
    """Materialized views that these need, themselves included, in order of dependency."""
    nodes = {node["name"]: node for node in manifest["nodes"].values() if node["resource_type"] == "model"}
    needed, left = set(), set(names)
    while left:
        name = left.pop()
        needed.add(name)
        left |= {
            key.rsplit(".", 1)[1] for key in nodes[name]["depends_on"]["nodes"] if key.startswith("model.")
        } - needed
    return [name for name in materialized_views(manifest) if name in needed]


def _run(
    engine: EngineConfiguration, client: Any, dbt_target: Path, contract: Contract, lake: Path
) -> Measured:
    order = views_behind(
        Dbt(engine, PROJECT, dbt_target).manifest(),
        {"tile_fingerprints", *(domain.relation for domain in contract.domains.values())},
    )
    stores = domain_stores(engine, client, contract, provision(client, contract, prefix="cost_"))
    messages = list(valid_events())
    # Where each step ends among the deliveries: before the first message of a later time.
    ends = [
        next((place for place, message in enumerate(messages) if message[3] >= step), len(messages))
        for step in STEPS
    ]
    written, delivered, done = [], [], 0

    def publish_at(connection: psycopg.Connection[Any], clock: datetime) -> Counter[str]:
        connection.execute("select set_config('prefs.clock', %s, false)", [clock.isoformat()])
        refresh(connection, order)
        reports = {store.domain.name: publish_domain(store) for store in stores}
        return Counter({name: report.upserts + report.deletes for name, report in reports.items()})

    with engine.connect() as connection:
        connection.execute("set synchronous_commit to off")
        for step, end in zip(STEPS, ends, strict=True):
            for number in range(done, end):
                topic, message, _, at = messages[number]
                connection.execute(
                    sql.SQL(
                        "insert into {} (source, source_partition, source_offset, data, arrived_at)"
                        " values ('cost', 0, %s, %s, %s)"
                    ).format(sql.Identifier(RAW_TABLES[topic])),
                    [number, message, at],
                )
            delivered.append(
                Counter(topic for topic, _, content, _ in messages[done:end] if content is not None)
            )
            done = end
            # Before the last step of the day, midnight must not have come yet.
            clock = step - timedelta(seconds=1) if step == MIDNIGHT else step
            written.append(publish_at(connection, clock))
        midnight = publish_at(connection, MIDNIGHT + timedelta(seconds=1))
        rows = {
            name: scalar(connection, sql.SQL("select count(*) from {}").format(sql.Identifier(name)))
            for name in [*order, *(RAW_TABLES[topic] for topic in SOURCES)]
        }
        rows["distinct contents and genres"] = scalar(
            connection, sql.SQL("select sum(content_started + genres_watched) from viewer_watch_metrics_1d")
        )
        rows["views within the window"] = scalar(
            connection,
            sql.SQL("select count(*) from view_events where watched_at >= {}").format(
                sql.Literal(MIDNIGHT - timedelta(days=LONG))
            ),
        )
        rows["tiles within the window"] = 0
        tiles = {}
        for spec in TILE_TABLES.values():
            columns = sql.SQL(", ").join(map(sql.Identifier, spec.arrow_schema.names))
            query = sql.SQL("select {} from {} order by {}, viewer_id").format(
                columns, sql.Identifier(spec.tile), sql.Identifier(spec.day)
            )
            found = [
                dict(zip(spec.arrow_schema.names, row, strict=True)) for row in connection.execute(query)
            ]
            rows["tiles within the window"] += sum(
                row[spec.day] >= MIDNIGHT.date() - timedelta(days=LONG) for row in found
            )
            tiles[spec.tile] = pa.Table.from_pylist(found, schema=spec.arrow_schema)
    items = [
        item
        for page in client.get_paginator("scan").paginate(TableName=stores[0].table.name)
        for item in page["Items"]
    ]
    catalog = open_catalog("sqlite", str(lake))
    for spec in TILE_TABLES.values():
        export_day(engine, catalog, spec, LAST_DAY - timedelta(days=1))
    before = {path for path in lake.rglob("*") if path.suffix in (".parquet", ".avro", ".json")}
    export = {spec.tile: export_day(engine, catalog, spec, LAST_DAY) for spec in TILE_TABLES.values()}
    after = {path for path in lake.rglob("*") if path.suffix in (".parquet", ".avro", ".json")}
    environment = {"PREFS_EXPIRY_SPREAD_SECONDS": str(SPREAD)}
    relations = [f"{domain.relation}+" for domain in contract.domains.values()]
    assert_all_ok(Dbt(engine, PROJECT, dbt_target, environment).run("run", relations))
    next_midnight = MIDNIGHT + timedelta(days=1)
    with engine.connect() as connection:
        spread = [
            publish_at(connection, next_midnight + timedelta(seconds=seconds))
            for seconds in (-3_600, SPREAD / 2, SPREAD + 1)
        ]
    events = [(topic, content, at) for topic, _, content, at in messages if content is not None]
    return Measured(events, delivered, written, midnight, spread, items, rows, export, tiles, before, after)


def shape_of(measured: Measured, days: Collection[date]) -> Workload:
    """The workload of these days as the messages show it."""
    events = [entry for entry in measured.events if entry[2].date() in days]
    viewing: dict[date, set[int]] = {}
    for topic, content, at in events:
        if topic == "view_events":
            viewer = int(content["viewer_id"])
            viewing.setdefault(at.date(), set()).add(viewer)
    active = sum(map(len, viewing.values()))
    interactions = sum(topic == "content_interactions" for topic, _, _ in events)
    shares = {SOURCES[0]: 1 - interactions / len(events), SOURCES[1]: interactions / len(events)}
    return Workload(
        entities=VIEWERS,
        events_per_day=round(len(events) / len(days)),
        shares=shares,
        daily_active_share=active / len(days) / VIEWERS,
        refresh_seconds=QUARTER.total_seconds(),
        history_days=DAYS,
    )


@pytest.fixture(scope="module")
def saturday(measured: Measured) -> Workload:
    """The last day, which is busier than others."""
    return shape_of(measured, [LAST_DAY])


@pytest.fixture(scope="module")
def usual(measured: Measured) -> Workload:
    return shape_of(measured, [LAST_DAY - timedelta(days=days) for days in range(DAYS)])


def leaving(measured: Measured, domain: DomainLoad, day: date) -> Workload:
    """The days that leave the windows of a domain when this day ends."""
    return shape_of(measured, {day - timedelta(days=window) for window in domain.windows})


def shape_between(measured: Measured, registry: Registry, first: date, last: date) -> Shape:
    """The project's shape, in which an active day holds as many genres and contents as it did on these days."""
    active: set[tuple[date, int]] = set()
    genres, contents = set(), set()
    for topic, content, at in measured.events:
        if topic == "view_events" and first <= at.date() <= last:
            key = (at.date(), int(content["viewer_id"]))
            active.add(key)
            genres.add((*key, content["genre"]))
            contents.add((*key, content["content_id"]))
    said = {
        "rows_per_active_day": {GENRE.tile: len(genres) / len(active)},
        "distinct_per_active_day": {WATCH.tile: (len(genres) + len(contents)) / len(active)},
        "list_elements": {"viewer_recent_sequence": sequence_length(measured, registry)},
    }
    told = replace(registry, variables={**registry.variables, "workload": said})
    return project_shape(told, told.entity("viewer"), VIEWERS)


def sequence_length(measured: Measured, registry: Registry) -> float:
    """The mean number of views in a viewer's sequence when the run ends."""
    since = MIDNIGHT.date() - timedelta(days=LONG)
    viewed = Counter(
        content["viewer_id"]
        for topic, content, at in measured.events
        if topic == "view_events" and at.date() >= since
    )
    return fmean(min(views, registry.variables["sequence_length"]) for views in viewed.values())


@pytest.fixture(scope="module")
def shape(measured: Measured, registry: Registry) -> Shape:
    """Of the last day, which is the `saturday`."""
    return shape_between(measured, registry, LAST_DAY, LAST_DAY)


@pytest.fixture(scope="module")
def usual_shape(measured: Measured, registry: Registry) -> Shape:
    return shape_between(measured, registry, LAST_DAY - timedelta(days=DAYS - 1), LAST_DAY)


def test_the_windows_are_the_contracts(shape: Shape) -> None:
    assert {domain.name: (domain.windows, domain.topics) for domain in shape.domains} == {
        "watch": ((SHORT, LONG), {"view_events"}),
        "preferences": ((LONG,), {"view_events"}),
        "interactions": ((LONG,), {"content_interactions"}),
        "sequence": ((LONG,), {"view_events"}),
    }


def expected_puts(measured: Measured, workload: Workload, shape: Shape, steps: slice) -> float:
    """Puts that the formula gives for the events of some steps, refreshed as the workload says."""
    counts = sum(measured.delivered[steps], Counter())
    return sum(
        sum(counts[topic] for topic in domain.topics)
        * event_writes(workload, domain)
        / domain.events(workload)
        for domain in shape.domains
    )


def test_a_change_of_a_row_is_one_put(measured: Measured, saturday: Workload, shape: Shape) -> None:
    """An hour of the evening, refreshed every quarter of it: few events share a row and a refresh."""
    evening = slice(3, -1)
    expected = expected_puts(measured, saturday, shape, evening)
    found = sum(sum(step.values()) for step in measured.written[evening])
    assert expected > 25
    assert found == pytest.approx(expected, rel=0.1)


def test_a_long_refresh_writes_at_most_what_the_formula_says(
    measured: Measured, saturday: Workload, shape: Shape
) -> None:
    """Eight hours. Events come in sittings, so that more of them fold than of the formula's random ones."""
    long = replace(saturday, refresh_seconds=28_800)
    expected, unfolded = (
        expected_puts(measured, workload, shape, slice(2, 3)) for workload in (long, saturday)
    )
    found = sum(measured.written[2].values())
    assert expected / 2 < found <= expected < unfolded


def test_midnight_changes_the_rows_that_a_leaving_day_touches(measured: Measured, shape: Shape) -> None:
    for domain in shape.domains:
        found = measured.midnight[domain.name]
        expected = expiry_writes(leaving(measured, domain, LAST_DAY), domain)
        assert expected > 10
        if domain.of_events:
            # A viewer with fifty newer views has lost the day before it leaves the window.
            assert expected / 2 < found <= expected
        else:
            assert found == pytest.approx(expected, rel=0.2), domain.name


def test_a_spread_only_spreads_midnight(measured: Measured, shape: Shape) -> None:
    """At the end of the day after. Viewers move on one a second here, the busy ones a little earlier."""
    before, half, rest = (sum(part.values()) for part in measured.spread)
    assert before == 0
    ends = LAST_DAY + timedelta(days=1)
    assert half + rest == pytest.approx(
        sum(expiry_writes(leaving(measured, domain, ends), domain) for domain in shape.domains), rel=0.2
    )
    assert 0.4 < half / (half + rest) < 0.75


def test_items_are_as_many_and_as_large(measured: Measured, usual: Workload, usual_shape: Shape) -> None:
    for domain in usual_shape.domains:
        items = [item for item in measured.items if item["domain_key"]["S"] == f"engagement#{domain.name}"]
        assert len(items) == pytest.approx(rows_kept(usual, domain), rel=0.15), domain.name
        assert fmean(map(dynamodb_bytes, items)) == pytest.approx(domain.item_bytes, rel=0.1), domain.name
    found = estimate(usual, usual_shape, target_seconds=5)
    assert len(measured.items) == pytest.approx(found.items, rel=0.1)
    billed = sum(dynamodb_bytes(item) + 100 for item in measured.items)
    assert billed == pytest.approx(found.table_bytes, rel=0.1)


def dynamodb_bytes(item: dict[str, Any]) -> int:
    """Bytes of an item by DynamoDB's documented rule."""
    return sum(len(name) + value_bytes(typed) for name, typed in item.items())


def value_bytes(typed: dict[str, Any]) -> int:
    ((kind, value),) = typed.items()
    if kind == "N":
        return 1 + -(-len(value.replace(".", "").replace("-", "").strip("0")) // 2)
    if kind == "L":
        return 3 + sum(1 + value_bytes(element) for element in value)
    return 1 if kind == "NULL" else len(value.encode())


def test_the_export_writes_as_many_rows_and_files(
    measured: Measured, saturday: Workload, shape: Shape
) -> None:
    for name, rows in tile_rows(saturday, shape).items():
        # Who interacts is less even than the formula's random events, so that fewer viewers do.
        report = measured.export[name]
        assert report.rows == pytest.approx(rows, rel=0.25 if name == INTERACTIONS.tile else 0.01)
    new = measured.objects_after - measured.objects_before
    found = estimate(replace(saturday, late_days=0), shape, target_seconds=5)
    assert len([path for path in new if path.suffix == ".parquet"]) == found.lake_files_per_day
    assert len(new) == found.lake_writes_per_day


def test_a_row_of_the_lake_is_as_large(measured: Measured, shape: Shape) -> None:
    """Between a file of some and one of many rows, so that what every file has does not count."""
    for tile in shape.tiles:
        name, expected = tile.name, tile.row_bytes
        sizes = {}
        for rows in (200, measured.tiles[name].num_rows):
            sink = BytesIO()
            pq.write_table(measured.tiles[name].slice(0, rows), sink, compression="zstd", store_schema=False)
            sizes[rows] = sink.tell()
        (few, small), (many, large) = sizes.items()
        assert (large - small) / (many - few) == pytest.approx(expected, rel=0.35), name


def test_the_engine_keeps_as_many_rows(measured: Measured, usual: Workload, usual_shape: Shape) -> None:
    expected, rows = engine_rows(usual, usual_shape), measured.rows
    found = {
        "raw events": rows["raw_view_events"] + rows["raw_content_interactions"],
        "typed events": rows["view_events"] + rows["content_interactions"],
        "tiles": sum(rows[spec.tile] for spec in TILE_TABLES.values()),
        "tile aggregates": 2 * rows["view_events"]
        + rows["content_interactions"]
        + rows["distinct contents and genres"],
        "windows": rows["tiles within the window"] + rows["views within the window"],
        "rolling views": len(measured.items),
    }
    assert found.keys() == expected.keys()
    for kind, number in found.items():
        assert number == pytest.approx(expected[kind], rel=0.06), kind
