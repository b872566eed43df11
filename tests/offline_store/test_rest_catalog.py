"""The same code on a REST catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from pyiceberg.catalog import Catalog
from shipped import WATCH

from dagster_prefs.iceberg import export, publish
from dagster_prefs.iceberg.catalog import CatalogUnavailable
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days
from dagster_prefs.iceberg.maintenance import maintain
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

from .conftest import DAY, Tiles, table_rows, watch
from .rest_catalog import RestServer, rest_server
from .training_world import KEEP, at, build, fill, later, write_labels

CREDENTIAL = "prefs:open sesame"


@pytest.fixture
def rest(catalog: Catalog) -> Iterator[RestServer]:
    with rest_server(catalog, CREDENTIAL) as served:
        yield served


def platform(rest: RestServer, folder: Path, credential: str = CREDENTIAL) -> Platform:
    return Platform(
        Settings(
            iceberg_catalog="rest",
            iceberg_uri=rest.uri,
            iceberg_warehouse=folder.as_uri(),
            iceberg_credential=SecretStr(credential),
            data_dir=folder,
        )
    )


def test_export_and_upkeep_on_rest(tiles: Tiles, rest: RestServer, catalog: Catalog, warehouse: Path) -> None:
    remote = platform(rest, warehouse).catalog()
    assert rest.asked[1][1:3] == ("/v1/config", {"warehouse": [warehouse.as_uri()]})
    tiles.add(WATCH, [watch(1, DAY, 100)])
    assert list(stale_days(tiles.engine, WATCH, exported_days(remote, WATCH))) == [DAY]
    assert export_day(tiles.engine, remote, WATCH, DAY).status == "written"
    assert export_day(tiles.engine, remote, WATCH, DAY).status == "unchanged"
    tiles.add(WATCH, [watch(2, DAY, 200)])
    other = DAY + timedelta(days=1)
    tiles.add(WATCH, [watch(1, other, 300)])
    # Two days at once: one of the commits is refused with 409 and made again.
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(
            lambda day: export_day(tiles.engine, platform(rest, warehouse).catalog(), WATCH, day),
            (DAY, other),
        )
        assert {report.status for report in done} == {"written"}
    expected = [watch(1, DAY, 100), watch(1, other, 300), watch(2, DAY, 200)]
    assert table_rows(remote, WATCH) == expected == table_rows(catalog, WATCH)
    report = maintain(remote, WATCH, now=later(), keep_snapshots=KEEP)
    assert report.snapshots_expired > 0
    assert table_rows(remote, WATCH) == expected


def test_a_catalog_that_goes_down_while_it_is_used(
    tiles: Tiles, catalog: Catalog, warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read, between files and commit, and for a training set: named, and nothing is left behind."""
    fill(catalog, {})
    tiles.add(WATCH, [watch(1, DAY, 100)])
    labels = write_labels(tmp_path, [(1, at(DAY))])
    real = publish.write_day
    unreachable = (
        r"^the table training\.viewer_[a-z]+_daily cannot be reached or refuses access .*check its address"
    )
    with ExitStack() as stack:
        remote = platform(stack.enter_context(rest_server(catalog, CREDENTIAL)), warehouse).catalog()

        def last_files(*given: Any) -> None:
            real(*given)
            stack.close()

        monkeypatch.setattr(export, "write_day", last_files)
        with pytest.raises(CatalogUnavailable, match=unreachable):
            export_day(tiles.engine, remote, WATCH, DAY)
    assert list(warehouse.rglob("*.parquet")) == []
    with pytest.raises(CatalogUnavailable, match=unreachable):
        export_day(tiles.engine, remote, WATCH, DAY)
    with pytest.raises(CatalogUnavailable, match=unreachable):
        build(remote, labels, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"labels.parquet"}
    monkeypatch.setattr(export, "write_day", real)
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "written"
    assert table_rows(catalog, WATCH) == [watch(1, DAY, 100)]


def test_a_credential_that_is_refused(rest: RestServer, tmp_path: Path) -> None:
    with pytest.raises(
        CatalogUnavailable, match=rf"the Iceberg catalog {rest.uri} .*refuses access"
    ) as caught:
        platform(rest, tmp_path, "prefs:wrong").catalog()
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("password", ["hunter2", "hunter2@x", "a:b%40c"])
def test_a_password_in_the_address_is_never_told(
    tmp_path: Path, free_port: Callable[[], int], password: str
) -> None:
    for uri in (
        f"http://user:{password}@127.0.0.1:{free_port()}/catalog",
        # Not even what requests makes of an address that it does not understand.
        f"ftp://user:{password}@127.0.0.1:{free_port()}",
    ):
        settings = Settings(
            iceberg_catalog="rest", iceberg_uri=uri, iceberg_warehouse=tmp_path.as_uri(), data_dir=tmp_path
        )
        assert password not in repr(settings)
        with pytest.raises(CatalogUnavailable) as caught:
            Platform(settings).catalog()
        said = str(caught.value)
        assert "://***@127.0.0.1" in said
        assert "user" not in said
        for part in password.split("@"):
            assert f"{part}@" not in said
            assert f":{part}" not in said
