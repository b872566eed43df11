"""The same code on Glue and S3, against the local AWS server."""

from __future__ import annotations

import boto3
import pytest
from shipped import WATCH

from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days
from dagster_prefs.iceberg.maintenance import maintain

from .conftest import DAY, Tiles, table_rows, watch
from .training_world import KEEP, later


@pytest.fixture
def bucket(aws_endpoint: str) -> str:
    boto3.client("s3", endpoint_url=aws_endpoint, region_name="eu-central-1").create_bucket(
        Bucket="lake", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )
    return "s3://lake/warehouse"


def test_export_and_upkeep_on_glue(tiles: Tiles, aws_endpoint: str, bucket: str) -> None:
    catalog = open_catalog("glue", bucket, region="eu-central-1", endpoint_url=aws_endpoint)
    tiles.add(WATCH, [watch(1, DAY, 100)])
    assert list(stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH))) == [DAY]
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "written"
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "unchanged"
    tiles.add(WATCH, [watch(2, DAY, 200)])
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "written"
    expected = [watch(1, DAY, 100), watch(2, DAY, 200)]
    assert table_rows(catalog, WATCH) == expected
    report = maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    assert report.snapshots_expired == 2
    assert report.files_removed > 0
    assert table_rows(catalog, WATCH) == expected
    location = catalog.load_table(("training", WATCH.name)).location()
    assert location.startswith("s3://lake/warehouse/")
