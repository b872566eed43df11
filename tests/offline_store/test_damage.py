"""Every file of a training table, damaged in every way: each reader names the table and writes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyiceberg.catalog import Catalog
from shipped import VIEWER_KEY, WATCH

from dagster_prefs.erasure.training import SubjectInTiles
from dagster_prefs.iceberg.catalog import CatalogCorrupted
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days
from dagster_prefs.iceberg.file_io import FileTruncated
from dagster_prefs.iceberg.maintenance import maintain
from dagster_prefs.iceberg.tables import ErasedSubject
from dagster_prefs.iceberg.verify import verify_day

from .conftest import DAY, Tiles, watch
from .training_world import KEEP, NOW, at, build, fill, write_labels


def damages(content: bytes) -> Iterator[bytes | None]:
    """What may be left of a file; None where it is gone."""
    yield None
    yield b""
    yield b"null"
    yield content[: len(content) // 2]
    yield content[:-10]
    yield random.Random(7).randbytes(len(content))


def metadata(table: Any) -> str:
    return str(table.metadata_location)


def manifest_list(table: Any) -> str:
    return str(table.current_snapshot().manifest_list)


def manifest(table: Any) -> str:
    return str(table.current_snapshot().manifests(table.io)[0].manifest_path)


def data(table: Any) -> str:
    (task,) = table.scan().plan_files()
    return str(task.file.file_path)


@pytest.mark.parametrize("file", [metadata, manifest_list, manifest, data])
def test_a_damaged_file(
    tiles: Tiles, catalog: Catalog, warehouse: Path, tmp_path: Path, file: Callable[[Any], str]
) -> None:
    fill(catalog, {})
    tiles.add(WATCH, [watch(1, DAY, 100)])
    export_day(tiles.engine, catalog, WATCH, DAY)
    tiles.add(WATCH, [watch(2, DAY, 100)])
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])
    readers: dict[str, Callable[[], Any]] = {
        "export": lambda: export_day(tiles.engine, catalog, WATCH, DAY),
        "training set": lambda: build(catalog, labels, tmp_path, now=NOW),
        "verification": lambda: verify_day(tiles.engine, catalog, WATCH, DAY, keep_tag=KEEP),
    }
    if file is not data:
        readers |= {
            "staleness": lambda: stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH)),
            "upkeep": lambda: maintain(catalog, WATCH, now=datetime.now(UTC), keep_snapshots=KEEP),
            "erasure": lambda: SubjectInTiles(
                catalog, WATCH, ErasedSubject(VIEWER_KEY, 1, NOW), tiles.engine
            ).holding(),
        }
    path = Path(file(catalog.load_table(WATCH.identifier("training"))).removeprefix("file://"))
    content = path.read_bytes()
    for damage in damages(content):
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        before = {found: found.stat().st_mtime_ns for found in tmp_path.rglob("*") if found.is_file()}
        for name, reader in readers.items():
            with pytest.raises(CatalogCorrupted) as caught:
                reader()
            said = str(caught.value)
            assert said.startswith("the table training.viewer_watch_daily "), (name, damage, said)
            assert said.endswith("restore it from a copy, or drop the table and export its days again"), said
        assert {found: found.stat().st_mtime_ns for found in tmp_path.rglob("*") if found.is_file()} == before
    path.write_bytes(content)
    assert export_day(tiles.engine, catalog, WATCH, DAY).rows == 2
    assert warehouse in path.parents


@pytest.mark.parametrize("file", [manifest_list, manifest])
def test_a_file_that_was_cut_off_anywhere(tiles: Tiles, catalog: Catalog, file: Callable[[Any], str]) -> None:
    """pyiceberg's decoder reads on behind the end, where memory may hold the very bytes that are missing."""
    tiles.add(WATCH, [watch(1, DAY, 100)])
    export_day(tiles.engine, catalog, WATCH, DAY)
    table = catalog.load_table(WATCH.identifier("training"))
    path = Path(file(table).removeprefix("file://"))
    content = path.read_bytes()
    whole = []
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with suppress(FileTruncated):
            whole.append((length, table.io.new_input(str(path)).open()))
    # A header alone is a file without rows, as other engines write it.
    assert len(whole) == 1
    path.write_bytes(content)
    assert table.io.new_input(str(path)).open().read() == content
