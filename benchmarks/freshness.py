"""What a full evaluation costs: 50 relations, 64 Kafka partitions, three domains, at two numbers of viewers.

    python benchmarks/freshness.py [--viewers 1000,1000000] [--repeat 5]

Relations are tables filled by SQL with one row per viewer and the indexes of the models; views beyond those of the
project are copies with rows and an index of their own. DynamoDB (the local AWS server) holds only the viewers that
are sampled; Kafka is librdkafka's mock cluster, with one unread message per partition. Prints one JSON line per
number of viewers: median and largest seconds per stage, and their ratios to the least that the servers need for the
same: a bare `select max(time)` per relation (which is what `dbt source freshness` runs), a bare BatchGetItem and
Scan per domain, a bare watermark request per partition. A last line compares the numbers of viewers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from psycopg import sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.freshness.ingestion import Broker, ingestion_lag
from dagster_prefs.freshness.measures import measure_online, measure_views
from dagster_prefs.freshness.online import CANDIDATES, find_table, key_hash
from dagster_prefs.freshness.views import RELATIONS, Typed, View
from dagster_prefs.local.services import LocalServices
from dagster_prefs.online.contract import Contract, load_contract
from dagster_prefs.online.items import ItemEncoder
from dagster_prefs.online.tables import dynamodb_client, provision

SAMPLE = 64
COLUMN = {
    "integer": ("bigint", "g % 1000"),
    "decimal": ("numeric", "(g % 100000) / 100.0"),
    "string": ("text", "'drama'"),
    "list<string>": ("text[]", "array['drama', 'news']"),
    "list<decimal>": ("numeric[]", "array[0.75, 0.25]"),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fill(engine: EngineConnection, contract: Contract, viewers: int, relations: int) -> list[Typed | View]:
    """The relations, `relations` in all, with one row per viewer, everything in step."""
    domains = {domain.relation: domain for domain in contract.domains.values()}
    with engine.connect() as connection:
        connection.execute("create table deployments (relation text primary key, deployed_at timestamptz)")
        connection.execute("create table erased_subjects (subject_kind text, subject_id text)")
        connection.execute(
            "create table online_published (table_id text, domain_key text, viewer_id bigint, fingerprint text,"
            " primary key (table_id, domain_key, viewer_id))"
        )
        newest = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
        time_of = f"timestamptz '{newest}' - make_interval(secs => g % 86400)"
        for relation in RELATIONS:
            if isinstance(relation, Typed):
                columns = f"{relation.key} text, {relation.time or 'unused'} timestamptz, category text,"
                columns += " brand text, genre text, user_id text, viewer_id bigint"
                rows = f"g::text, {time_of}, 'c', 'b', 'g', g::text, g"
                connection.execute(f"create table {relation.relation} ({columns})")
                connection.execute(
                    f"insert into {relation.relation} select {rows} from generate_series(1, {viewers}) as g"
                )
                connection.execute(f"create index on {relation.relation} ({relation.key})")
                connection.execute(
                    f"create table {relation.parsed} as select *, null::text as reason, {time_of} as arrived_at"
                    f" from {relation.relation}, lateral (select {relation.key}::bigint) as n (g)"
                )
                connection.execute(
                    f"create table {relation.raw} (source text, source_partition int, source_offset bigint,"
                    " arrived_at timestamptz, primary key (source, source_partition, source_offset))"
                )
                connection.execute(
                    f"insert into {relation.raw} select 'file:x', 0, g, {time_of}"
                    f" from generate_series(1, {viewers}) as g"
                )
                for table in (relation.parsed, relation.raw):
                    connection.execute(f"create index on {table} (arrived_at)")
                if relation.time:
                    connection.execute(f"create index on {relation.relation} ({relation.time})")
                continue
            domain = domains.get(relation.relation)
            if domain:
                names = [name for name in domain.attributes if name != relation.time]
                kinds = [COLUMN[domain.attributes[name].type] for name in names]
                columns = ", ".join(f"{name} {kind}" for name, (kind, _) in zip(names, kinds, strict=True))
                rows = ", ".join(value for _, value in kinds)
                moment = f"(extract(epoch from {time_of}) * 1000)::bigint"
                connection.execute(
                    f"create table {relation.relation} (viewer_id bigint primary key, {columns},"
                    f" {relation.time} bigint)"
                )
                connection.execute(
                    f"insert into {relation.relation} select g, {rows}, {moment}"
                    f" from generate_series(1, {viewers}) as g"
                )
            else:
                connection.execute(
                    f"create table {relation.relation} as select g as viewer_id, {time_of} as {relation.time},"
                    f" ({time_of})::date as watch_date, ({time_of})::date as interaction_date"
                    f" from generate_series(1, {viewers}) as g"
                )
            connection.execute(f"create index on {relation.relation} ({relation.time})")
        read: list[Typed | View] = list(RELATIONS)
        views = [relation for relation in RELATIONS if isinstance(relation, View)]
        while len(read) < relations:
            original = views[len(read) % len(views)]
            copy = replace(original, relation=f"{original.relation}_{len(read)}")
            connection.execute(f"create table {copy.relation} as select {copy.time} from {original.relation}")
            connection.execute(f"create index on {copy.relation} ({copy.time})")
            read.append(copy)
        connection.execute("vacuum analyze")
    return read


def store_sample(engine: EngineConnection, client: Any, contract: Contract, table: Any, viewers: int) -> None:
    with engine.connect() as connection:
        for domain in contract.domains.values():
            connection.execute(
                f"insert into online_published select %s, %s, g, 'x' from generate_series(1, {viewers}) as g",
                [table.table_id, domain.key],
            )
            names = sql.SQL(", ").join(map(sql.Identifier, domain.attributes))
            rows = connection.execute(
                sql.SQL(
                    "select viewer_id, {} from {} order by last_event_at desc, viewer_id limit %s"
                ).format(names, sql.Identifier(domain.relation)),
                [CANDIDATES * SAMPLE],
            ).fetchall()
            encoder = ItemEncoder(contract, domain)
            chosen = sorted(rows, key=lambda row: key_hash(row[0]))[:SAMPLE]
            connection.execute("drop table if exists bench_sample")
            connection.execute("create table bench_sample (viewer_id bigint)")
            connection.cursor().executemany(
                "insert into bench_sample values (%s)", [(viewer,) for viewer, *_ in chosen]
            )
            for start in range(0, len(chosen), 25):
                batch = [
                    {"PutRequest": {"Item": encoder.encode(viewer, values)}}
                    for viewer, *values in chosen[start : start + 25]
                ]
                client.batch_write_item(RequestItems={table.name: batch})


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


def partitions_behind(engine: EngineConnection, bootstrap: str, names: list[str], now: datetime) -> int:
    """Read every topic's lag as the measures do; the number of partitions that are behind."""
    with engine.connect() as connection, Broker(bootstrap) as broker:
        lags = [
            ingestion_lag(connection, engine, broker, "view_events", now=now, kafka_topic=name)
            for name in names
        ]
    return sum(len(lag.in_state("behind")) for lag in lags)


def bare_maxima(engine: EngineConnection, relations: list[Typed | View]) -> None:
    """The newest time of every relation and nothing else."""
    with engine.connect() as connection:
        for relation in relations:
            if relation.time:
                connection.execute(
                    sql.SQL("select max({}), now() from {}").format(
                        sql.Identifier(relation.time), sql.Identifier(relation.relation)
                    )
                ).fetchone()


def bare_reads(engine: EngineConnection, client: Any, contract: Contract, table: str) -> None:
    """As many items and as much of the table as a sample of every domain, compared with nothing."""
    with engine.connect() as connection:
        viewers = [row[0] for row in connection.execute("select viewer_id from bench_sample").fetchall()]
    for domain in contract.domains.values():
        keys = [{"viewer_id": {"N": str(viewer)}, "domain_key": {"S": domain.key}} for viewer in viewers]
        client.batch_get_item(RequestItems={table: {"Keys": keys[:100], "ConsistentRead": True}})
        client.scan(TableName=table, Limit=4 * SAMPLE, ProjectionExpression="viewer_id, domain_key")


def bare_watermarks(bootstrap: str, names: list[str]) -> None:
    """The first and last offset of every partition and nothing else."""
    with Broker(bootstrap) as broker:
        for name in names:
            broker.watermarks(name)


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
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    contract = load_contract()
    os.environ.update(AWS_ACCESS_KEY_ID="local", AWS_SECRET_ACCESS_KEY="local")
    with tempfile.TemporaryDirectory(prefix="prefs-bench-") as folder:
        Path(folder).chmod(0o755)
        services = LocalServices(Path(folder) / "data", free_port(), free_port())
        services.up(owner_pid=os.getpid())
        try:
            lines = []
            for viewers in map(int, arguments.viewers.split(",")):
                lines.append(measure(services, contract, viewers, arguments))
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


def measure(services: LocalServices, contract: Contract, viewers: int, arguments: Any) -> dict[str, Any]:
    server = EngineConnection("127.0.0.1", services.postgres_port, "postgres", "prefs")
    with server.connect() as connection:
        connection.execute(f"create database bench_{viewers}")
    engine = server.with_database(f"bench_{viewers}")
    relations = fill(engine, contract, viewers, arguments.relations)
    client = dynamodb_client(f"http://127.0.0.1:{services.aws_port}", "eu-central-1")
    prefix = f"bench{viewers}_"
    table = provision(client, contract, prefix=prefix)
    store_sample(engine, client, contract, table, viewers)
    producer, bootstrap, names = cluster(arguments.partitions)
    not_ok: list[str] = []
    behind: list[int] = []

    def views(now: datetime) -> None:
        found = measure_views(engine, contract, now=now, relations=relations)
        not_ok.extend(f"{one.key}: {one.reason}" for one in found if one.level != "ok")

    def online(now: datetime) -> None:
        found = measure_online(
            engine,
            contract,
            lambda: (client, find_table(client, contract, prefix)),
            now=now,
            publishes=True,
            sample=SAMPLE,
        )
        not_ok.extend(f"{one.key}: {one.reason}" for one in found if one.level != "ok")

    def ingestion(now: datetime) -> None:
        behind.append(partitions_behind(engine, bootstrap, names, now))

    stages: dict[str, tuple[Callable[[datetime], None], Callable[[], None]]] = {
        "views": (views, lambda: bare_maxima(engine, relations)),
        "online": (online, lambda: bare_reads(engine, client, contract, table.name)),
        "ingestion": (ingestion, lambda: bare_watermarks(bootstrap, names)),
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
