"""Training sets from the served log: what was really seen, against plain Python over the same rows."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from foreign import REGISTRY as COURSES
from pyiceberg.catalog import Catalog
from shipped import REGISTRY

from dagster_prefs.cli import cli
from dagster_prefs.declarations.contract import LAST_EVENT_AT, Domain
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.served_rows import BadRow, LogUnreadable, ServedRow
from dagster_prefs.training.labels import LabelsRefused
from dagster_prefs.training.logged import LogChanged, LoggedFeatures, LogSource, choose_logged
from dagster_prefs.training.training_set import (
    LabelJoin,
    TrainingSet,
    build_training_set,
    print_training_sql,
    reproduce_training_set,
)

NOON = datetime(2026, 3, 15, 12, tzinfo=UTC)
NOW = NOON + timedelta(days=1)
SECOND = timedelta(seconds=1)
WITHIN = 60 * SECOND


@dataclass(frozen=True)
class Label:
    """A label of an id, with the id of a request or without."""

    id: Any
    at: datetime
    request: str | None = None


class World:
    """A project's entity, rows of its log, and what labels have of them in plain Python."""

    def __init__(self, registry: Registry, entity: str, ids: Sequence[Any], seed: int = 1) -> None:
        self.registry = registry
        self.features = choose_logged(registry, entity)
        self.key = registry.entity(entity).key.name
        self.random = Random(seed)
        self.domains = [one for one in registry.contract.domains.values() if one.entity == entity]
        self.ids = ids
        self.rows: list[ServedRow] = []

    def read(self, id_: Any, at: datetime, domain: Domain | None = None, **given: Any) -> ServedRow:
        domain = domain or self.random.choice(self.domains)
        row = ServedRow(
            row_id=f"log-{len(self.rows):05}", served_at=at, read_seconds=0.001, entity=domain.entity, key=str(id_),
            domain=domain.key, contract_version=self.registry.contract.version, state="found", error=None,
            attributes={
                name: self.value(one.type, one.nullable)
                for name, one in domain.attributes.items() if name != LAST_EVENT_AT
            },
            last_event_at=5, unknown=(), partial=False, consistent=False, request_id=None, variant=None,
        )  # fmt: skip
        self.rows.append(replace(row, **given))
        return self.rows[-1]

    def value(self, kind: str, nullable: bool) -> Any:
        random = self.random
        if kind.startswith("list<"):
            return [self.value(kind[5:-1], True) for _ in range(random.randrange(4))]
        if nullable and random.random() < 0.2:
            return None
        if kind == "integer":
            return random.randrange(-5, 1000)
        return Decimal(random.randrange(10**12)).scaleb(-10) if kind == "decimal" else f"é{random.random()}"

    def write(self, folder: Path, rows: Sequence[ServedRow] | None = None) -> LogSource:
        """The rows in files of every kind, not in the order of time."""
        folder.mkdir(exist_ok=True)
        lines = [row.as_json() + b"\n" for row in (self.rows if rows is None else rows)]
        third = -(-len(lines) // 3)
        (folder / "served-1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[2 * third :])))
        (folder / "served-2.jsonl").write_bytes(b"".join(lines[:third]))
        (folder / "served-3.jsonl.open").write_bytes(b"".join(lines[third : 2 * third]) + lines[0][:30])
        return LogSource((folder,), WITHIN)

    def due(self, label: Label) -> tuple[dict[str, Any] | None, str]:
        """The values of a label, or None with the reason."""
        if label.request is None and label.at > max(row.served_at for row in self.rows):
            return None, "the log ends"
        values = {}
        for domain in self.domains:
            row, missing = self.chosen(label, domain)
            if row is None:
                return None, missing
            if row.attributes is None:
                return None, f"the read of {domain.name} failed"
            for name in domain.attributes:
                if name == LAST_EVENT_AT:
                    continue
                if name not in row.attributes:
                    return None, f"which has no {name}"
                values[name] = self.rounded(name, row.attributes[name])
        return values, ""

    def chosen(self, label: Label, domain: Domain) -> tuple[ServedRow | None, str]:
        """The read of a domain that a label has, or why there is none."""
        mine = [
            row
            for row in self.rows
            if (row.entity, row.key, row.domain) == (domain.entity, str(label.id), domain.key)
        ]
        if label.request is None:
            found = [row for row in mine if label.at - WITHIN <= row.served_at <= label.at]
            best = max(found, key=lambda row: (row.served_at, row.row_id), default=None)
            return best, f"no read of {domain.name} in the"
        found = [row for row in mine if row.request_id == label.request]
        before = [row for row in found if row.served_at <= label.at]
        best = max(before, key=lambda row: (row.served_at, row.row_id), default=None)
        if best is None and found:
            first = min(row.served_at for row in found)
            best = max((row for row in found if row.served_at == first), key=lambda row: row.row_id)
        return best, f"no read of {domain.name} with the label's request_id"

    def rounded(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self.rounded(name, one) for one in value]
        if not isinstance(value, Decimal):
            return value
        (kind,) = (one.type for one in self.features.values if one.name == name)
        places = int(kind.split(",")[1].split(")")[0])
        return value.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)

    def labels(self, folder: Path, labels: Sequence[Label], *, requests: bool = True) -> str:
        texts = isinstance(labels[0].id, str)
        columns = {
            "label": pa.array(range(len(labels)), pa.int64()),
            self.key: pa.array([one.id for one in labels], pa.string() if texts else pa.int64()),
            "label_time": pa.array([one.at for one in labels], pa.timestamp("us", tz="UTC")),
        }
        if requests:
            columns["request_id"] = pa.array([one.request for one in labels], pa.string())
        path = folder / "labels.parquet"
        pq.write_table(pa.table(columns), path)
        return str(path)

    def join(self, labels: str, log: LogSource, **given: Any) -> LabelJoin:
        features = given.pop("features", self.features)
        return LabelJoin(labels, features, NOW, meaning="logged", log=log, **given)


def values(made: TrainingSet, features: LoggedFeatures) -> dict[int, dict[str, Any]]:
    names = [one.name for one in features.values]
    return {
        row["label"]: {name: row[name] for name in names} for row in pq.read_table(made.output).to_pylist()
    }


def busy(registry: Registry, entity: str, ids: Sequence[Any], seed: int) -> tuple[World, list[Label]]:
    """Reads of every kind, and labels around them."""
    world = World(registry, entity, ids, seed)
    random = world.random
    # Few instants, so that some reads are of the same one.
    moments = [NOON + number * SECOND for number in range(0, 300, 4)]
    for _ in range(500):
        at, id_ = random.choice(moments), random.choice(ids)
        request = f"req-{random.randrange(60)}" if random.random() < 0.5 else None
        row = world.read(id_, at, request_id=request)
        kind = random.random()
        assert row.attributes is not None
        if kind < 0.03:
            row = replace(row, state="failed", error="timeout", attributes=None)
        elif kind < 0.06:
            gone = random.choice(list(row.attributes))
            kept = {name: value for name, value in row.attributes.items() if name != gone}
            row = replace(row, contract_version=0, attributes=kept)
        world.rows[-1] = row
        if random.random() < 0.05:
            world.rows.append(row)
    # Of another entity, and of a domain that is gone.
    world.rows.append(replace(world.rows[0], row_id="other", entity="other"))
    world.rows.append(replace(world.rows[0], row_id="gone", domain="gone#gone"))
    labels = [
        Label(random.choice(ids), NOON + random.randrange(-60, 320) * SECOND,
              f" req-{random.randrange(60)}".strip() if random.random() < 0.4 else None)
        for _ in range(400)
    ]  # fmt: skip
    return world, labels


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("registry", "entity", "ids"),
    [(REGISTRY, "viewer", [1, 2, 3]), (COURSES, "learner", ["ann", "bo"])],
    ids=["viewer", "learner"],
)
def test_every_label_has_what_was_seen_or_a_reason(
    catalog: Catalog, tmp_path: Path, registry: Registry, entity: str, ids: Sequence[Any], seed: int
) -> None:
    world, labels = busy(registry, entity, ids, seed)
    path = world.labels(tmp_path, labels)
    log = world.write(tmp_path / "log")
    made = build_training_set(catalog, world.join(path, log, drop_refused=True), tmp_path / "set.parquet")
    due = [world.due(label) for label in labels]
    expected = {number: found for number, (found, _) in enumerate(due) if found is not None}
    found = values(made, world.features)
    assert found == expected
    assert 20 < len(expected) < len(labels)
    # The reasons, by what the plain ones say.
    reasons = Counter(reason for _, reason in due if reason)
    told: Counter[str] = Counter()
    for reason, number in made.refused.items():
        (plain,) = [one for one in reasons if one in reason]
        told[plain] += number
    assert told == reasons
    known = json.loads(made.manifest.read_text())
    assert (known["meaning"], known["labels"]["rows"], known["output"]["rows"]) == ("logged", 400, len(found))
    assert known["labels"]["refused"] == dict(made.refused)
    assert [file["name"] for file in known["log"]["places"][0]["files"]] == [
        "served-1.jsonl", "served-2.jsonl", "served-3.jsonl",
    ]  # fmt: skip


@pytest.fixture
def world() -> World:
    """Two reads of all domains: of a request, and then one without."""
    made = World(REGISTRY, "viewer", [1])
    for domain in made.domains:
        made.read(1, NOON, domain, request_id="a")
    for domain in made.domains:
        made.read(1, NOON + 10 * SECOND, domain)
    return made


def test_the_same_rows_again_after_the_log_has_grown_and_moved(
    catalog: Catalog, tmp_path: Path, world: World
) -> None:
    labels = [Label(1, NOON + 5 * SECOND), Label(1, NOON + 5 * SECOND, "a"), Label(1, NOON + 10 * SECOND)]
    path, folder = world.labels(tmp_path, labels), tmp_path / "log"
    log = world.write(folder)
    made = build_training_set(catalog, world.join(path, log), tmp_path / "set.parquet")
    assert made.refused == {}
    assert values(made, world.features) == {number: world.due(one)[0] for number, one in enumerate(labels)}
    # The growing file gets more lines and its final name; another file begins; a finished one is compressed.
    newer = [world.read(1, NOON + 4 * SECOND, domain) for domain in world.domains]
    growing = folder / "served-3.jsonl.open"
    complete = growing.read_bytes().rpartition(b"\n")[0] + b"\n"
    growing.write_bytes(complete + b"".join(row.as_json() + b"\n" for row in newer))
    growing.rename(folder / "served-3.jsonl")
    (folder / "served-4.jsonl").write_bytes(newer[0].as_json() + b"\n")
    plain = folder / "served-2.jsonl"
    (folder / "served-2.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(LogChanged, match=r"no longer has served-1\.jsonl.*name the place"):
        reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    with pytest.raises(LogChanged, match=r"was made of 1 places of the log .*, and 2 are given"):
        reproduce_training_set(
            catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY, log=[moved, moved]
        )
    again = reproduce_training_set(
        catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY, log=[moved]
    )
    assert again.content_hash == made.content_hash
    now = build_training_set(catalog, world.join(path, LogSource((moved,), WITHIN)), tmp_path / "now.parquet")
    assert now.content_hash != made.content_hash
    # An erasure writes a file again without somebody's lines.
    (moved / "served-2.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(LogChanged, match=r"served-2\.jsonl\.gz has other lines than when"):
        reproduce_training_set(
            catalog, made.manifest, tmp_path / "gone.parquet", registry=REGISTRY, log=[moved]
        )
    assert not (tmp_path / "gone.parquet").exists()


def test_labels_without_a_read_are_refused_with_their_number(
    catalog: Catalog, tmp_path: Path, world: World
) -> None:
    log = world.write(tmp_path / "log")

    def refused(*labels: Label, **given: Any) -> str:
        join = world.join(world.labels(tmp_path, labels), log, **given)
        with pytest.raises(LabelsRefused) as error:
            build_training_set(catalog, join, tmp_path / "set.parquet")
        assert not (tmp_path / "set.parquet").exists()
        return str(error.value)

    good = Label(1, NOON + 5 * SECOND)
    told = refused(good, Label(2, NOON), Label(1, NOON - SECOND))
    assert "2 of 3 labels cannot have a value from the served log, the first in row 2" in told
    assert f"no read of {world.domains[0].name} in the 0:01:00 before the label" in told
    assert "--drop-refused" in told
    assert "the log ends at 2026-03-15T12:00:10+00:00" in refused(good, Label(1, NOON + 11 * SECOND))
    assert "with the label's request_id" in refused(good, Label(1, NOON, "b"))
    assert "none of the 2 labels can have a value as logged (2: " in refused(
        Label(2, NOON), Label(3, NOON), drop_refused=True
    )
    with pytest.raises(LabelsRefused, match="--as-known adds nothing to --from-log"):
        world.join("labels.csv", log, as_known=True)
    with pytest.raises(LabelsRefused, match="need a log"):
        LabelJoin("labels.csv", world.features, NOW, meaning="logged")
    join = world.join(world.labels(tmp_path, [good]), log)
    with pytest.raises(LabelsRefused, match="--tag keeps snapshots of tables"):
        build_training_set(catalog, join, tmp_path / "set.parquet", tag="model-7")
    with pytest.raises(
        LabelsRefused, match="--from-log reads the files of the served log, which spark cannot"
    ):
        print_training_sql(catalog, "ml.labels", "spark", features=world.features)


def test_domains_that_a_service_does_not_read_are_left_out(
    catalog: Catalog, tmp_path: Path, world: World
) -> None:
    first = world.domains[0]
    log = world.write(tmp_path / "log", [row for row in world.rows if row.domain == first.key])
    labels = world.labels(tmp_path, [Label(1, NOON + 5 * SECOND)], requests=False)
    with pytest.raises(LabelsRefused, match=f"no read of {world.domains[1].name}.*the domain with --domain"):
        build_training_set(catalog, world.join(labels, log), tmp_path / "set.parquet")
    only = choose_logged(REGISTRY, "viewer", [first.name])
    made = build_training_set(catalog, world.join(labels, log, features=only), tmp_path / "set.parquet")
    assert {one.name for one in only.values} == {*first.attributes} - {LAST_EVENT_AT}
    assert list(values(made, only)) == [0]
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert again.content_hash == made.content_hash


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"key": "x"}, "its key is none of viewer"),
        ({"attributes": {}, "domain": "engagement#watch"}, "has no watch_minutes"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    catalog: Catalog, tmp_path: Path, world: World, changed: Mapping[str, Any], told: str
) -> None:
    world.rows += [replace(world.rows[0], row_id="odd", served_at=NOON + 2 * SECOND, **changed)]
    labels = world.labels(tmp_path, [Label(1, NOON + 3 * SECOND)])
    with pytest.raises((BadRow, LabelsRefused), match=told):
        build_training_set(
            catalog, world.join(labels, world.write(tmp_path / "log")), tmp_path / "set.parquet"
        )


def test_digits_beyond_the_type_and_odd_request_ids_are_refused(
    catalog: Catalog, tmp_path: Path, world: World
) -> None:
    decimal = next(
        one for one in world.features.values if one.type.startswith("decimal") and "[" not in one.type
    )
    place = next(number for number, row in enumerate(world.rows) if decimal.name in (row.attributes or {}))
    row = world.rows[place]
    world.rows[place] = replace(row, attributes={**(row.attributes or {}), decimal.name: Decimal(10) ** 27})
    labels = world.labels(tmp_path, [Label(1, NOON + 5 * SECOND)])
    log = world.write(tmp_path / "log")
    with pytest.raises(BadRow, match=f"{decimal.name} has more digits than a training set can hold"):
        build_training_set(catalog, world.join(labels, log), tmp_path / "set.parquet")
    table = pq.read_table(labels)
    pq.write_table(table.set_column(3, "request_id", pa.array([1.5])), labels)
    with pytest.raises(LabelsRefused, match="column request_id is DOUBLE"):
        build_training_set(catalog, world.join(labels, log), tmp_path / "set.parquet")
    (tmp_path / "none").mkdir()
    join = world.join(world.labels(tmp_path, [Label(1, NOON)]), LogSource((tmp_path / "none",)))
    with pytest.raises(LogUnreadable, match="has no file of the served log"):
        build_training_set(catalog, join, tmp_path / "set.parquet")


def test_the_command_reads_the_folder_of_the_setting(
    warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    world.write(tmp_path / "log")
    labels = world.labels(tmp_path, [Label(1, NOON + 5 * SECOND), Label(2, NOON)])
    monkeypatch.setenv("PREFS_ICEBERG_WAREHOUSE", warehouse.as_uri())
    given = ["training-set", "--labels", labels, "--from-log", "--entity", "viewer"]

    def run(*more: str) -> Any:
        return CliRunner().invoke(cli, [*given, *more], standalone_mode=False)

    assert "PREFS_SERVED_LOG is not files:<folder>" in str(run().exception)
    monkeypatch.setenv("PREFS_SERVED_LOG", f"files:{tmp_path / 'log'}")
    assert "1 of 2 labels cannot have a value from the served log" in str(run().exception)
    made = run("--drop-refused", "--within-seconds", "60")
    assert made.exception is None
    assert "1 rows (0 without history)" in made.output
    told = f"the log has no read of {world.domains[0].name} in the 0:01:00 before the label"
    assert f"1 labels are left out: {told}" in made.output
    manifest = f"{Path(labels).with_suffix('.training.parquet')}.manifest.json"
    again = CliRunner().invoke(cli, ["training-set", "reproduce", manifest], standalone_mode=False)
    assert again.exception is None
    assert "omit --as served" in str(run("--as", "served").exception)
    plain = ["training-set", "--labels", labels, "--log", str(tmp_path)]
    assert "--log names the log of --from-log" in str(
        CliRunner().invoke(cli, plain, standalone_mode=False).exception
    )
