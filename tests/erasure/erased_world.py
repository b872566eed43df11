"""What an erasure is tested on: messages, and everything that is made of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from psycopg import sql

# The oracle and the helpers of tests/dbt serve here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dbt"))

from declared import PROJECT
from oracle import DAY, SECOND, Erasure, Message, Oracle
from relations import RAW_TABLES, differences, instant, refresh
from shipped import REGISTRY, TILE_TABLES
from streams import NOW

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.dynamodb.store import domain_stores
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.erasure.erase import ErasureReport, Stores, erase
from dagster_prefs.erasure.events import Subject
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days
from dagster_prefs.iceberg.tables import TileTable

# Ids that stand in nothing else, so that any trace of them is a trace of them; the other viewers' ids
# begin, end or continue them.
VIEWER, NEIGHBOURS = 777_000_123, (7, 77_700_012, 777_000_124, 123, 7_770_001_230)
USER, USERS = "Zoë/gone", ("Zoë", "Zoë/gone2", "u1")
# Days before NOW that have events: the oldest two will have left the engine, one of them in part.
DAYS_AGO = (40, 39, 0)
ERASED_AT = NOW + 5 * SECOND

TODAY = instant(NOW).date()
OLD, PARTED, ALONE = (TODAY - timedelta(days=days) for days in (40, 39, 20))
# The producer's clock that ran ahead decides until when events are suppressed.
AHEAD = NOW + DAY // 10
ERASURE = Erasure("viewer", str(VIEWER), AHEAD)

REDACTED = b'{"erased":true}'


def view(number: str, viewer: Any, days_ago: float, **fields: Any) -> bytes:
    """The body of a view event."""
    body = {
        "event_id": number, "viewer_id": viewer, "content_id": f"c-{number}", "genre": "drama",
        "watch_duration_sec": 60, "completion_pct": 0.95,
        "watched_at": instant(NOW - int(days_ago * DAY)).isoformat(), **fields,
    }  # fmt: skip
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def like(number: str, viewer: Any, days_ago: float, **fields: Any) -> bytes:
    """The body of an interaction."""
    at = instant(NOW - int(days_ago * DAY)).isoformat()
    return json.dumps(
        {"event_id": number, "viewer_id": viewer, "event_type": "like", "event_ts": at, **fields}
    ).encode()


def shop(number: str, user: str, days_ago: float, **fields: Any) -> bytes:
    """The body of a shop event."""
    at = instant(NOW - int(days_ago * DAY)).isoformat()
    body = {
        "event_id": number, "user_id": user, "item_id": "i1", "event_type": "purchase", "category": "books",
        "brand": "acme", "price": "12.50", "session_id": "s1", "event_time": at, **fields,
    }  # fmt: skip
    return json.dumps(body).encode()


# What names the viewer in a way of its own; the reason it is rejected for, None where it is valid.
ODD_VIEWER: list[tuple[str, bytes]] = [
    ("view_events", view("odd-text", f" {VIEWER}\t", 0)),
    ("view_events", view("odd-float", VIEWER, 0).replace(b"777000123", b"777000123.0")),
    ("view_events", view("odd-power", VIEWER, 0).replace(b"777000123", b"7.77000123e8")),
    ("view_events", view("odd-negative", VIEWER, 0, watch_duration_sec=-1)),
    ("view_events", view("odd-list", [VIEWER], 0)),
    ("view_events", view("odd-name", None, 0, viewerId=VIEWER)),
    ("view_events", view("odd-deep", None, 0, context={"viewer": {"id": str(VIEWER)}})),
    ("view_events", view("odd-prose", None, 0, note=f"seen by viewer {VIEWER}, twice")),
    ("view_events", view("odd-cut", VIEWER, 0)[:70]),
    ("view_events", b"viewer_id=777000123 watched\xff\xfe something"),
    ("view_events", b"777000123"),
    ("content_interactions", like("odd-kind", VIEWER, 0, event_type="dislike")),
    ("user.events", view("odd-topic", VIEWER, 0)),
]
ODD_USER: list[tuple[str, bytes]] = [
    ("user.events", shop("odd-blank", f"  {USER} ", 0)),
    ("user.events", shop("odd-slash", USER, 0).replace(b"/", b"\\/")),
    ("user.events", shop("odd-utf8", "X", 0).replace(b'"X"', '"Zoë/gone"'.encode())),
    ("user.events", shop("odd-price", USER, 0, price=-1)),
    ("user.events", shop("odd-cut", USER, 0)[:60]),
    ("user.events", "user_id: Zoë/gone".encode() + b"\xff"),
    ("user.events", json.dumps({"event_id": "odd-user", "user": {"id": USER}}).encode()),
    ("view_events", shop("odd-topic", USER, 0)),
]
# Rejected messages of others, or of nobody, which look alike and must stay.
ALIKE: list[tuple[str, bytes]] = [
    ("view_events", view("alike-longer", 7_770_001_230, 0, watch_duration_sec=-1)),
    ("view_events", view("alike-seconds", 7, 0, watch_duration_sec=f"{VIEWER} s")),
    ("view_events", view("alike-content", 7, 0, content_id=str(VIEWER), completion_pct=2)),
    ("view_events", view("alike-nested", 123, 0, other={"viewer_id": VIEWER})),
    ("view_events", b"alike viewer_id=7770001230 and viewer_id=1777000123"),
    ("view_events", b"alike 1777000123 7770001230"),
    ("items", json.dumps({"price": -1, "id": VIEWER, "note": "alike-item"}).encode()),
    ("user.events", shop("alike-user", "Zoë/gone2", 0, price=-1)),
    ("user.events", b"user_id=Zoe/gone"),
    ("user.events", json.dumps({"event_id": "alike-brand", "brand": USER}).encode()),
]


def stream() -> dict[str, list[tuple[Message, str]]]:
    """Every message with its owner: `viewer`, `user`, or nothing for those that stay."""
    owned: list[tuple[str, bytes, str]] = []
    for days in DAYS_AGO:
        for viewer in (VIEWER, *NEIGHBOURS, -5):
            owner = "viewer" if viewer == VIEWER else ""
            for turn, genre in enumerate(("drama", "comedy")):
                body = view(f"w-{viewer}-{days}-{turn}", viewer, days + 0.01, genre=genre)
                owned += [("view_events", body, owner)] * (2 if turn else 1)
            owned.append(("content_interactions", like(f"t-{viewer}-{days}", viewer, days + 0.01), owner))
        for user in (USER, *USERS, "canary:1"):
            owned.append(
                ("user.events", shop(f"s-{user}-{days}", user, days), "user" if user == USER else "")
            )
    # One id, two viewers: what counts for the second once the first is gone.
    owned += [
        ("view_events", view("shared", VIEWER, 0), "viewer"),
        ("view_events", view("shared", 123, 0, watch_duration_sec=500), ""),
        # The last of a day, and the first of tomorrow by a clock that runs ahead.
        ("view_events", view("alone", VIEWER, 20), "viewer"),
        ("view_events", view("ahead", VIEWER, -0.1), "viewer"),
        ("view_events", view("late", 7, -0.1), ""),
    ]
    owned += [(topic, body, "viewer") for topic, body in ODD_VIEWER]
    owned += [(topic, body, "user") for topic, body in ODD_USER]
    owned += [(topic, body, "") for topic, body in ALIKE]
    owned.append(("items", json.dumps({"item_id": "i1", "title": "One", "price": 3}).encode(), ""))
    made: dict[str, list[tuple[Message, str]]] = {}
    for place, (topic, body, owner) in enumerate(owned):
        message = Message(topic, "file:a#1", place % 2, place, body, None, NOW - 600 * SECOND + place)
        made.setdefault(topic, []).append((message, owner))
    return made


def _leaves(message: Message) -> bool:
    names = re.findall(
        r'"event_id": "[wt]-([0-9-]+?)-(40|39)(?:-[01])?"', message.data.decode("utf-8", "replace")
    )
    return any(day == "40" or int(viewer) not in (VIEWER, 123) for viewer, day in names)


OWNED = [pair for pairs in stream().values() for pair in pairs]
MESSAGES = [message for message, _ in OWNED]


def redacted(owned: Iterable[tuple[Message, str]], *gone: str) -> list[Message]:
    """The messages as they are once those of the owners in `gone` are redacted."""
    return [
        Message(m.topic, m.source, m.partition, m.offset, REDACTED if owner in gone else m.data,
                m.kafka_timestamp, m.arrived_at)
        for m, owner in owned
    ]  # fmt: skip


@dataclass
class World:
    """Every store of one test."""

    engine: EngineConfiguration
    connection: Any
    order: Sequence[str]
    client: Any
    table: Any
    warehouse: Path
    contract: Any = field(default_factory=lambda: load_contract(PROJECT))
    refreshes: int = 0

    @property
    def catalog(self) -> Any:
        return open_catalog("sqlite", self.warehouse.as_uri())

    def execute(self, statement: Any, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def refresh(self) -> None:
        self.refreshes += 1
        refresh(self.connection, self.order)

    def publish(self) -> None:
        for store in domain_stores(self.engine, self.client, self.contract, {"viewer": self.table}):
            publish_domain(store)

    def export(self) -> list[tuple[str, date, str]]:
        return [
            (spec.name, day, export_day(self.engine, self.catalog, spec, day).status)
            for spec in TILE_TABLES.values()
            for day in stale_days(self.engine, spec, exported_days(self.catalog, spec))
        ]

    def stores(self, **changes: Any) -> Stores:
        given: dict[str, Any] = {
            "engine": self.engine,
            "registry": REGISTRY,
            "catalog": lambda: self.catalog,
            "dynamodb": lambda: self.client,
            "table_prefix": "",
            "refresh": self.refresh,
        }
        return Stores(**{**given, **changes})

    def erase(
        self, kind: str = "viewer", name: str = str(VIEWER), at: int = ERASED_AT, **options: Any
    ) -> ErasureReport:
        return erase(self.stores(), Subject.named(REGISTRY, kind, name), now=instant(at), **options)

    def differences(self, messages: Sequence[Message], erased: Sequence[Erasure] = ()) -> dict[str, Any]:
        return differences(self.connection, Oracle(messages, NOW, erased=erased))

    def items(self) -> dict[tuple[int, str], dict[str, Any]]:
        pages = self.client.get_paginator("scan").paginate(TableName=self.table.name, ConsistentRead=True)
        return {
            (int(item["viewer_id"]["N"]), item["domain_key"]["S"]): item
            for page in pages
            for item in page["Items"]
        }

    def rows(self, spec: TileTable, snapshot_id: int | None = None) -> list[tuple[Any, ...]]:
        table = self.catalog.load_table(spec.identifier("training"))
        found = table.scan(snapshot_id=snapshot_id).to_arrow().to_pylist()
        return sorted(tuple(row[column.name] for column in spec.columns) for row in found)

    def all_rows(self) -> dict[str, list[tuple[Any, ...]]]:
        return {name: self.rows(spec) for name, spec in TILE_TABLES.items()}

    def leave_the_engine(self) -> list[tuple[Message, str]]:
        """The oldest day leaves the engine, and of the next one all but two viewers; returns what remains."""
        left = [pair for pair in OWNED if not _leaves(pair[0])]
        for message, _ in set(OWNED) - set(left):
            self.execute(
                sql.SQL("delete from {} where source_offset = %s").format(
                    sql.Identifier(RAW_TABLES[message.topic])
                ),
                [message.offset],
            )
        self.refresh()
        return left

    def traces(self, *needles: str) -> list[str]:
        """Every place that still shows one of the texts, read without any of the product's code."""
        found = []
        relations = self.execute(
            "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = 'public' and c.relkind in ('r', 'm', 'v')"
        )
        assert len(relations) > 30
        for (name,) in relations:
            if name in ("erased_subjects", "deployments"):
                continue
            table = sql.Identifier(name)
            if name in RAW_TABLES.values():
                rows = self.execute(sql.SQL("select data from {}").format(table))
                texts = [bytes(data).decode("utf-8", "replace").replace("\\/", "/") for (data,) in rows]
            else:
                rows = self.execute(sql.SQL("select r::text from {} as r").format(table))
                texts = [text for (text,) in rows]
            found += [
                f"{name}: {text}"
                for text in texts
                if "alike" not in text
                and any(re.search(rf"(?<!\d){needle}(?!\w)", text) for needle in needles)
            ]
        found += [f"DynamoDB: {key}" for key in self.items() if str(key[0]) in needles]
        files = sorted(self.warehouse.rglob("*.parquet"))
        for path in files:
            viewers = {str(row) for row in pq.read_table(path, columns=["viewer_id"])[0].to_pylist()}
            found += [f"{path}: {needle}" for needle in needles if needle in viewers]
        for spec in TILE_TABLES.values():
            table = self.catalog.load_table(spec.identifier("training"))
            for snapshot in table.snapshots():
                rows = table.scan(snapshot_id=snapshot.snapshot_id).to_arrow()["viewer_id"].to_pylist()
                found += [
                    f"{spec.name}@{snapshot.snapshot_id}: {needle}"
                    for needle in needles
                    if needle in map(str, rows)
                ]
        return found


def without(rows: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[tuple[Any, ...]]]:
    return {name: [row for row in found if row[0] != VIEWER] for name, found in rows.items()}


def expected_rows(world: World, before: dict[str, list[tuple[Any, ...]]], oracle: Oracle) -> None:
    """Days that left the engine as they were, today as the oracle has it, nowhere the viewer.

    A column that somebody adds to a tile is none of the oracle's, and is compared on the days that left alone.
    """
    relations = oracle.relations()
    for name, spec in TILE_TABLES.items():
        names = [column.name for column in spec.columns]
        tiles = [row for row in relations[spec.tile] if row[spec.day] == TODAY and row["viewer_id"] >= 0]
        assert tiles
        known = [column for column in names if column in tiles[0]]
        expected = [
            tuple(instant(row[one]) if one == "last_event_at" else row[one] for one in known) for row in tiles
        ]
        day = names.index(spec.day)
        found = world.rows(spec)
        assert [row for row in found if row[day] != TODAY] == sorted(
            row for row in without(before)[name] if row[day] != TODAY
        )
        today = [tuple(row[names.index(one)] for one in known) for row in found if row[day] == TODAY]
        assert sorted(today) == sorted(expected)
