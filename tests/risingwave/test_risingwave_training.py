"""Training data from a real RisingWave: daily exports, parity, corrected messages, and a viewer who is erased."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import dagster as dg
import duckdb
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from risingwave_server import NO_SERVER, URL, database, engine_settings, run, until
from shipped import SHORT, TILE_TABLES, WATCH

from dagster_prefs.declarations.names import REDACTED
from dagster_prefs.defs import offline_store, training_data
from dagster_prefs.iceberg.event_reader import Selection, load_accepted, read_events
from dagster_prefs.iceberg.export import SINK_BRANCH, exported_days, stale_days
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.iceberg.verify import verify_day
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)

# Texts that a line of tab-separated values has to escape, or could be taken for something else.
GENRES = ("drama", "sci\\fi", "tab\tbed", "line\nfeed", "carriage\rreturn", '"quoted", and more', "Ä", "\\N")
VIEWERS, CANARY = (1, 2, 3, 4), -1
# An id that stands in nothing else, so that any trace of it is a trace of the viewer.
FORGOTTEN = 777_000_123
SINK_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PREFS_ICEBERG_CREDENTIAL")
RELATIONS = (
    "view_events", "content_interactions", "rejected_events", "ingest_progress", "tile_fingerprints",
    "viewer_watch_metrics_1d", "viewer_genre_metrics_1d", "viewer_interactions_1d",
    "viewer_engagement_rolling", "content_interactions_rolling", "viewer_preferences_rolling",
    "viewer_recent_sequence",
)  # fmt: skip


def canary_at(at: datetime) -> str:
    """The event id of the engine's canary of that moment."""
    from oracle import CANARY_KEYS, canary_id, micros, millis

    ((deployment, secret),) = CANARY_KEYS.items()
    return canary_id(deployment, secret, millis(micros(at)))


@dataclass
class World:
    """A deployed database with sinks to a DynamoDB table of its own, and a local Iceberg catalog."""

    platform: Platform
    now: datetime
    sent: int = 0
    made: int = 0

    def send(self, topic: str, *bodies: bytes, source: str = "test") -> None:
        """Put messages into the raw table; visible in every view on return."""
        from oracle import Message, micros
        from relations import insert_events

        messages = []
        for body in bodies:
            self.sent += 1
            messages.append(Message(topic, source, 0, self.sent, body, None, micros(datetime.now(UTC))))
        with self.platform.engine.connect() as connection:
            # One wait for the next barrier at the end instead of one for every row.
            connection.execute("set rw_implicit_flush to false")
            insert_events(connection, messages)
            connection.execute("flush")

    def view(self, viewer: Any, days_ago: float, **fields: Any) -> bytes:
        """The body of a view event; its time has no fraction, milliseconds or microseconds, in turn."""
        self.made += 1
        number = self.made
        at = (self.now - timedelta(days=days_ago)).replace(microsecond=(0, 250_000, 125_001)[number % 3])
        identity = canary_at(at) if viewer == CANARY else f"v-{viewer}-{days_ago}"
        body = {
            "event_id": identity, "viewer_id": viewer, "content_id": f"c{number % 5}",
            "genre": GENRES[number % len(GENRES)], "watch_duration_sec": 37 + number,
            "completion_pct": number % 11 / 10, "watched_at": at.isoformat(), **fields,
        }  # fmt: skip
        return json.dumps(body).encode()

    def like(self, viewer: int, days_ago: float) -> bytes:
        at = (self.now - timedelta(days=days_ago)).isoformat()
        body = {
            "event_id": f"i-{viewer}-{days_ago}",
            "viewer_id": viewer,
            "event_type": "like",
            "event_ts": at,
        }
        return json.dumps(body).encode()

    def oracle(self) -> Any:
        """What every relation must hold, given what the raw tables hold."""
        from oracle import Erasure, Message, Oracle, micros
        from relations import RAW_TABLES

        with self.platform.engine.connect() as connection:
            messages = [
                Message(topic, *row[:4], row[4] and micros(row[4]), micros(row[5]))
                for topic, table in RAW_TABLES.items()
                for row in connection.execute(
                    "select source, source_partition, source_offset, data, kafka_timestamp, arrived_at"
                    f" from {table}"
                ).fetchall()
            ]
            erased = connection.execute(
                "select subject_kind, subject_id, erased_at from erased_subjects"
            ).fetchall()
            (now,) = connection.execute("select now()").fetchone() or (self.now,)
        return Oracle(
            messages, micros(now), erased=[Erasure(kind, name, micros(at)) for kind, name, at in erased]
        )

    def differences(self) -> Mapping[str, Any]:
        from relations import differences

        oracle = self.oracle()
        with self.platform.engine.connect() as connection:
            return differences(connection, oracle, RELATIONS)

    def due(self, spec: TileTable) -> list[tuple[Any, ...]]:
        """The rows of a training table by the oracle: every complete day, nobody's canaries."""
        from relations import instant

        rows = [
            tuple(
                instant(row[column.name]) if column.name == "last_event_at" else row[column.name]
                for column in spec.columns
            )
            for row in self.oracle().relations()[spec.tile]
            if row["viewer_id"] >= 0 and row[spec.day] < datetime.now(UTC).date()
        ]
        return sorted(rows)

    def table(self, spec: TileTable) -> Any:
        return self.platform.catalog().load_table(spec.identifier(self.platform.settings.iceberg_namespace))

    def rows(self, spec: TileTable) -> list[tuple[Any, ...]]:
        found = self.table(spec).scan().to_arrow().select([column.name for column in spec.columns])
        return sorted(tuple(row.values()) for row in found.to_pylist())

    def heads(self) -> dict[str, int]:
        """Training table → its current snapshot."""
        return {name: self.table(spec).current_snapshot().snapshot_id for name, spec in TILE_TABLES.items()}

    def definitions(self) -> dg.Definitions:
        built = offline_store.build(self.platform)
        return dg.Definitions.merge(built, dg.Definitions(executor=dg.in_process_executor))

    def export(self, days: Sequence[date] | None = None) -> list[date]:
        """Materialize the daily assets of these days, or of those that need it; returns which."""
        stale = offline_store.look(self.platform).stale
        chosen = sorted({day for _, day in stale}) if days is None else list(days)
        job = self.definitions().resolve_job_def(offline_store.EXPORT_JOB)
        with dg.DagsterInstance.ephemeral() as instance:
            for first, last in offline_store.ranges(chosen):
                tags = offline_store.range_tags(first, last)
                assert job.execute_in_process(instance=instance, tags=tags).success
        return chosen

    def parity(self) -> dict[str, dg.AssetCheckEvaluation]:
        """Training table → outcome of its check."""
        job = self.definitions().resolve_job_def(training_data.PARITY_JOB)
        with dg.DagsterInstance.ephemeral() as instance:
            result = job.execute_in_process(instance=instance)
        assert result.success
        return {found.asset_key.path[-1]: found for found in result.get_asset_check_evaluations()}

    @property
    def dynamodb_table(self) -> str:
        return self.platform.settings.table_prefix + self.platform.contract.tables["viewer"].name

    def items(self) -> dict[tuple[int, str], dict[str, Any]]:
        """What DynamoDB holds."""
        from dagster_prefs.dynamodb.items import ItemDecoder

        domains, found = self.platform.contract.domains, {}
        pages = self.platform.dynamodb().get_paginator("scan").paginate(
            TableName=self.dynamodb_table, ConsistentRead=True
        )  # fmt: skip
        for page in pages:
            for item in page["Items"]:
                viewer, key = int(item["viewer_id"]["N"]), item["domain_key"]["S"]
                values, _ = ItemDecoder(domains[key]).decode(item)
                found[(viewer, key)] = dict(zip(domains[key].attributes, values, strict=True))
        return found

    def views(self) -> dict[tuple[int, str], dict[str, Any]]:
        """What the rolling views hold."""
        found = {}
        with self.platform.engine.connect() as connection:
            for domain in self.platform.contract.domains.values():
                names = ", ".join(domain.attributes)
                for viewer, key, *values in connection.execute(
                    f"select viewer_id, domain_key, {names} from {domain.relation}"
                ):
                    found[(viewer, key)] = dict(zip(domain.attributes, values, strict=True))
        return found

    def delivered(self) -> None:
        """Wait until the sinks have written what the views hold."""
        until(lambda: self.items() == self.views(), lambda: f"views {self.views()}, items {self.items()}")

    def prefs(self, *arguments: str) -> str:
        """What a command prints; it must succeed."""
        program = str(Path(sys.executable).with_name("prefs"))
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def world(shell_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    endpoint = shell_environment.get("AWS_ENDPOINT_URL")
    if not endpoint:
        pytest.skip("AWS_ENDPOINT_URL names no DynamoDB")
    now = datetime.now(UTC)
    with database() as engine, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": shell_environment.get("AWS_REGION", "eu-central-1"),
            "AWS_ACCESS_KEY_ID": shell_environment.get("AWS_ACCESS_KEY_ID", "test"),
            "AWS_SECRET_ACCESS_KEY": shell_environment.get("AWS_SECRET_ACCESS_KEY", "test"),
            **engine_settings(engine),
            "PREFS_PUBLISH": "sink",
            "PREFS_TABLE_PREFIX": f"{engine.database}_",
            "PREFS_DATA_DIR": str(tmp_path_factory.mktemp("state")),
            "PREFS_EXPORT_START_DATE": (now - timedelta(days=60)).date().isoformat(),
            "PREFS_PARITY_SHARE": "1",
        }.items():
            patch.setenv(name, value)
        world = World(Platform(load_settings()), now)
        client = world.platform.dynamodb()
        world.platform.provision(client)
        try:
            sinks = ["+" + domain.sink for domain in world.platform.contract.domains.values()]
            others = ["+tile_fingerprints", "+rejected_events", "+ingest_progress", "replayed_events"]
            run(world.platform.dbt, *sinks, *others)
            from relations import insert_canary_keys

            with world.platform.engine.connect() as connection:
                insert_canary_keys(connection)
            world.send(
                "view_events", *(world.view(v, d) for v in (*VIEWERS, CANARY) for d in (0.01, 1, 1.1, 20, 40))
            )
            world.send("view_events", world.view(1, 1), b"{")
            world.send("content_interactions", *(world.like(v, d) for v in VIEWERS for d in (0.01, 1, 3, 40)))
            yield world
        finally:
            client.delete_table(TableName=world.dynamodb_table)


def test_every_day_is_exported_as_the_oracle_has_it(world: World) -> None:
    days = world.export()
    assert len(days) >= 4
    for spec in TILE_TABLES.values():
        assert world.rows(spec) == world.due(spec) != []
    assert world.differences() == {}

    # Nothing needs an export, and one that is ordered all the same commits nothing.
    heads = world.heads()
    assert world.export() == []
    world.export(days)
    assert world.heads() == heads

    # A late event changes its own day, and no file of another one.
    late = (world.now - timedelta(days=20)).date()
    files = {
        task.file.file_path for spec in TILE_TABLES.values() for task in world.table(spec).scan().plan_files()
    }
    world.send("view_events", world.view(3, 20, event_id="late"))
    assert world.export() == [late]
    for spec in TILE_TABLES.values():
        assert world.rows(spec) == world.due(spec)
    after = {
        task.file.file_path for spec in TILE_TABLES.values() for task in world.table(spec).scan().plan_files()
    }
    assert len(files - after) == len(after - files) == 2


def test_what_is_served_equals_the_tables_and_a_corruption_is_named(world: World) -> None:
    world.export()
    world.delivered()
    for name, check in world.parity().items():
        assert check.passed, (name, check.description)
        assert check.metadata["subjects"].value >= len(VIEWERS)
    client, key = (
        world.platform.dynamodb(),
        {"viewer_id": {"N": "2"}, "domain_key": {"S": "engagement#watch"}},
    )
    given = client.get_item(TableName=world.dynamodb_table, Key=key)["Item"]
    client.put_item(TableName=world.dynamodb_table, Item={**given, f"titles_{SHORT}d": {"N": "999"}})
    wrong = [check for check in world.parity().values() if not check.passed]
    client.put_item(TableName=world.dynamodb_table, Item=given)
    assert [check.asset_key.path[-1] for check in wrong] == ["viewer_watch_daily"]
    assert wrong[0].description is not None
    assert f"titles_{SHORT}d of viewer 2: 999 is served" in wrong[0].description


def test_rejected_messages_are_corrected_and_sent_again(world: World, tmp_path: Path) -> None:
    bad = [
        world.view(4, 2, event_id="bad-seconds", watch_duration_sec=-61),
        world.view(4, 2, event_id="bad-viewer", viewer_id="four"),
    ]
    world.send("view_events", *bad, b"\xff\xfe")
    file = tmp_path / "rejected.jsonl"
    world.prefs("rejected", "export", str(file), "--topic", "view_events")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["reason"] for line in lines if "bad-" in str(line["payload"])) == [
        "bad viewer_id",
        "negative watch_duration_sec",
    ]
    mended = []
    for line in lines:
        if "bad-" in str(line["payload"]):
            line["payload"] |= {"viewer_id": 4, "watch_duration_sec": 61}
            mended.append(json.dumps(line))
    file.write_text("\n".join(mended))
    open_before = json.loads(world.prefs("rejected", "--json"))["view_events"]
    assert "2 messages sent, 0 were replayed before" in world.prefs("rejected", "replay", str(file))
    assert "0 messages sent, 2 were replayed before" in world.prefs("rejected", "replay", str(file))
    with world.platform.engine.connect() as connection:
        connection.execute("flush")
        found = connection.execute(
            "select event_id, viewer_id, watch_duration_sec from view_events where event_id like 'bad-%' order by 1"
        ).fetchall()
    assert found == [("bad-seconds", 4, 61), ("bad-viewer", 4, 61)]
    assert world.differences() == {}
    left = json.loads(world.prefs("rejected", "--json"))["view_events"]
    assert sum(open_before.values()) - sum(left.values()) == 2


def test_a_viewer_is_erased_everywhere_and_replays_stay_out(world: World) -> None:
    own = [
        *(world.view(FORGOTTEN, days) for days in (0.01, 1, 20, 40)),
        world.view(FORGOTTEN, 1, event_id="odd-text", viewer_id=f" {FORGOTTEN}\t"),
        world.view(FORGOTTEN, 1, event_id="odd-seconds", watch_duration_sec=-1),
        f"viewer_id={FORGOTTEN} watched".encode() + b"\xff\xfe",
    ]
    liked = [world.like(FORGOTTEN, 1)]
    world.send("view_events", *own)
    world.send("content_interactions", *liked)
    world.export()
    world.delivered()
    before = {name: world.rows(spec) for name, spec in TILE_TABLES.items()}
    items = world.items()
    tiles = world.oracle().relations()["viewer_watch_metrics_1d"]
    domains = len(world.platform.contract.domains)
    assert len([key for key in items if key[0] == FORGOTTEN]) == domains

    report = json.loads(world.prefs("erase", "viewer", str(FORGOTTEN), "--json"))
    counts = {(h["place"], h["unit"]): (h["before"], h["after"]) for h in report["stores"]}
    namespace = world.platform.settings.iceberg_namespace
    assert {place: after for place, (_, after) in counts.items() if after} == {}
    assert counts["raw_view_events", "messages"][0] == len(own)
    assert counts["viewer_watch_metrics_1d", "rows"][0] == sum(row["viewer_id"] == FORGOTTEN for row in tiles)
    assert counts[world.dynamodb_table, "items"][0] == domains
    assert counts[f"{namespace}.viewer_watch_daily", "rows"][0] == 3
    assert report["held"]
    assert "RisingWave" in report["unfinished"]

    def nowhere() -> None:
        assert world.differences() == {}
        assert (
            world.items()
            == world.views()
            == {key: item for key, item in items.items() if key[0] != FORGOTTEN}
        )
        for name, spec in TILE_TABLES.items():
            assert world.rows(spec) == world.due(spec) == [row for row in before[name] if row[0] != FORGOTTEN]

    nowhere()
    with world.platform.engine.connect() as connection:
        for table in ("raw_view_events", "raw_content_interactions"):
            held = connection.execute(f"select data from {table} where source = 'test'").fetchall()
            assert [data for (data,) in held if str(FORGOTTEN).encode() in data] == []
    files = list((world.platform.settings.data_dir / "iceberg").rglob("*.parquet"))
    assert files
    for file in files:
        assert FORGOTTEN not in pq.read_table(file, columns=["viewer_id"]).column(0).to_pylist(), file

    # Once more finds nothing and commits nothing.
    heads = world.heads()
    again = json.loads(world.prefs("erase", "viewer", str(FORGOTTEN), "--json"))
    assert (again["held"], again["first_erased"], again["erased_at"]) == (False, False, report["erased_at"])
    assert world.heads() == heads

    # The topic is read once more, from its start and under another name.
    world.send("view_events", *own, source="replay")
    world.send("content_interactions", *liked, source="replay")
    assert world.export() == []
    nowhere()


def test_what_risingwaves_own_sink_writes_is_verified(
    world: World, aws_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through RisingWave's native REST client, because few builds have the Java libraries of the other; and without its
    compactor, which brings a sink's branch to main."""
    from offline_store.rest_catalog import rest_server

    boto3.client("s3", endpoint_url=aws_endpoint).create_bucket(
        Bucket="lake", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )
    behind = SqlCatalog(
        "lake",
        uri=f"sqlite:///{tmp_path / 'lake.db'}",
        warehouse="s3://lake/warehouse",
        **{"s3.endpoint": aws_endpoint, "s3.region": "eu-central-1"},
    )
    with rest_server(behind, "prefs:open sesame") as rest, world.platform.engine.connect() as connection:
        for name, value in {
            "AWS_ENDPOINT_URL": aws_endpoint,
            "PREFS_EXPORT": "sink",
            "PREFS_ICEBERG_CATALOG": "rest",
            "PREFS_ICEBERG_URI": rest.uri,
            "PREFS_ICEBERG_CREDENTIAL": "prefs:open sesame",
            "PREFS_ICEBERG_WAREHOUSE": "s3://lake/warehouse",
        }.items():
            monkeypatch.setenv(name, value)
        platform = Platform(load_settings())
        table = next(made for made in platform.prepare_training_tables() if made.name()[-1] == WATCH.name)
        # pyiceberg, which is behind this catalog, refuses branches of an empty table; Iceberg's own server does not.
        with table.transaction() as change:
            change.update_snapshot().fast_append().commit()
        statement = platform.dbt.compiled(["sink_training_watch"])["sink_training_watch"]
        for given, wanted in {
            "catalog.type = 'rest'": "catalog.type = 'rest_rust'",
            "commit_checkpoint_interval = '60'": "commit_checkpoint_interval = '1'",
            **{f"${{{name}}}": os.environ[name] for name in SINK_CREDENTIALS},
        }.items():
            assert given in statement
            statement = statement.replace(given, wanted)
        names = ", ".join(column.name for column in WATCH.columns)

        def due() -> list[tuple[Any, ...]]:
            found = connection.execute(f"select {names} from {WATCH.tile} where viewer_id >= 0")
            return sorted(found.fetchall())

        def written() -> list[tuple[Any, ...]]:
            branch = table.refresh().snapshot_by_name(SINK_BRANCH)
            if branch is None:
                return []
            rows = table.scan(snapshot_id=branch.snapshot_id).to_arrow().to_pylist()
            return sorted(tuple(row.values()) for row in rows)

        try:
            connection.execute(statement)
            until(lambda: written() == due() != [], written)
            # The sink refuses its first commit under another schema than it began with, and must not lose it.
            with table.update_schema() as change:
                change.update_column("views", doc="another description")
            before = due()
            # Of a day of its own, also after midnight: a row that changes would come as a delete by key.
            world.send("view_events", world.view(VIEWERS[0], 5))
            until(lambda: written() == due() != before, written)
            # A sink that is there keeps its branch.
            platform.prepare_training_tables()
            branch = table.refresh().snapshot_by_name(SINK_BRANCH)
            assert branch is not None
            table.manage_snapshots().set_current_snapshot(snapshot_id=branch.snapshot_id).commit()
            for day in {row[1] for row in due()}:
                report = verify_day(
                    platform.engine, platform.catalog(), WATCH, day, keep_tag=timedelta(days=1)
                )
                assert report.status == "verified"
            assert (
                stale_days(platform.engine, WATCH, exported_days(platform.catalog(), WATCH), by_sink=True)
                == {}
            )
        finally:
            connection.execute(f"drop sink if exists {WATCH.sink}")
        # The next one would write every row a second time beside those of the first.
        platform.prepare_training_tables()
        assert SINK_BRANCH not in table.refresh().refs()


def test_events_are_exported_as_the_engine_has_them(world: World) -> None:
    (report,) = world.platform.export_events(["view_events"])
    assert report.failed == {}
    assert report.lost == 0
    tables = world.platform.event_exports()["view_events"].tables
    catalog = world.platform.catalog()
    engine = world.platform.engine
    raw = read_events(
        catalog, tables.raw, Selection(columns=["source", "source_partition", "source_offset", "data"])
    )
    with engine.connect() as connection:
        # A replay of an erased viewer's message keeps its bytes in the engine, and leaves it without them.
        expected = connection.execute(
            "select r.source, r.source_partition, r.source_offset,"
            " case when e.subject_id is null then r.data else %s end"
            " from raw_view_events as r"
            " join view_events_parsed as p on p.source = r.source and p.source_partition = r.source_partition"
            " and p.source_offset = r.source_offset"
            " left join erased_subjects as e on e.subject_kind = 'viewer' and e.subject_id = p.viewer_id::varchar"
            " and p.watched_at <= e.erased_at",
            [REDACTED],
        ).fetchall()
        (stored,) = connection.execute("select count(*) from raw_view_events").fetchall()
        typed = connection.execute("select event_id from view_events where viewer_id >= 0").fetchall()
    assert stored == (len(expected),)
    assert sorted(tuple(row.values()) for row in raw.read_all().to_pylist()) == sorted(expected)
    with duckdb.connect() as session:
        load_accepted(session, "found", catalog, tables.typed)
        assert sorted(session.sql("select event_id from found").fetchall()) == sorted(typed)
    (again,) = world.platform.export_events(["view_events"])
    assert again.hours == 0
