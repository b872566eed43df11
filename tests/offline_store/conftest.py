"""An engine with the tile relations as plain tables, and a real catalog in a temporary folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pyiceberg.catalog import Catalog
from shipped import GENRE, INTERACTIONS, REGISTRY, TILE_TABLES, WATCH, tile_row

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.tables import TileTable

DAY = date(2026, 3, 10)

_DDL = """
create table tile_fingerprints (
  tile text, tile_date date, row_count bigint, metric_total numeric, content_hash numeric,
  last_event_at timestamptz);
create table erased_subjects (
  subject_kind text, subject_id text, erased_at timestamptz, primary key (subject_kind, subject_id));
"""


def minutes(seconds: int) -> Decimal:
    return (Decimal(seconds) / 60).quantize(Decimal("0.000001"), rounding=ROUND_HALF_UP)


def moment(day: date, second: int) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(seconds=second, microseconds=250)


def watch(viewer: int, day: date, seconds: int, views: int = 2, started: int = 1, completed: int = 1,
          genres: int = 1, at: int = 3600) -> tuple[Any, ...]:  # fmt: skip
    return tile_row(
        WATCH, viewer_id=viewer, watch_date=day, watch_seconds=seconds, watch_time_minutes=minutes(seconds),
        views=views, content_started=started, completions=completed, genres_watched=genres,
        last_event_at=moment(day, at),
    )  # fmt: skip


def genre(viewer: int, day: date, name: str, seconds: int, views: int = 1, completed: int = 0,
          at: int = 3600) -> tuple[Any, ...]:  # fmt: skip
    return tile_row(
        GENRE, viewer_id=viewer, watch_date=day, genre=name, watch_seconds=seconds, views=views,
        completions=completed, last_event_at=moment(day, at),
    )  # fmt: skip


def interactions(
    viewer: int, day: date, likes: int, shares: int, searches: int, at: int = 3600
) -> tuple[Any, ...]:
    return tile_row(
        INTERACTIONS, viewer_id=viewer, interaction_date=day, likes=likes, shares=shares, searches=searches,
        last_event_at=moment(day, at),
    )  # fmt: skip


class Tiles:
    """The engine's tiles, written like the models would leave them; fingerprints follow on `refresh`.

    With `made` the engine has the tables already.
    """

    def __init__(self, engine: EngineConfiguration, *, made: bool = False) -> None:
        self.engine = engine
        if not made:
            with engine.connect() as connection:
                connection.execute(_DDL)
                for spec in TILE_TABLES.values():
                    columns = sql.SQL(", ").join(
                        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(column.type))
                        for name, column in REGISTRY.tiles[spec.tile].columns.items()
                    )
                    connection.execute(
                        sql.SQL("create table {} ({})").format(sql.Identifier(spec.tile), columns)
                    )

    def execute(self, query: str, parameters: Sequence[Any] = ()) -> None:
        with self.engine.connect() as connection:
            connection.execute(query.encode(), parameters)

    def add(self, spec: TileTable, rows: Iterable[tuple[Any, ...]], *, refresh: bool = True) -> None:
        with self.engine.connect() as connection, connection.cursor() as cursor:
            with cursor.copy(sql.SQL("copy {} from stdin").format(sql.Identifier(spec.tile))) as copy:
                for row in rows:
                    copy.write_row(row)
            if refresh:
                _refresh(connection, spec)

    def replace(self, spec: TileTable, day: date, rows: Iterable[tuple[Any, ...]]) -> None:
        self.delete(spec, day, refresh=False)
        self.add(spec, rows)

    def delete(self, spec: TileTable, day: date, where: str = "true", *, refresh: bool = True) -> None:
        with self.engine.connect() as connection:
            connection.execute(f"delete from {spec.tile} where {spec.day} = %s and {where}".encode(), [day])
            if refresh:
                _refresh(connection, spec)

    def refresh(self, spec: TileTable) -> None:
        with self.engine.connect() as connection:
            _refresh(connection, spec)


def _refresh(connection: psycopg.Connection[tuple[Any, ...]], spec: TileTable) -> None:
    names = [column.name for column in spec.columns]
    rows = connection.execute(
        f"select {', '.join(names)} from {spec.tile} where viewer_id >= 0".encode()
    ).fetchall()
    days: dict[date, list[dict[str, Any]]] = {}
    for row in rows:
        values = dict(zip(names, row, strict=True))
        days.setdefault(values[spec.day], []).append(values)
    with connection.transaction():
        connection.execute("delete from tile_fingerprints where tile = %s", [spec.tile])
        for day, found in days.items():
            total = sum(sum(values[name] or 0 for name in spec.metric) for values in found)
            content = sum(
                int(hashlib.md5("|".join(map(str, values.values())).encode()).hexdigest()[:15], 16)
                for values in found
            )
            connection.execute(
                "insert into tile_fingerprints values (%s, %s, %s, %s, %s, %s)",
                [
                    spec.tile,
                    day,
                    len(found),
                    total,
                    content,
                    max(values["last_event_at"] for values in found),
                ],
            )


@pytest.fixture
def tiles(engine: EngineConfiguration) -> Tiles:
    return Tiles(engine)


@pytest.fixture
def warehouse(tmp_path: Path) -> Path:
    return tmp_path / "ware house"


@pytest.fixture
def catalog(warehouse: Path) -> Catalog:
    return open_catalog("sqlite", warehouse.as_uri())


@pytest.fixture(params=[WATCH, GENRE, INTERACTIONS], ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> TileTable:
    found: TileTable = request.param
    return found


def some_rows(spec: TileTable, day: date, viewers: int = 20, offset: int = 0) -> list[tuple[Any, ...]]:
    """Deterministic tiles of a day, with text that COPY has to escape."""
    numbers = range(offset, offset + viewers)
    if spec is WATCH:
        return [watch(n, day, n * 37 + 1, views=3, started=2) for n in numbers]
    if spec is GENRE:
        names = ["drama", "a\\b\tc\nd", "", "\\N", "日本"]
        return [genre(n, day, names[(n + k) % 5], n * 11 + k) for n in numbers for k in range(1 + n % 3)]
    return [interactions(n, day, n, n % 3, 1) for n in numbers]


def table_rows(catalog: Catalog, spec: TileTable, snapshot_id: int | None = None) -> list[tuple[Any, ...]]:
    """All rows of the training table, in the order of the spec's columns, sorted."""
    table = catalog.load_table(spec.identifier("training"))
    found = table.scan(snapshot_id=snapshot_id).to_arrow().to_pylist()
    return sorted(tuple(row[column.name] for column in spec.columns) for row in found)
