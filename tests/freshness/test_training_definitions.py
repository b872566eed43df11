"""Parity, upkeep and training sets through Dagster itself, on a real engine, table and catalog."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from shipped import GENRE, LONG, REGISTRY, SHORT, WATCH

from dagster_prefs.cli import cli
from dagster_prefs.defs import offline_store, training_data, values
from dagster_prefs.freshness.canary import send_canary
from dagster_prefs.iceberg.export import ForeignRows
from dagster_prefs.iceberg.tables import arrow_schema
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings
from dagster_prefs.training.compare import SetUnreadable, compare_with_served
from dagster_prefs.training.windows import choose_features
from dagster_prefs.values.store import described_days, read_statistics

TABLES = {
    "watch": "viewer_watch_daily",
    "interactions": "viewer_interactions_daily",
    "preferences": "viewer_genre_daily",
}


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def platform(busy: Any, aws_endpoint: str, tmp_path: Path) -> Platform:
    return Platform(
        Settings(
            engine_port=busy.engine.port,
            engine_database=busy.engine.database,
            engine_user=busy.engine.user,
            aws_endpoint_url=aws_endpoint,
            iceberg_warehouse=busy.warehouse.as_uri(),
            data_dir=tmp_path,
            parity_share=1.0,
        )
    )


def definitions(platform: Platform, world: Any) -> dg.Definitions:
    built = offline_store.build(platform, clock=lambda: world.now + timedelta(minutes=2))
    return dg.Definitions.merge(built, dg.Definitions(executor=dg.in_process_executor))


def parity(platform: Platform, world: Any, instance: dg.DagsterInstance) -> dict[str, Any]:
    job = definitions(platform, world).resolve_job_def(training_data.PARITY_JOB)
    result = job.execute_in_process(instance=instance)
    assert result.success
    return {found.asset_key.path[-1]: found for found in result.get_asset_check_evaluations()}


def corrupt(world: Any, viewer: int, domain: str, attribute: str, value: dict[str, Any]) -> None:
    world.client.update_item(
        TableName=world.table.name,
        Key={"viewer_id": {"N": str(viewer)}, "domain_key": {"S": domain}},
        UpdateExpression="set #a = :v",
        ExpressionAttributeNames={"#a": attribute},
        ExpressionAttributeValues={":v": value},
    )


def test_what_is_published_equals_the_tables(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    # A canary flows through everything but is nobody's training data.
    send_canary(busy.engine, REGISTRY, busy.now - timedelta(seconds=60))
    busy.refresh()
    busy.publish()
    found = parity(platform, busy, instance)
    assert set(found) == set(TABLES.values())
    for name, check in found.items():
        assert check.passed, (name, check.description)
        assert check.metadata["subjects"].value == 40
        assert check.metadata["in_flight"].value == 0
    rates = {name for name in found["viewer_watch_daily"].metadata if name.endswith("_rate")}
    assert {f"titles_{SHORT}d_{kind}_rate" for kind in ("mismatch", "missing", "extra")} <= rates
    observed = instance.fetch_observations(dg.AssetKey(["training", "viewer_watch_daily"]), limit=1).records[
        0
    ]
    assert observed.asset_observation.metadata[f"parity_titles_{SHORT}d_mismatch_rate"].value == 0.0


@pytest.mark.parametrize(
    ("domain", "attribute", "value", "served"),
    [
        ("watch", f"watch_minutes_{LONG}d", {"N": "20.000001"}, "20.000001"),
        ("preferences", "favorite_genre_shares", {"L": []}, "[]"),
        # Of another type than the contract's.
        ("interactions", f"likes_{LONG}d", {"S": "2"}, "2"),
    ],
)
def test_one_corrupted_attribute_is_found_and_named(
    busy: Any,
    platform: Platform,
    instance: dg.DagsterInstance,
    domain: str,
    attribute: str,
    value: dict[str, Any],
    served: str,
) -> None:
    corrupt(busy, 17, f"engagement#{domain}", attribute, value)
    found = parity(platform, busy, instance)
    (wrong,) = [name for name, check in found.items() if not check.passed]
    assert wrong == TABLES[domain]
    check = found[wrong]
    assert f"{attribute} differs for 1 of 40" in check.description
    assert f"{attribute} of viewer 17: {served} is served" in check.description
    rates = {name: entry.value for name, entry in check.metadata.items() if name.endswith("_rate")}
    assert {name: rate for name, rate in rates.items() if rate} == {f"{attribute}_mismatch_rate": 1 / 40}
    (worst,) = check.metadata["worst"].value.records
    assert (worst.data["viewer_id"], worst.data["attribute"], worst.data["served"]) == (17, attribute, served)
    observed = instance.fetch_observations(dg.AssetKey(["training", wrong]), limit=1).records[0]
    assert observed.asset_observation.metadata[f"parity_{attribute}_mismatch_rate"].value == 1 / 40


def test_missing_items_and_attributes_and_what_ought_to_be_gone_have_rates(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    key = {"viewer_id": {"N": "3"}, "domain_key": {"S": "engagement#watch"}}
    busy.client.delete_item(TableName=busy.table.name, Key=key)
    busy.client.update_item(
        TableName=busy.table.name,
        Key={**key, "domain_key": {"S": "engagement#preferences"}},
        UpdateExpression="remove favorite_genre",
    )
    check = parity(platform, busy, instance)["viewer_watch_daily"]
    assert not check.passed
    assert "1 items are missing" in check.description
    assert check.metadata[f"titles_{SHORT}d_missing_rate"].value == 1 / 40
    assert check.metadata[f"titles_{SHORT}d_mismatch_rate"].value == 0.0
    check = parity(platform, busy, instance)["viewer_genre_daily"]
    assert "attributes are missing: favorite_genre" in check.description
    assert check.metadata["favorite_genre_missing_rate"].value == 1 / 40
    assert check.metadata["favorite_genres_missing_rate"].value == 0.0


def test_parity_that_cannot_be_read_says_so_and_fails_no_run(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    busy.client.delete_table(TableName=busy.table.name)
    for check in parity(platform, busy, instance).values():
        assert not check.passed
        assert check.severity == dg.AssetCheckSeverity.WARN
        assert "parity is unknown: DynamoDB refused" in check.description


def test_an_export_does_not_wait_for_parity(platform: Platform, busy: Any) -> None:
    job = definitions(platform, busy).resolve_job_def(offline_store.EXPORT_JOB)
    assert {node.name for node in job.nodes} == {f"training__{name}" for name in TABLES.values()}


def test_a_day_of_which_the_engine_holds_less_stays_until_told_otherwise(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    yesterday = busy.today - timedelta(days=1)
    table = busy.catalog.load_table(("training", WATCH.name))
    rows = table.scan(row_filter=f"watch_date = '{yesterday}'").to_arrow()
    # Raw messages that left the engine, as retention or a careless delete takes them.
    busy.execute(
        "delete from raw_view_events where encode(data, 'escape') like %s",
        [f'%"viewer_id": {rows["viewer_id"][0].as_py()},%'],
    )
    busy.refresh()
    exported = definitions(platform, busy).get_assets_def(dg.AssetKey(["training", WATCH.name]))

    def materialize(**config: Any) -> dict[str, Any]:
        result = dg.materialize(
            [exported],
            instance=instance,
            partition_key=yesterday.isoformat(),
            run_config={"ops": {"training__viewer_watch_daily": {"config": config}}},
        )
        (event,) = result.get_asset_materialization_events()
        return {name: value.value for name, value in event.materialization.metadata.items()}

    assert materialize() == {
        "rows": rows.num_rows, "days": 1, "days_written": 0, "days_retained": 1
    }  # fmt: skip
    said = [entry.user_message for entry in instance.all_logs(instance.get_runs()[0].run_id)]
    assert [text for text in said if "stays as it is" in text] == [
        f"viewer_watch_daily {yesterday} stays as it is, with {rows.num_rows} rows: the engine has "
        f"{rows.num_rows - 1} rows of this day, the table {rows.num_rows}; where that is right, materialize it with "
        "allow_loss"
    ]
    assert materialize(allow_loss=True)["days_written"] == 1
    table.refresh()
    assert table.scan(row_filter=f"watch_date = '{yesterday}'").to_arrow().num_rows == rows.num_rows - 1


def test_rows_of_another_writer_fail_the_export_and_are_named_by_the_sensor(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    yesterday = busy.today - timedelta(days=1)
    table = busy.catalog.load_table(("training", WATCH.name))
    rows = table.scan(row_filter=f"watch_date = '{yesterday}'").to_arrow()
    somebody = rows.slice(0, 1).set_column(0, table.schema().as_arrow().field(0), pa.array([987_654]))
    table.append(somebody.cast(arrow_schema(table)))
    built = definitions(platform, busy)
    sensor = built.get_repository_def().get_sensor_def(offline_store.EXPORT_SENSOR)
    looked = sensor.evaluate_tick(dg.build_sensor_context(instance, definitions=built))
    assert looked.run_requests == []
    assert (
        f"viewer_watch_daily of {yesterday}: data files that this platform did not add" in looked.skip_message
    )
    assert "prefs export --replace-foreign" in looked.skip_message
    # What was exported without a run, Dagster learns from the sensor: all but the day that is in question.
    unknown = {(event.asset_key.path[-1], event.partition) for event in looked.asset_events}
    assert unknown == {(TABLES[name], yesterday.isoformat()) for name in ("interactions", "preferences")}
    assert all(event.metadata["rows"].value > 0 for event in looked.asset_events)

    exported = built.get_assets_def(dg.AssetKey(["training", WATCH.name]))
    days = {"partition_key": yesterday.isoformat(), "instance": instance}
    # One run over a range fails for the day, and Dagster learns of the other one.
    earlier = yesterday - timedelta(days=1)
    with pytest.raises(ForeignRows, match="were changed by another writer and stay as they are"):
        dg.materialize([exported], instance=instance, tags=offline_store.range_tags(earlier, yesterday))
    assert instance.get_materialized_partitions(exported.key) >= {earlier.isoformat()}
    assert yesterday.isoformat() not in instance.get_materialized_partitions(exported.key)
    told = {"ops": {"training__viewer_watch_daily": {"config": {"replace_foreign": True}}}}
    assert dg.materialize([exported], run_config=told, **days).success
    found = table.refresh().scan(row_filter=f"watch_date = '{yesterday}'").to_arrow()
    assert 987_654 not in found["viewer_id"].to_pylist()
    assert found.num_rows == rows.num_rows
    looked = sensor.evaluate_tick(dg.build_sensor_context(instance, definitions=built))
    assert looked.skip_message == "every complete day is exported in its current version"
    assert WATCH.name not in {event.asset_key.path[-1] for event in looked.asset_events}


def test_upkeep_runs_from_dagster_and_keeps_tags(
    busy: Any, platform: Platform, instance: dg.DagsterInstance
) -> None:
    table = busy.catalog.load_table(("training", WATCH.name))
    tagged = table.current_snapshot().snapshot_id
    table.manage_snapshots().create_tag(tagged, "model-1").commit()
    busy.watch(1, age=60, days_ago=1)
    busy.refresh()
    busy.export()
    later = definitions(platform, busy)
    before = len(busy.catalog.load_table(("training", WATCH.name)).snapshots())
    assert before > 2
    busy.later(days=31)
    # One table may not be there yet.
    busy.catalog.drop_table(("training", GENRE.name))
    result = later.resolve_job_def(training_data.MAINTENANCE_JOB).execute_in_process(instance=instance)
    assert result.success
    (event,) = result.get_asset_materialization_events()
    assert event.materialization.metadata["snapshots_expired"].value > 0
    left = busy.catalog.load_table(("training", WATCH.name))
    assert len(left.snapshots()) == 2
    assert left.snapshot_by_id(tagged) is not None


def test_a_training_set_is_made_by_dagster(
    busy: Any, platform: Platform, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(
        f"viewer_id,label_time,liked\n7,{busy.now.isoformat()},1\n99999,{busy.now.isoformat()},0\n"
    )
    built = definitions(platform, busy)

    config = {"labels": str(labels), "types": {"liked": "int"}}

    def materialize(output: str, **options: Any) -> Any:
        return dg.materialize(
            [built.get_assets_def(dg.AssetKey("training_set"))],
            instance=instance,
            run_config={"ops": {"training_set": {"config": {**config, "output": output}}}},
            **options,
        )

    # Whoever reaches the UI chooses the output.
    victim = tmp_path / "victim.csv"
    victim.write_text("mine")
    folder = platform.settings.training_folder
    folder.mkdir(parents=True)
    (folder / "link.csv").symlink_to(victim)
    for elsewhere in (str(victim), "../victim.csv", "a/../../victim.csv", "link.csv"):
        refused = materialize(elsewhere, raise_on_error=False)
        assert not refused.success
        (failure,) = (event for event in refused.all_events if event.event_type_value == "STEP_FAILURE")
        error = failure.event_specific_data.error
        assert "is outside" in str(error.cause or error)
    assert victim.read_text() == "mine"

    result = materialize("set.parquet")
    output = folder / "set.parquet"
    (event,) = result.get_asset_materialization_events()
    metadata = event.materialization.metadata
    assert metadata["dagster/row_count"].value == 2
    assert metadata["cold_start_rows"].value == 1
    assert Path(metadata["manifest"].value).is_file()
    first, second = pq.read_table(output).to_pylist()
    # Yesterday's ten minutes; today's are not known yet.
    assert (first["liked"], first[f"watch_minutes_{SHORT}d"], first[f"likes_{LONG}d"]) == (1, 10, 1)
    assert (second[f"watch_minutes_{SHORT}d"], second["favorite_genre"]) == (0, None)


def test_values_are_described_judged_and_compared(
    busy: Any,
    platform: Platform,
    instance: dg.DagsterInstance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = busy.now + timedelta(minutes=2)
    built = dg.Definitions.merge(
        offline_store.build(platform, clock=lambda: now),
        values.build(platform, clock=lambda: now),
        dg.Definitions(executor=dg.in_process_executor),
    )
    result = built.resolve_job_def(values.JOB).execute_in_process(instance=instance)
    assert result.success
    checks = {found.asset_key.path[-1]: found for found in result.get_asset_check_evaluations()}
    assert set(checks) == set(TABLES.values())
    for check in checks.values():
        assert check.passed
        assert "learning, 0 of at least 2 earlier days" in check.description
    (made,) = result.get_asset_materialization_events()
    # Yesterday of each tile, and each rolling view.
    described = len(TABLES) + len(platform.contract.domains)
    assert made.materialization.metadata["days_described"].value == described

    def observed(key: list[str]) -> Any:
        (record,) = instance.fetch_observations(dg.AssetKey(key), limit=1).records
        return record.asset_observation.metadata

    tile = observed(["training", "viewer_watch_daily"])
    assert (tile["values_rows"].value, tile["watch_seconds_mean"].value) == (40, 600.0)
    assert observed(["training", "viewer_genre_daily"])["genre_share_of_drama"].value == 1.0
    view = observed(["viewer_engagement_rolling"])
    assert (
        view[f"watch_minutes_{SHORT}d_null_share"].value,
        view[f"watch_minutes_{SHORT}d_median"].value,
    ) == (0.0, 20.0)
    lists = platform.statistics()["viewer_preferences_rolling"]
    assert (lists["favorite_genres"].kind, lists["favorite_genres"].mean) == ("list", 1.0)
    assert lists["favorite_genre"].values == (("drama", 40),)
    assert "viewer_id" not in lists

    # Days later nothing has arrived, which is a value too; what has arrived and is not exported yet is not judged.
    platform.collect_statistics(now=busy.now + timedelta(days=2, hours=1))
    known = described_days(busy.catalog, "training")
    days = sorted(day - busy.today for relation, day in known if relation == WATCH.tile)
    assert days == [timedelta(days=-1), timedelta(days=1)]
    (quiet,) = {
        one.rows
        for one in read_statistics(busy.catalog, "training", relation=WATCH.tile)
        if one.day > busy.today
    }
    assert quiet == 0

    # What is served today, as a training set: the same, but for one attribute.
    served = {
        "favorite_genre": "drama",
        "favorite_genres": ["drama"],
        f"watch_minutes_{SHORT}d": 20.0,
        f"likes_{LONG}d": 2,
    }
    rows = [{"viewer_id": number, "label_time": now, **served} for number in range(500)]
    given = tmp_path / "set.parquet"
    pq.write_table(pa.Table.from_pylist(rows), given)
    busy.catalog.create_table("training.set", pa.Table.from_pylist(rows).schema).append(
        pa.Table.from_pylist(rows)
    )
    pa.csv.write_csv(
        pa.Table.from_pylist(
            [{**row, "favorite_genres": '["drama"]', f"likes_{LONG}d": 200} for row in rows]
        ),
        tmp_path / "set.csv",
    )
    for name, wrong in (
        (str(given), []),
        ("training.set", []),
        (str(tmp_path / "set.csv"), [f"likes_{LONG}d"]),
    ):
        compared = compare_with_served(
            platform.catalog(), REGISTRY, platform.engine, choose_features(REGISTRY, None), name, now=now
        )
        levels = {one.attribute: one.level for one in compared.attributes}
        assert set(levels) == set(served), name
        assert [attribute for attribute, level in levels.items() if level == "error"] == wrong, name
        assert {one.in_set.null_share for one in compared.attributes} == {0.0}
        assert f"watch.titles_{SHORT}d" in compared.missing
    for name, value in {
        "PREFS_ENGINE_PORT": platform.engine.port,
        "PREFS_ENGINE_DATABASE": platform.engine.database,
        "PREFS_ENGINE_USER": platform.engine.user,
        "PREFS_ICEBERG_WAREHOUSE": busy.warehouse.as_uri(),
    }.items():
        monkeypatch.setenv(name, str(value))
    told = CliRunner().invoke(
        cli, ["training-set", "compare", str(tmp_path / "set.csv")], standalone_mode=False
    )
    assert told.return_value == 2
    assert told.stdout.count("error") == 1
    assert f"watch.titles_{SHORT}d is served and not in the set" in told.stdout
    as_json = CliRunner().invoke(
        cli, ["training-set", "compare", "training.set", "--json"], standalone_mode=False
    )
    assert {one["level"] for one in json.loads(as_json.stdout)["attributes"]} == {"learning"}
    for refused in ("nowhere.parquet", "set.txt", str(tmp_path / "other.csv")):
        (tmp_path / "other.csv").write_text(f"learner_id,likes_{LONG}d\n1,2\n")
        with pytest.raises(SetUnreadable, match=r"name (a|one of)"):
            compare_with_served(
                platform.catalog(),
                REGISTRY,
                platform.engine,
                choose_features(REGISTRY, None),
                refused,
                now=now,
            )
