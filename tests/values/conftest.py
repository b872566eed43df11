"""Sixty ordinary days with weekly seasons in real Iceberg tables, described once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyiceberg.catalog import Catalog
from shipped import GENRE, REGISTRY, WATCH
from tile_days import MONDAY, NAMESPACE, at, days_from, export, genre_rows, watch_rows

from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.values.collect import collect_tiles

DAYS = days_from(MONDAY, 60)


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ordinary days are."""
    folder = tmp_path_factory.mktemp("ordinary")
    catalog = open_catalog("sqlite", folder.as_uri())
    for spec, rows in ((WATCH, watch_rows), (GENRE, genre_rows)):
        export(catalog, spec, DAYS, rows)
    done = collect_tiles(catalog, REGISTRY, NAMESPACE, now=at(DAYS[-1]), days=60)
    assert len(done.described) == 120
    return folder


@pytest.fixture
def catalog(warehouse: Path) -> Catalog:
    """Its catalog."""
    return open_catalog("sqlite", warehouse.as_uri())


@pytest.fixture
def empty_catalog(tmp_path: Path) -> Any:
    """A catalog without tables."""
    return open_catalog("sqlite", (tmp_path / "lake").as_uri())
