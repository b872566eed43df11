"""What a full evaluation costs: 50 relations, 64 Kafka partitions, three domains, training tables of many days, at two
numbers of viewers.

    python benchmarks/freshness.py [--viewers 1000,1000000] [--days 90] [--repeat 5] [--risingwave URL] [--no-indexes]

Relations are tables filled by SQL with one row per viewer and the indexes of the models; views beyond those of the
project are copies with rows and an index of their own. They are in the embedded engine, or in databases of their own
on the RisingWave server at URL (postgresql://root@host:4566); `--no-indexes` shows what their absence costs. DynamoDB
(the local AWS server) holds only the viewers that are sampled; Kafka is librdkafka's mock cluster, with one unread
message per partition; each training table is an Iceberg table of `--days` days, each written by a commit of its own.
Prints one JSON line per number of viewers: median and largest seconds per stage, and their ratios to the least that the
servers need for the same: a bare `select max(time)` per relation (which is what `dbt source freshness` runs), a bare
BatchGetItem and Scan per domain, a bare watermark request per partition, one planned scan per training table. A last
line compares the numbers of viewers. The canary is left out: it takes as long as the event that it waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from confluent_kafka import Producer
from psycopg import sql
from pyiceberg.catalog import Catalog

from dagster_prefs.declarations.contract import Contract, load_contract
from dagster_prefs.declarations.registry import WatchedView, load_registry
from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.dynamodb.store import domain_stores
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.freshness.ingestion import Broker, ingestion_lag
from dagster_prefs.freshness.measures import measure_offline, measure_online, measure_views
from dagster_prefs.freshness.online import CANDIDATES, SAMPLE, find_tables, key_hash
from dagster_prefs.freshness.views import Typed, watched_relations
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.publish import DayFiles, publish_day, write_day
from dagster_prefs.iceberg.tables import TileTable, arrow_schema, ensure_table, tile_tables
from dagster_prefs.iceberg.tiles import Fingerprint
from dagster_prefs.local.services import LocalServices

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
REGISTRY = load_registry(PROJECT)
TILE_TABLES = tile_tables(REGISTRY)
RELATIONS = watched_relations(REGISTRY)
NAMESPACE = "training"
# Type and value, by the number g of a row, of each type of the contract.
COLUMN = {
    "integer": ("bigint", "g % 1000"),
    "decimal": ("numeric", "(g % 100000) / 100.0"),
    "string": ("varchar", "'drama'"),
    "list<string>": ("varchar[]", "array['drama', 'news']"),
    "list<decimal>": ("numeric[]", "array[0.75, 0.25]"),
    "list<integer>": ("bigint[]", "array[1, 2]"),
}
ONE_ROW = Fingerprint(1, Decimal(0), Decimal(1), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Filler:
    """Makes relations of `viewers` rows; a column is its type and the SQL of its value for row g."""

    def __init__(self, connection: Any, viewers: int, *, indexes: bool) -> None:
        self.connection, self.viewers, self.indexes = connection, viewers, indexes
        newest = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
        self.time = ("timestamptz", f"'{newest}'::timestamptz - (g % 86400) * interval '1 second'")

    def make(
        self,
        name: str,
        columns: Mapping[str, tuple[str, str]],
        key: Sequence[str],
        time: str = "",
        include: Sequence[str] = (),
    ) -> None:
        """A filled table with its key and, as `index_time` of the dbt project makes it, an index on its time."""
        described = ", ".join(f"{column} {kind}" for column, (kind, _) in columns.items())
        values = ", ".join(value for _, value in columns.values())
        self.connection.execute(f"create table {name} ({described}, primary key ({', '.join(key)}))")
        self.connection.execute(
            f"insert into {name} select {values} from generate_series(1, {self.viewers}) as g"
        )
        if time and self.indexes:
            self.connection.execute(
                f"create index {name}_by_time on {name} ({time} desc) include ({', '.join(include or [time])})"
            )


def fill(
    engine: EngineConfiguration,
    contract: Contract,
    viewers: int,
    relations: int,
    days: Sequence[date],
    *,
    indexes: bool,
) -> list[Typed | WatchedView]:
    """The relations, `relations` in all, with one row per viewer, everything in step."""
    domains = {domain.relation: domain for domain in contract.domains.values()}
    with engine.connect() as connection:
        connection.execute("create table deployments (relation varchar primary key, deployed_at timestamptz)")
        connection.execute(
            "create table erased_subjects (subject_kind varchar, subject_id varchar,"
            " primary key (subject_kind, subject_id))"
        )
        connection.execute(
            "create table ingest_progress (topic varchar, source varchar, source_partition int, last_offset bigint,"
            " primary key (topic, source, source_partition))"
        )
        connection.execute(
            "create table tile_fingerprints (tile varchar, tile_date date, row_count bigint, metric_total numeric,"
            " content_hash numeric, last_event_at timestamptz, primary key (tile, tile_date))"
        )
        for spec in TILE_TABLES.values():
            connection.cursor().executemany(
                "insert into tile_fingerprints values (%s, %s, 1, 0, 1, null)",
                [(spec.tile, day) for day in days],
            )
        filler = Filler(connection, viewers, indexes=indexes)
        text, number, moment = ("varchar", "g::varchar"), ("bigint", "g"), filler.time
        message = {
            "source": ("varchar", "'file:x'"),
            "source_partition": ("int", "0"),
            "source_offset": number,
            "arrived_at": moment,
        }
        for relation in RELATIONS:
            if isinstance(relation, Typed):
                event = {
                    **dict.fromkeys(("category", "brand", "genre", "user_id"), text),
                    "viewer_id": number,
                    relation.declared.identity: text,
                    relation.declared.time or "unused": moment,
                }
                include = ("category", "brand", "genre")
                filler.make(
                    relation.relation,
                    event,
                    [relation.declared.identity],
                    relation.declared.time or "",
                    include,
                )
                parsed = {**message, "reason": ("varchar", "null"), **event}
                filler.make(relation.declared.parsed, parsed, list(message)[:3], "arrived_at", ["reason"])
                filler.make(relation.declared.raw, message, list(message)[:3], "arrived_at")
            elif domain := domains.get(relation.relation):
                columns = {
                    "viewer_id": number,
                    **{name: COLUMN[attribute.type] for name, attribute in domain.attributes.items()},
                    relation.time: ("bigint", f"(extract(epoch from {moment[1]}) * 1000)::bigint"),
                }
                filler.make(relation.relation, columns, ["viewer_id"], relation.time)
            else:
                day = ("date", f"({moment[1]})::date")
                columns = {
                    "viewer_id": number,
                    "watch_date": day,
                    "interaction_date": day,
                    relation.time: moment,
                }
                filler.make(
                    relation.relation,
                    columns,
                    ["viewer_id", "watch_date", "interaction_date"],
                    relation.time,
                )
        read: list[Typed | WatchedView] = list(RELATIONS)
        views = [
            relation
            for relation in RELATIONS
            if isinstance(relation, WatchedView) and not relation.is_rolling
        ]
        while len(read) < relations:
            original = views[len(read) % len(views)]
            copy = replace(original, relation=f"{original.relation}_{len(read)}")
            filler.make(copy.relation, {"viewer_id": number, copy.time: moment}, ["viewer_id"], copy.time)
            read.append(copy)
        if engine.kind == "local":
            connection.execute("vacuum analyze")
    return read


def export(catalog: Catalog, spec: TileTable, days: Sequence[date]) -> None:
    """A training table that holds one row of each day, as `tile_fingerprints` says."""
    table = ensure_table(catalog, NAMESPACE, spec)
    schema = arrow_schema(table)
    for day in days:
        row = {
            column.name: day
            if pa.types.is_date(column.type)
            else datetime(day.year, day.month, day.day, tzinfo=UTC)
            if pa.types.is_timestamp(column.type)
            else "drama"
            if pa.types.is_large_string(column.type) or pa.types.is_string(column.type)
            else 1
            for column in schema
        }
        files = DayFiles(ONE_ROW.token, 1, dict.fromkeys(spec.totals, Decimal(1)), ONE_ROW.properties())
        write_day(table, spec, day, files, [pa.RecordBatch.from_pylist([row], schema=schema)])
        if publish_day(table, spec, day, files, set()) is None:
            raise SystemExit(f"{spec.name} of {day} could not be written")


def store_sample(
    engine: EngineConfiguration, client: Any, contract: Contract, table: Any, viewers: int
) -> list[int]:
    """The items of the viewers that are sampled, and the publisher's memory of all; gives those viewers."""
    with engine.connect() as connection:
        if engine.kind == "local":
            connection.execute(
                "create table online_published (table_id text, domain_key text, entity_key text, fingerprint text,"
                " primary key (table_id, domain_key, entity_key))"
            )
        for domain in contract.domains.values():
            if engine.kind == "local":
                connection.execute(
                    "insert into online_published select %s, %s, g::text, 'x' from"
                    f" generate_series(1, {viewers}) as g",
                    [table.table_id, domain.key],
                )
            names = sql.SQL(", ").join(map(sql.Identifier, domain.attributes))
            rows = connection.execute(
                sql.SQL(
                    "select viewer_id, {} from {} order by last_event_at desc, viewer_id limit {}"
                ).format(names, sql.Identifier(domain.relation), sql.Literal(CANDIDATES * SAMPLE))
            ).fetchall()
            encoder = ItemEncoder(contract, domain)
            chosen = sorted(rows, key=lambda row: key_hash(row[0]))[:SAMPLE]
            for start in range(0, len(chosen), 25):
                batch = [
                    {"PutRequest": {"Item": encoder.encode(viewer, values)}}
                    for viewer, *values in chosen[start : start + 25]
                ]
                client.batch_write_item(RequestItems={table.name: batch})
    return [viewer for viewer, *_ in chosen]


def cluster(partitions: int) -> tuple[Producer, str, list[str]]:
    """A mock cluster with topics of `partitions` partitions in all, one unread message in each."""
    producer = Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = producer.list_topics(timeout=10).brokers.values()
    # The mock cluster gives each topic four partitions.
    names = [f"bench{number}" for number in range(-(-partitions // 4))]
    for name in names:
        for partition in range(4):
            producer.produce(name, b"{}", partition=partition)
    if producer.flush(30):
        raise SystemExit("the mock cluster did not take the messages")
    return producer, f"{broker.host}:{broker.port}", names


def partitions_behind(engine: EngineConfiguration, bootstrap: str, names: list[str], now: datetime) -> int:
    """Read every topic's lag as the measures do; the number of partitions that are behind."""
    with engine.connect() as connection, Broker(bootstrap) as broker:
        lags = [
            ingestion_lag(
                connection,
                engine,
                broker,
                REGISTRY.topics["view_events"],
                now=now,
                kafka=KafkaSource(topics={"view_events": name}),
            )
            for name in names
        ]
    return sum(len(lag.in_state("behind")) for lag in lags)


def bare_maxima(engine: EngineConfiguration, relations: list[Typed | WatchedView]) -> None:
    """The newest time of every relation and nothing else."""
    with engine.connect() as connection:
        for relation in relations:
            time = relation.declared.time if isinstance(relation, Typed) else relation.time
            if time:
                connection.execute(
                    sql.SQL("select max({}), now() from {}").format(
                        sql.Identifier(time), sql.Identifier(relation.relation)
                    )
                ).fetchone()


def bare_reads(client: Any, contract: Contract, table: str, viewers: list[int]) -> None:
    """As many items and as much of the table as a sample of every domain, compared with nothing."""
    for domain in contract.domains.values():
        keys = [{"viewer_id": {"N": str(viewer)}, "domain_key": {"S": domain.key}} for viewer in viewers]
        client.batch_get_item(RequestItems={table: {"Keys": keys[:100], "ConsistentRead": True}})
        client.scan(TableName=table, Limit=4 * SAMPLE, ProjectionExpression="viewer_id, domain_key")


def bare_watermarks(bootstrap: str, names: list[str]) -> None:
    """The first and last offset of every partition and nothing else."""
    with Broker(bootstrap) as broker:
        for name in names:
            broker.watermarks(name)


def bare_plans(catalog: Catalog) -> None:
    """The files of every training table and nothing else."""
    for spec in TILE_TABLES.values():
        list(catalog.load_table(spec.identifier(NAMESPACE)).scan().plan_files())


def seconds_of(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--viewers", default="1000,1000000")
    parser.add_argument("--relations", type=int, default=50)
    parser.add_argument("--partitions", type=int, default=64)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--risingwave", metavar="URL")
    parser.add_argument("--no-indexes", action="store_true")
    arguments = parser.parse_args()
    contract = load_contract(PROJECT)
    os.environ.update(AWS_ACCESS_KEY_ID="local", AWS_SECRET_ACCESS_KEY="local")
    with tempfile.TemporaryDirectory(prefix="prefs-bench-") as folder:
        Path(folder).chmod(0o755)
        services = LocalServices(Path(folder) / "data", free_port(), free_port())
        services.up(owner_pid=os.getpid())
        try:
            today = datetime.now(UTC).date()
            days = [today - timedelta(days=ago) for ago in range(arguments.days, 0, -1)]
            catalog = open_catalog("sqlite", (Path(folder) / "iceberg").as_uri())
            for spec in TILE_TABLES.values():
                export(catalog, spec, days)
            lines = []
            for viewers in map(int, arguments.viewers.split(",")):
                with database(services, viewers, arguments.risingwave) as engine:
                    lines.append(measure(services, engine, contract, viewers, catalog, days, arguments))
                print(json.dumps(lines[-1]), flush=True)
            fewest, most = (choose(lines, key=lambda line: line["viewers"]) for choose in (min, max))
            print(
                json.dumps(
                    {
                        "times_as_many_viewers": most["viewers"] / fewest["viewers"],
                        "times_as_long": round(most["all_median_s"] / fewest["all_median_s"], 2),
                        "limit_s": 10,
                        "within_limit": all(line["all_max_s"] < 10 for line in lines),
                    }
                )
            )
        finally:
            services.down()


@contextmanager
def database(services: LocalServices, viewers: int, risingwave: str | None) -> Iterator[EngineConfiguration]:
    """An empty database, dropped afterwards."""
    server = EngineConfiguration("127.0.0.1", services.postgres_port, "postgres", "prefs")
    if risingwave:
        place = urlsplit(risingwave)
        server = EngineConfiguration(
            place.hostname or "127.0.0.1",
            place.port or 4566,
            place.path.strip("/") or "dev",
            place.username or "root",
            place.password or "",
            kind="risingwave",
        )
    name = f"bench_freshness_{viewers}"
    with server.connect() as connection:
        connection.execute(f"create database {name}")
    try:
        yield server.with_database(name)
    finally:
        with server.with_database(name).connect() as connection:
            connection.execute("drop schema public cascade")
        with server.connect() as connection:
            connection.execute(f"drop database {name}")


def measure(
    services: LocalServices,
    engine: EngineConfiguration,
    contract: Contract,
    viewers: int,
    catalog: Catalog,
    days: Sequence[date],
    arguments: Any,
) -> dict[str, Any]:
    relations = fill(engine, contract, viewers, arguments.relations, days, indexes=not arguments.no_indexes)
    client = dynamodb_client(f"http://127.0.0.1:{services.aws_port}", "eu-central-1")
    prefix = f"bench{viewers}_"
    table = provision(client, contract, prefix=prefix)["viewer"]
    sampled = store_sample(engine, client, contract, table, viewers)
    producer, bootstrap, names = cluster(arguments.partitions)
    not_ok: list[str] = []
    behind: list[int] = []

    def views(now: datetime) -> None:
        found = measure_views(engine, REGISTRY, now=now, relations=relations)
        not_ok.extend(f"{one.key}: {one.reason}" for one in found if one.level != "ok")

    def online(now: datetime) -> None:
        found = measure_online(
            contract,
            lambda: domain_stores(engine, client, contract, find_tables(client, contract, prefix)),
            now=now,
            publishes=True,
        )
        not_ok.extend(f"{one.key}: {one.reason}" for one in found if one.level != "ok")

    def ingestion(now: datetime) -> None:
        behind.append(partitions_behind(engine, bootstrap, names, now))

    def offline(now: datetime) -> None:
        found = measure_offline(
            engine,
            REGISTRY,
            lambda: catalog,
            namespace=NAMESPACE,
            start=days[0],
            now=now,
        )
        not_ok.extend(f"{one.key}: {one.reason}" for one in found if one.level != "ok")

    stages: dict[str, tuple[Callable[[datetime], None], Callable[[], object]]] = {
        "views": (views, lambda: bare_maxima(engine, relations)),
        "online": (online, lambda: bare_reads(client, contract, table.name, sampled)),
        "ingestion": (ingestion, lambda: bare_watermarks(bootstrap, names)),
        "offline": (offline, lambda: bare_plans(catalog)),
    }
    taken: dict[str, list[float]] = {name: [] for name in (*stages, "all")}
    bare: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(arguments.repeat):
        now = datetime.now(UTC)
        for name, (read, least) in stages.items():
            taken[name].append(seconds_of(partial(read, now)))
            bare[name].append(seconds_of(least))
        taken["all"].append(sum(taken[name][-1] for name in stages))
    producer.purge()
    if not_ok or set(behind) != {4 * len(names)}:
        raise SystemExit(f"the readings are wrong: {not_ok[:3]}, partitions behind {set(behind)}")
    count = client.scan(TableName=table.name, Select="COUNT")["Count"]
    return {
        "viewers": viewers,
        "relations": len({relation.relation for relation in relations}),
        "partitions": behind[0],
        "days": len(days),
        "items_in_dynamodb": count,
        **{f"{name}_median_s": round(statistics.median(all_), 3) for name, all_ in taken.items()},
        **{f"{name}_max_s": round(max(all_), 3) for name, all_ in taken.items()},
        **{
            f"{name}_over_bare": round(statistics.median(taken[name]) / statistics.median(all_), 1)
            for name, all_ in bare.items()
        },
    }


if __name__ == "__main__":
    main()
