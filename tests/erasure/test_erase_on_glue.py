"""The same erasure where the training tables lie in Glue and S3, proven by reading every object of the bucket."""

from __future__ import annotations

import io
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest
from erased_world import ALONE, ERASURE, OLD, PARTED, TODAY, VIEWER, World, expected_rows, redacted
from oracle import Oracle
from pyiceberg.catalog import Catalog
from shipped import TILE_TABLES, WATCH
from streams import NOW

from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.files import day_files

BUCKET, REGION = "erased-lake", "eu-central-1"


@pytest.fixture
def s3(aws_endpoint: str) -> Any:
    client = boto3.client("s3", endpoint_url=aws_endpoint, region_name=REGION)
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    return client


@pytest.fixture
def glue(world: World, s3: Any, aws_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """The world's catalog is Glue's, with every day exported."""
    catalog = open_catalog("glue", f"s3://{BUCKET}/warehouse", region=REGION, endpoint_url=aws_endpoint)
    monkeypatch.setattr(World, "catalog", property(lambda _: catalog))
    assert {status for _, _, status in world.export()} == {"written"}
    return catalog


def objects(s3: Any) -> dict[str, bytes]:
    """Every object of the bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
    return {key: s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def holding(s3: Any) -> set[str]:
    """Parquet objects with a row of the viewer."""
    return {
        key
        for key, content in objects(s3).items()
        if key.endswith(".parquet")
        and VIEWER in pq.read_table(io.BytesIO(content), columns=["viewer_id"])["viewer_id"].to_pylist()
    }


def test_no_object_and_no_snapshot_holds_the_viewer(world: World, glue: Catalog, s3: Any) -> None:
    left = world.leave_the_engine()
    before = world.all_rows()
    # What a crashed export leaves behind: a file of the viewer's rows that nothing names.
    (file,) = day_files(glue.load_table(WATCH.identifier("training")), WATCH, OLD)
    named = file.path.removeprefix("s3://")
    orphan = f"{named.rpartition('/')[0]}/left-00000.parquet".removeprefix(f"{BUCKET}/")
    s3.copy_object(Bucket=BUCKET, Key=orphan, CopySource=named)
    assert orphan in holding(s3)
    assert len(holding(s3)) > len(TILE_TABLES)

    report = world.erase()
    assert holding(s3) == set()
    oracle = Oracle(redacted(left, "viewer"), NOW, erased=[ERASURE])
    expected_rows(world, before, oracle)
    there = {f"s3://{BUCKET}/{key}" for key in objects(s3)}
    for spec in TILE_TABLES.values():
        table = glue.load_table(spec.identifier("training"))
        assert set(table.refs()) == {"main"}
        for snapshot in table.snapshots():
            files = {
                task.file.file_path for task in table.scan(snapshot_id=snapshot.snapshot_id).plan_files()
            }
            assert files <= there
            viewers = table.scan(snapshot_id=snapshot.snapshot_id).to_arrow()["viewer_id"].to_pylist()
            assert VIEWER not in viewers
    done = {table.table: table for table in report.tables}["training.viewer_watch_daily"]
    assert (done.days_from_engine, done.days_rewritten) == ((TODAY,), (OLD, PARTED, ALONE))
    assert done.files_removed == len({OLD, PARTED, ALONE, TODAY}) + 1

    assert world.export() == []
    assert not world.erase().held
