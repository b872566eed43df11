"""Point-in-time correct training sets: labels joined with features as they were known at the label's time.

A training value has one of four meanings. As `yesterday`, a label sees the days before its own (UTC), never its own
day or a later one; with `as_known`, it also sees each day in the version that the table held at the label's time, so
that a late event or a correction that arrived afterwards changes nothing. As `served`, it has what a read at its time
would have returned. As `happened`, it has the same from all events that had happened by then, whenever they arrived. As
`logged`, it has what the served log says that a read returned.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import duckdb
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import DataFile, ManifestContent
from pyiceberg.table import Table
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.types import TimestamptzType

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.spreads import Spreads
from dagster_prefs.files import whole_file
from dagster_prefs.iceberg.catalog import OfflineError, translated
from dagster_prefs.iceberg.duck import JOINING, duck_session
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE
from dagster_prefs.iceberg.files import LiveFile, day_of, live_files, read_rows
from dagster_prefs.iceberg.publish import ATTEMPTS
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.training.labels import POINT, TIME, LabelsRefused, check_columns, is_csv, read_labels
from dagster_prefs.training.lake import (
    Pins,
    SnapshotExpired,
    current_tiles,
    lake_inputs,
    pin_served,
    pinned_snapshot,
)
from dagster_prefs.training.logged import (
    LoggedFeatures,
    LogSource,
    choose_logged,
    create_logged,
    days_of_reads,
)
from dagster_prefs.training.outputs import OutputRefused, check_output, write_output
from dagster_prefs.training.served import create_served, days_of_points, refuse_points
from dagster_prefs.training.served_sql import ServedFeatures, ServedMeaning, ServedOptions, choose_served
from dagster_prefs.training.windows import Dialect, Features, choose_features, load_tiles

AnyFeatures = Features | ServedFeatures | LoggedFeatures
# What a training value promises; docs/training.md compares them.
Meaning = Literal["yesterday", "served", "happened", "logged"]
MEANINGS: tuple[Meaning, ...] = get_args(Meaning)

MANIFEST_VERSION = 1
FOREVER = 2**62


class TagTaken(OfflineError):
    """The tag for a training set's tile snapshots already marks other snapshots."""


class NotReproducible(OfflineError):
    """Labels, tiles or code differ from the manifest."""


@dataclass(frozen=True)
class TrainingSet:
    """The result: `rows` labels with their features in `output`, and the `manifest` to reproduce them.

    `refused` maps reasons to the number of labels that were left out for them.
    """

    output: str
    manifest: Path
    rows: int
    cold_start_rows: int
    content_hash: str
    snapshots: Mapping[str, int | None]
    seconds: float
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CsvOptions:
    """How CSV is read and written.

    `types` gives the type of each column of the labels that is not text (one of `labels.TYPES`); `keep_formulas` writes
    texts that a spreadsheet would compute without an apostrophe.
    """

    types: Mapping[str, str] = field(default_factory=dict)
    keep_formulas: bool = False


@dataclass(frozen=True)
class _Version:
    """A data file, with its deletes, and the time in which it was current: milliseconds since 1970, end excluded."""

    file: LiveFile
    known_from: int
    known_to: int


@dataclass(frozen=True)
class LabelJoin:
    """The inputs of a training set other than the tiles: the labels, and how features join them.

    `features` are those of one entity; `labels` is a Parquet or CSV file or an Iceberg table with the entity's key,
    `label_time` and any other columns (see `read_labels`), and `timezone` is the zone of times without one. `csv` gives
    the types of CSV cells that are not text. With `as_known` a label sees each day as the table in `namespace` held it
    at the label's time. `now` is the latest time that a label may have. `meaning` is what a value promises: `features`
    are Features for `yesterday`, LoggedFeatures for `logged`, and else ServedFeatures. `spreads` are the expiry spreads
    that were in force, which only `served` and `happened` need, and `log` is that of `logged`. With `drop_refused` the
    labels that cannot have a value of the meaning are left out, instead of refusing all.

    Raises LabelsRefused for `as_known` with another meaning than `yesterday`, and `logged` without a log.
    """

    labels: str
    features: AnyFeatures
    now: datetime
    timezone: str | None = None
    as_known: bool = False
    namespace: str = DEFAULT_NAMESPACE
    csv: CsvOptions = CsvOptions()
    meaning: Meaning = "yesterday"
    spreads: Spreads = field(default_factory=dict)
    log: LogSource | None = None
    drop_refused: bool = False

    def __post_init__(self) -> None:
        check_meaning(self.meaning, as_known=self.as_known)
        if isinstance(self.features, LoggedFeatures) and self.log is None:
            raise LabelsRefused("values from the served log need a log: name its folder")


def check_meaning(meaning: Meaning, *, as_known: bool) -> None:
    """Raise LabelsRefused for `as_known` with a meaning to which it would add nothing or that it contradicts."""
    if as_known and meaning == "served":
        raise LabelsRefused(
            "--as-known adds nothing to --as served, whose values are made of what had arrived by each label's time: "
            "omit it"
        )
    if as_known and meaning == "happened":
        raise LabelsRefused(
            "--as-known contradicts --as happened, which counts every event from its own time, whenever it arrived: "
            "omit it, or use --as served for what was known at each label's time"
        )
    if as_known and meaning == "logged":
        raise LabelsRefused(
            "--as-known adds nothing to --from-log, whose values are those that were seen at the time: omit it"
        )


def features_as(
    registry: Registry, entity: str | None, meaning: Meaning, domains: Sequence[str] | None = None
) -> AnyFeatures:
    """Return the features of an entity, or of the only one with a domain, that training values of a meaning have.

    `domains` (names) limits them to these. Raises LabelsRefused for `domains` with the meaning `yesterday`,
    OfflineError like `choose_features`, and ViewNotPortable.
    """
    if meaning == "logged":
        return choose_logged(registry, entity, domains)
    if meaning != "yesterday":
        return choose_served(registry, entity, domains)
    if domains:
        raise LabelsRefused(
            "--domain needs --as served, --as happened or --from-log: training sets as of yesterday have all domains"
        )
    return choose_features(registry, entity)


def build_training_set(
    catalog: Catalog,
    join: LabelJoin,
    output: Path | str,
    *,
    manifest: Path | None = None,
    tag: str | None = None,
) -> TrainingSet:
    """Write every label to `output`, in order, duplicates included, with every feature.

    `output` is a `.parquet` or `.csv` file or an Iceberg table `namespace.table`. `manifest` (`<output>.manifest.json`
    by default) receives tile snapshots, versions of contract and code, and fingerprints, from which
    `reproduce_training_set` gets the same rows. `tag` is set on the tile snapshots, which maintenance then keeps. The
    join spills to disk beyond a gigabyte. A subject without history gets cold-start values: zero counts, empty lists,
    NULL rates.

    Raises LabelsRefused, OutputRefused, TagTaken, TableMissing, SnapshotExpired (`as_known` before the kept history),
    or another OfflineError; an existing output is only replaced at the end.
    """
    features, namespace = join.features, join.namespace
    manifest = manifest or Path(f"{output}.manifest.json")
    check_output(catalog, str(output))
    if not manifest.absolute().parent.is_dir():
        raise OutputRefused(f"the folder {manifest.parent} of the manifest does not exist: create it")
    pins = _pin(catalog, join, tag)
    with translated(f"the manifest {manifest}"), ExitStack() as written:

        def describe(made: _Made) -> None:
            content = {
                "manifest_version": MANIFEST_VERSION,
                "created_at": join.now.astimezone(UTC).isoformat(),
                "code_version": importlib.metadata.version("dagster-prefs"),
                "contract_version": features.contract_version,
                "definition": _definition(features),
                "entity": features.entity.name,
                "labels": {
                    "source": join.labels,
                    "rows": made.labels,
                    "fingerprint": made.labels_hash,
                    "timezone": join.timezone,
                    "types": dict(join.csv.types),
                    "drop_refused": join.drop_refused,
                    "refused": dict(made.refused),
                },
                "meaning": join.meaning,
                "as_known": join.as_known,
                "namespace": namespace,
                "snapshots": dict(pins.snapshots),
                **_served_content(join, pins),
                **({} if made.log is None else {"log": made.log.as_dict()}),
                "days": {"first": made.first_day.isoformat(), "last": made.last_day.isoformat()},
                "output": {
                    "path": str(output),
                    "rows": made.rows,
                    "cold_start_rows": made.cold_start_rows,
                    "fingerprint": made.content_hash,
                    "features": [asdict(feature) for feature in features.values],
                    "left_out": features.left_out,
                    "domains": list(features.domains),
                },
            }
            partial = written.enter_context(whole_file(manifest))
            partial.write(json.dumps(content, indent=2).encode() + b"\n")
            # Done before the output is replaced, so that a full disk leaves it unchanged.
            partial.flush()

        made = _build(catalog, join, str(output), pins, describe=describe)
    return TrainingSet(
        str(output),
        manifest,
        made.rows,
        made.cold_start_rows,
        made.content_hash,
        pins.snapshots,
        made.seconds,
        made.refused,
    )


def _pin(catalog: Catalog, join: LabelJoin, tag: str | None) -> Pins:
    """Return the state of the tables that a training set is made from, tagged if there is a tag."""
    if isinstance(join.features, LoggedFeatures):
        if tag:
            raise LabelsRefused(
                "--tag keeps snapshots of tables, and values from the served log are in none: keep the files of the "
                "log that the manifest names"
            )
        return Pins({})
    if isinstance(join.features, ServedFeatures):
        tables, pins = pin_served(catalog, join.features, namespace=join.namespace)
    else:
        tables = {}
        for spec, _ in join.features.sources:
            with translated(f"the table {join.namespace}.{spec.name}"):
                tables[spec.name] = catalog.load_table(spec.identifier(join.namespace))
        pins = Pins(
            {
                name: current.snapshot_id if (current := table.current_snapshot()) else None
                for name, table in tables.items()
            }
        )
    for name, snapshot_id in pins.snapshots.items():
        if tag and snapshot_id is not None:
            with translated(f"the table {join.namespace}.{name}"):
                _set_tag(tables[name], tag, snapshot_id)
    return pins


def _served_content(join: LabelJoin, pins: Pins) -> dict[str, Any]:
    """Return what a manifest says of values as served beyond the snapshots."""
    if join.meaning not in ("served", "happened"):
        return {}
    return {
        "watermarks": {topic: until.isoformat() for topic, until in pins.watermarks.items()},
        "complete_from": {topic: start.isoformat() for topic, start in pins.complete_from.items()},
        "spreads": {
            domain: [[since.isoformat(), seconds] for since, seconds in found]
            for domain, found in join.spreads.items()
        },
    }


def reproduce_training_set(
    catalog: Catalog,
    manifest: Path,
    output: Path | str,
    *,
    registry: Registry,
    labels: str | None = None,
    log: Sequence[Path] = (),
    keep_formulas: bool = False,
) -> TrainingSet:
    """Write the training set of a manifest again to `output`, after proving that every row is equal.

    `labels` and `log` are the new places of the labels and of the served log, if they moved; `keep_formulas` is that of
    `CsvOptions`. Raises SnapshotExpired if a tile snapshot is gone, LogChanged if lines of the log are, NotReproducible
    if labels, definition or result differ from the manifest.
    """
    try:
        known = json.loads(manifest.read_text())
        version = known["manifest_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotReproducible(
            f"{manifest} is not the manifest of a training set ({error}): name another file"
        ) from error
    if version != MANIFEST_VERSION:
        raise NotReproducible(
            f"{manifest} has version {version}, this code reads {MANIFEST_VERSION}: upgrade it"
        )
    # A manifest of an earlier version has no meaning: it knew one only.
    meaning: Meaning = known.get("meaning", "yesterday")
    features = features_as(
        registry,
        known.get("entity"),
        meaning,
        # A manifest of an earlier version names no domains: it had all.
        None if meaning == "yesterday" else known["output"].get("domains"),
    )
    if known["definition"] != _definition(features):
        raise NotReproducible(
            f"{manifest} was made by code {known['code_version']} with another definition of the features: "
            "install that version"
        )
    check_output(catalog, str(output))
    source = labels or known["labels"]["source"]
    if is_csv(source) and "types" not in known["labels"]:
        raise NotReproducible(
            f"{manifest} was made by code {known['code_version']}, which guessed what the cells of {source} are: "
            "install that version, or make the training set again and give the types"
        )
    join = LabelJoin(
        source,
        features,
        now=datetime.fromisoformat(known["created_at"]),
        timezone=known["labels"]["timezone"],
        as_known=known["as_known"],
        namespace=known["namespace"],
        csv=CsvOptions(known["labels"].get("types", {}), keep_formulas),
        meaning=meaning,
        spreads={
            domain: tuple((datetime.fromisoformat(since), seconds) for since, seconds in found)
            for domain, found in known.get("spreads", {}).items()
        },
        log=LogSource.from_dict(known["log"], log) if "log" in known else None,
        drop_refused=known["labels"].get("drop_refused", False),
    )
    pins = Pins(
        known["snapshots"],
        {topic: datetime.fromisoformat(until) for topic, until in known.get("watermarks", {}).items()},
        {topic: datetime.fromisoformat(start) for topic, start in known.get("complete_from", {}).items()},
    )
    expect = known["labels"]["fingerprint"], known["output"]["fingerprint"]
    made = _build(catalog, join, str(output), pins, expect=expect)
    return TrainingSet(
        str(output),
        manifest,
        made.rows,
        made.cold_start_rows,
        made.content_hash,
        known["snapshots"],
        made.seconds,
        made.refused,
    )


def print_training_sql(
    catalog: Catalog,
    labels: str,
    dialect: Dialect,
    *,
    features: AnyFeatures,
    as_known: bool = False,
    namespace: str = DEFAULT_NAMESPACE,
    served: ServedOptions | None = None,
) -> str:
    """Return the same join in the SQL of a distributed engine over the same tables, for labels beyond one machine.

    `labels` must be an Iceberg table (`namespace.table`) with the entity's key and `label_time`, a timestamp with a
    zone. `served` says how ServedFeatures are to be computed; the query does not refuse labels that cannot be answered.
    Raises LabelsRefused for LoggedFeatures, if `labels` is no such table, or if a column is named like a feature;
    TableMissing if it does not exist; ViewNotPortable for an expiry spread that other engines cannot compute.
    """
    if isinstance(features, LoggedFeatures):
        raise LabelsRefused(
            f"--from-log reads the files of the served log, which {dialect} cannot: build the training set here"
        )
    if as_known:
        raise LabelsRefused(
            f"--as-known needs the history of the tables, which {dialect} cannot read: omit it, or build the "
            "training set here"
        )
    if Path(labels).suffix.lower() in (".parquet", ".csv") or labels.count(".") != 1:
        raise LabelsRefused(
            f"{labels} is no Iceberg table, and {dialect} cannot read files of this machine: load the "
            "labels into a table (namespace.table) first"
        )
    with translated(f"the table {labels}"):
        fields = {field.name: field.field_type for field in catalog.load_table(labels).schema().fields}
    check_columns(labels, list(fields), features)
    if not isinstance(fields[TIME], TimestamptzType):
        raise LabelsRefused(
            f"{labels}.{TIME} is {fields[TIME]}: {dialect} needs a timestamp with a zone; write the table again"
        )
    if isinstance(features, ServedFeatures):
        options = served or ServedOptions()
        return features.training_sql(dialect, labels, list(fields), namespace=namespace, options=options)
    return features.training_sql(dialect, labels, list(fields), namespace=namespace)


@dataclass(frozen=True)
class _Made:
    labels: int
    rows: int
    cold_start_rows: int
    labels_hash: str
    content_hash: str
    first_day: date
    last_day: date
    refused: Mapping[str, int] = field(default_factory=dict)
    log: LogSource | None = None
    seconds: float = 0.0


def _build(
    catalog: Catalog,
    join: LabelJoin,
    output: str,
    pins: Pins,
    *,
    expect: tuple[str, str] | None = None,
    describe: Callable[[_Made], None] | None = None,
) -> _Made:
    started = time.monotonic()
    features = join.features
    table = read_labels(
        catalog, join.labels, features=features, now=join.now, timezone=join.timezone, types=join.csv.types
    )
    with translated(f"the training set {output}"), duck_session(*JOINING) as session:
        _load_labels(session, table)
        labels_hash = _fingerprint(session, "labels")
        if expect and labels_hash != expect[0]:
            raise NotReproducible(
                f"{join.labels} no longer contains the labels of the manifest: name the original"
            )
        first, last, read = _create_values(session, catalog, join, pins)
        refused = _refused_labels(session, join, table.num_rows)
        columns = ", ".join(f"features.{value.name}" for value in features.values)
        session.execute(
            f"create view result as select labels.*, {columns} from labels join features "
            "on features.point = labels.point"
            + (" where labels.point not in (select point from refused)" if refused else "")
        )
        content = _fingerprint(session, "result")
        if expect and content != expect[1]:
            raise NotReproducible(
                f"the rows differ from those of the manifest although labels and tiles are the same: {output} was "
                "not written; look for a changed version of DuckDB or Arrow"
            )
        made = _Made(
            table.num_rows,
            table.num_rows - sum(refused.values()),
            _count_cold_start(session, features, among="result"),
            labels_hash,
            content,
            first,
            last,
            refused,
            read,
        )
        if describe:
            describe(made)
        kinds = {row[0]: row[1] for row in session.execute("describe result").fetchall()}
        kinds.pop(POINT)
        fingerprint = {"prefs.fingerprint": content}
        write_output(session, kinds, catalog, output, fingerprint, keep_formulas=join.csv.keep_formulas)
    return replace(made, seconds=time.monotonic() - started)


def _create_values(
    session: duckdb.DuckDBPyConnection, catalog: Catalog, join: LabelJoin, pins: Pins
) -> tuple[date, date, LogSource | None]:
    """Create `features` of the labels, and `refused` unless the meaning is `yesterday`, which refuses no label.

    Return the earliest and latest day of what any value was made of, and the files of the log, if they were read.
    """
    features, strict = join.features, not join.drop_refused
    if isinstance(features, Features):
        return *_create_features(session, catalog, join, features, pins), None
    if isinstance(features, ServedFeatures):
        inputs = lake_inputs(catalog, features, pins, spreads=join.spreads, namespace=join.namespace)
        meaning: ServedMeaning = "happened" if join.meaning == "happened" else "served"
        create_served(session, features, inputs, meaning=meaning, strict=strict)
        return *days_of_points(session, features), None
    if join.log is None:
        raise LabelsRefused("values from the served log need a log: name its folder")
    read, refusals = create_logged(session, features, join.log)
    refuse_points(session, "from the served log", refusals, strict=strict)
    return *days_of_reads(session, features), read


def _refused_labels(session: duckdb.DuckDBPyConnection, join: LabelJoin, labels: int) -> dict[str, int]:
    """Return the number of the labels that are left out, by reason. Raises LabelsRefused if none remains."""
    if join.meaning == "yesterday":
        return {}
    found = dict(
        session.execute("select reason, count(*) from refused group by reason order by reason").fetchall()
    )
    if sum(found.values()) == labels:
        told = "; ".join(f"{number:,}: {reason}" for reason, number in found.items())
        raise LabelsRefused(f"none of the {labels:,} labels can have a value as {join.meaning} ({told})")
    return found


def _create_features(
    session: duckdb.DuckDBPyConnection, catalog: Catalog, join: LabelJoin, features: Features, pins: Pins
) -> tuple[date, date]:
    """Create `features` as of the day before each label's; return the earliest and latest day whose tiles any needs."""
    namespace = join.namespace
    first, last = _create_points(session, features)
    oldest = _oldest_label(session)
    for spec, columns in features.sources:
        with translated(f"the table {namespace}.{spec.name}"):
            tiles = catalog.load_table(spec.identifier(namespace))
            snapshot = pinned_snapshot(tiles, pins.snapshots[spec.name])
            if join.as_known:
                batches = _versions(tiles, spec, snapshot, columns, first, last, oldest)
            else:
                batches = current_tiles(tiles, spec, snapshot, columns, first, last)
            keys = ", ".join(features.key_names)
            known = f"({keys}) in (select {keys if len(features.keys) == 1 else f'({keys})'} from points)"
            load_tiles(session, spec, columns, batches, where=known, versions=join.as_known)
    session.execute(f"create table features as {features.sql('training', versions=join.as_known)}")
    return first, last


def _load_labels(session: duckdb.DuckDBPyConnection, table: pa.Table) -> None:
    """Create `labels`, numbered by `point`."""
    number = pa.array(range(table.num_rows), pa.int64())
    names = table.column_names
    # Instants are stored as integers: without an extension DuckDB cannot convert one to a date.
    source = table.append_column("point", number)
    place = source.schema.get_field_index(TIME)
    source = source.set_column(place, TIME, source[TIME].cast(pa.int64()))
    session.register("source", source)
    others = ", ".join(f'"{name.replace(chr(34), chr(34) * 2)}"' for name in names)
    session.execute(f"create table labels as select point, {others} from source")
    session.unregister("source")


def _create_points(session: duckdb.DuckDBPyConnection, features: Features) -> tuple[date, date]:
    """Create `points` from `labels`; return the earliest and latest day whose tiles any label needs."""
    session.execute(
        f"""
        create table points as
        select point, {", ".join(features.key_names)}, 
          date '1970-01-01' + cast(floor({TIME} / 86400000000.0) as integer) as day,
          {TIME} // 1000 as known_at
        from labels
        """
    )
    earliest, latest = _one(session, "select min(day), max(day) from points")
    return features.first_day(earliest), latest - timedelta(days=1)


def _oldest_label(session: duckdb.DuckDBPyConnection) -> int:
    return int(_one(session, "select min(known_at) from points")[0])


def _set_tag(table: Table, tag: str, snapshot_id: int) -> None:
    """Tag a snapshot. Idempotent. Raises TagTaken if the name is a branch, or tags a different snapshot."""
    for _ in range(ATTEMPTS):
        held = table.refs().get(tag)
        if held is not None:
            if held.snapshot_id == snapshot_id and held.snapshot_ref_type == SnapshotRefType.TAG:
                return
            raise TagTaken(
                f"{'.'.join(table.name())} has {tag} for snapshot {held.snapshot_id} already: choose another name"
            )
        # Other writers commit to the table all day, without conflict with a tag.
        with suppress(CommitFailedException):
            table.manage_snapshots().create_tag(snapshot_id, tag).commit()
        table.refresh()
    raise TagTaken(f"{'.'.join(table.name())} changed while it was tagged {ATTEMPTS} times: run it again")


def _versions(
    table: Table,
    spec: TileTable,
    snapshot: Snapshot | None,
    columns: tuple[str, ...],
    first: date,
    last: date,
    oldest_label: int,
) -> Iterator[pa.RecordBatch]:
    if snapshot is None:
        return
    for version in _history(table, snapshot, oldest_label):
        if first <= day_of(table, spec, version.file.data) <= last:
            for batch in read_rows(table, version.file, [*spec.entity.key_names, spec.day, *columns]):
                yield batch.append_column(
                    "known_from", pa.repeat(version.known_from, batch.num_rows)
                ).append_column("known_to", pa.repeat(version.known_to, batch.num_rows))


def _history(table: Table, last: Snapshot, oldest_label: int) -> list[_Version]:
    """Return every data file with the times in which readers saw it, up to the publication of `last`."""
    log = [(entry.snapshot_id, entry.timestamp_ms) for entry in table.history()]
    ends = [place for place, (snapshot_id, _) in enumerate(log) if snapshot_id == last.snapshot_id]
    if not ends:
        raise SnapshotExpired(
            f"the history of {'.'.join(table.name())} does not show when snapshot {last.snapshot_id} was "
            "published: build it without as_known"
        )
    log = log[: ends[-1] + 1]
    start = _unbroken_from(table, log)
    first = table.snapshot_by_id(log[start][0])
    # A table's first commit has sequence number 1; a later one has predecessors, which have expired.
    complete = start == 0 and first is not None and first.sequence_number == 1
    if not complete and log[start][1] > oldest_label:
        when = datetime.fromtimestamp(log[start][1] / 1000, UTC).isoformat()
        raise SnapshotExpired(
            f"the history of {'.'.join(table.name())} begins at {when}, and older snapshots have expired: drop "
            "labels before that time, or build without as_known"
        )
    manifests: dict[str, list[DataFile]] = {}
    current: dict[frozenset[str], tuple[LiveFile, int]] = {}
    versions: list[_Version] = []
    for snapshot_id, published in log[start:]:
        snapshot = table.snapshot_by_id(snapshot_id)
        # Later deletes from a file make another version of it.
        held = {file.parts: file for file in _files_of(table, snapshot, manifests)} if snapshot else {}
        for parts in current.keys() - held.keys():
            file, since = current.pop(parts)
            versions.append(_Version(file, since, published))
        for parts in held.keys() - current.keys():
            current[parts] = (held[parts], published)
    return versions + [_Version(file, since, FOREVER) for file, since in current.values()]


def _files_of(table: Table, snapshot: Snapshot, manifests: dict[str, list[DataFile]]) -> list[LiveFile]:
    """Return the files of a snapshot; `manifests` caches them for the next one, because most are shared."""
    listed = snapshot.manifests(table.io)
    if any(manifest.content == ManifestContent.DELETES for manifest in listed):
        return live_files(table, snapshot_id=snapshot.snapshot_id)
    for manifest in listed:
        if manifest.manifest_path not in manifests:
            manifests[manifest.manifest_path] = [
                entry.data_file for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=True)
            ]
    return [
        LiveFile(file, snapshot.snapshot_id)
        for manifest in listed
        for file in manifests[manifest.manifest_path]
    ]


def _unbroken_from(table: Table, log: list[tuple[int, int]]) -> int:
    """Return the first position in the log from which on every published snapshot still exists."""
    earlier = [{snapshot_id for snapshot_id, _ in log[:place]} for place in range(len(log))]
    for place in range(len(log) - 1, 0, -1):
        snapshot = table.snapshot_by_id(log[place][0])
        # A rollback publishes a snapshot again; any other follows the one before it.
        rolled_back = log[place][0] in earlier[place]
        if snapshot is None or (not rolled_back and snapshot.parent_snapshot_id != log[place - 1][0]):
            return place
    return 0


def _fingerprint(session: duckdb.DuckDBPyConnection, relation: str) -> str:
    """Return a hash of all rows and their positions: equal if and only if the content is equal, row by row."""
    row_hash = "cast('0x' || left(md5(cast(r as varchar)), 15) as bigint)"
    found = _one(session, f"select count(*), sum({row_hash}) from {relation} as r")
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _one(session: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    # Fetched as a whole, because a session with a half-read result accepts no further statement.
    row: tuple[Any, ...] = session.execute(query).fetchall()[0]
    return row


def _definition(features: AnyFeatures) -> str:
    """Return a hash of the definition of the features."""
    if isinstance(features, LoggedFeatures):
        sql = "logged"
    elif isinstance(features, ServedFeatures):
        sql = features.sql()
    else:
        sql = features.sql("training", versions=True)
    text = json.dumps([asdict(value) for value in features.values]) + sql
    return hashlib.sha256(text.encode()).hexdigest()


def _count_cold_start(session: duckdb.DuckDBPyConnection, features: AnyFeatures, *, among: str) -> int:
    """Count the rows of a relation whose features all have their cold-start value."""
    same = " and ".join(f"{value.name} is not distinct from {value.cold_start}" for value in features.values)
    return int(_one(session, f"select count(*) from {among} where {same}")[0])
