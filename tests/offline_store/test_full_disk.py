"""A disk that is really full: a small file system of its own, filled until nothing more fits."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from shipped import FEATURES, WATCH

from dagster_prefs.iceberg.catalog import OfflineError, StorageFull, open_catalog
from dagster_prefs.iceberg.duck import JOINING, duck_session, sort_batches
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.iceberg.maintenance import maintain
from dagster_prefs.training.training_set import LabelJoin, build_training_set

from .conftest import DAY, Tiles, table_rows, watch
from .training_world import KEEP, NOW, at, fill, later, write_labels

# More than any of these writes needs.
PAGES = 60
SCRATCH = r"no space is left for intermediate results in .*/disk/.*: free some and run it again"


@dataclass(frozen=True)
class Disk:
    """A file system of 4 MB."""

    folder: Path

    def fill(self, leave: int) -> None:
        """Leave room for so many pages of 4 KB only."""
        self.clear()
        found = os.statvfs(self.folder)
        with (self.folder / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, (found.f_bavail - leave) * found.f_frsize)

    def clear(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system of its own can be mounted here, e.g. by an ordinary user: {error}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_an_export_at_every_point_of_its_way(tiles: Tiles, disk: Disk) -> None:
    """Data, manifests, metadata and the catalog itself meet the end of the disk, each at some length of filling."""
    catalog = open_catalog("sqlite", (disk.folder / "iceberg").as_uri())
    old, new = watch(1, DAY, 100), watch(2, DAY, 200)
    tiles.add(WATCH, [old])
    export_day(tiles.engine, catalog, WATCH, DAY)
    tiles.add(WATCH, [new])
    said = set()
    for leave in range(0, PAGES, 2):
        disk.fill(leave)
        try:
            assert export_day(tiles.engine, catalog, WATCH, DAY).status == "written"
            break
        except StorageFull as error:
            said.add((str(error), type(error.__cause__).__name__))
        assert table_rows(catalog, WATCH) == [old]
    message = (
        "no space left while writing the table training.viewer_watch_daily: free some and run it again; "
        "what readers see is unchanged"
    )
    assert said == {(message, "OSError"), (message, "OperationalError")}
    assert table_rows(catalog, WATCH) == [old, new]
    disk.clear()
    maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    assert set(catalog.load_table(WATCH.identifier("training")).refs()) == {"main"}
    assert len(list(disk.folder.rglob("*.parquet"))) == 1


@pytest.mark.parametrize("name", ["set.parquet", "set.csv"])
def test_a_training_set_at_every_point_of_its_way(
    catalog: Catalog, disk: Disk, tmp_path: Path, name: str
) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    output = disk.folder / name

    def build(day: int) -> None:
        labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=day), n / 60)) for n in range(300)])
        build_training_set(catalog, LabelJoin(labels, FEATURES, NOW), output)

    build(1)
    before = {path.name: path.read_bytes() for path in disk.folder.iterdir()}
    assert set(before) == {name, f"{name}.manifest.json"}
    said = set()
    for leave in range(0, PAGES, 2):
        disk.fill(leave)
        try:
            build(2)
            break
        except StorageFull as error:
            said.add(str(error))
        disk.clear()
        assert {path.name: path.read_bytes() for path in disk.folder.iterdir()} == before
    assert said == {
        f"no space left while writing the training set {output}: free some and run it again; "
        "what readers see is unchanged"
    }
    disk.clear()
    assert {path.name for path in disk.folder.iterdir()} == set(before)
    assert output.read_bytes() != before[name]


@pytest.fixture
def scratch(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Intermediate results lie on the small disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
    return disk.folder


def test_a_session_whose_tables_do_not_fit(scratch: Path) -> None:
    with pytest.raises(StorageFull, match=SCRATCH), duck_session(*JOINING) as session:
        session.execute(
            "create table texts as select md5(cast(n as varchar)) from range(1000000) as numbers (n)"
        )
    assert list(scratch.iterdir()) == []


def test_a_sort_that_does_not_fit(scratch: Path) -> None:
    texts = pa.record_batch({"text": [f"{number * 7919 % 100_000:099}" for number in range(100_000)]})
    with pytest.raises(StorageFull, match=SCRATCH):
        list(sort_batches([texts] * 30, texts.schema, ("text",), 100_000))
    assert list(scratch.iterdir()) == []


def test_memory_that_does_not_suffice_is_no_full_disk() -> None:
    with (
        pytest.raises(OfflineError, match=r"^20MB of memory are not enough: split") as caught,
        duck_session("20MB", 2) as session,
    ):
        session.execute(
            "select string_agg(cast(n as varchar), '') from range(5000000) as numbers (n)"
        ).fetchall()
    assert not isinstance(caught.value, StorageFull)


def test_many_cores_do_not_share_out_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    with duck_session(*JOINING) as session:
        assert session.execute("select current_setting('threads')").fetchall() == [(4,)]
