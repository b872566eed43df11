"""Values that were really seen: labels joined with the reads of the served log.

A label has the values of the last read of its id and domain at or before its time, within a bound; or, where it has a
request id, those of that request's read. Nothing is computed: the values are what the client answered, so that changes
of views, publication delays and fallbacks are in them. A manifest names the files of the log, with their bytes and
hashes, so that the same rows can be joined again after the log has grown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Domain
from dagster_prefs.declarations.registry import Entity, Registry
from dagster_prefs.errors import excerpt
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.ids import Id, id_parts
from dagster_prefs.served_rows import (
    BadRow,
    LogUnreadable,
    ServedRow,
    log_files,
    log_name,
    read_lines,
    row_values,
    with_places,
)
from dagster_prefs.training.labels import TIME, LabelsRefused
from dagster_prefs.training.served_sql import ServedFeatures, served_entity
from dagster_prefs.training.windows import (
    Feature,
    ViewNotPortable,
    check_unique_names,
    entity_of,
    feature_of,
)

# The column of labels with the id of the request that led to them.
REQUEST_ID = "request_id"
DEFAULT_WITHIN = timedelta(hours=1)
# Rows of the log that are converted at once.
ROWS_AT_ONCE = 20_000

# Columns of the tables of logged rows, beside the keys and attributes.
_AT, _ROW, _REQUEST, _LACKS = "prefs_at", "prefs_row", "prefs_request", "prefs_lacks"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DIGITS = 28


class LogChanged(OfflineError):
    """The served log no longer has the rows from which a training set was made."""


@dataclass(frozen=True)
class LogFile:
    """A file of the served log as it was read.

    `name` is its path below its place without the endings that come and go (`served_rows.log_name`); `bytes` and
    `sha256` are of the lines that were read, uncompressed.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LogSource:
    """Where logged reads come from: files or folders, and how long before a label its read may be.

    `files` are those of each place that are read, up to their bytes; None means all files as they are.
    """

    places: tuple[Path, ...]
    within: timedelta = DEFAULT_WITHIN
    files: tuple[tuple[LogFile, ...], ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the source as plain values, for a manifest."""
        return {
            "within_seconds": self.within.total_seconds(),
            "places": [
                {"place": str(place), "files": [vars(file) for file in files]}
                for place, files in zip(self.places, self.files or ((),) * len(self.places), strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], places: Sequence[Path] = ()) -> LogSource:
        """Return the source of a manifest; `places` are new places of the log, in the same order.

        Raises LogChanged if there are more or fewer of them.
        """
        known = content["places"]
        if places and len(places) != len(known):
            raise LogChanged(
                f"the training set was made of {len(known)} places of the log ({_named(known)}), and "
                f"{len(places)} are given: name as many, in this order"
            )
        return cls(
            tuple(places) or tuple(Path(one["place"]) for one in known),
            timedelta(seconds=content["within_seconds"]),
            tuple(tuple(LogFile(**file) for file in one["files"]) for one in known),
        )


class LoggedFeatures:
    """The logged values of one entity: all attributes of its domains except `last_event_at`.

    `domains` (names, in the contract's order) limits them to these. A value has the type that it has as served, or six
    decimal places if its view cannot be computed for another time. `left_out` maps `domain.attribute` to the reason why
    training data cannot represent it. Raises OfflineError for an unknown domain, ViewNotPortable for ambiguous names.
    """

    def __init__(self, registry: Registry, entity: Entity, domains: Sequence[str] | None = None) -> None:
        self.registry = registry
        self.entity = entity
        self.key = entity.key
        self.keys = entity.keys
        self.key_names = entity.key_names
        self.contract_version = registry.contract.version
        own = [one for one in registry.contract.domains.values() if entity_of(registry, one) == entity]
        if unknown := [name for name in domains or () if name not in {one.name for one in own}]:
            raise OfflineError(
                f"{entity.name} has no domain {unknown[0]}: name one of {', '.join(one.name for one in own)}"
            )
        served = {(one.domain, one.name): one for one in ServedFeatures(registry, entity).values}
        self.left_out: dict[str, str] = {}
        self._domains = [one for one in own if domains is None or one.name in domains]
        values: list[Feature] = []
        for domain in self._domains:
            for name, attribute in domain.attributes.items():
                if name == LAST_EVENT_AT:
                    continue
                try:
                    found = served.get((domain.name, name)) or feature_of(domain.name, name, attribute)
                except ViewNotPortable as error:
                    self.left_out[f"{domain.name}.{name}"] = str(error)
                    continue
                values.append(found)
        self.values = tuple(values)
        check_unique_names(entity, self.values)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, in the contract's order."""
        return tuple(one.name for one in self._domains)

    @property
    def by_key(self) -> Mapping[str, Domain]:
        """The domains by their keys in the log."""
        return {one.key: one for one in self._domains}

    def values_of(self, domain: str) -> tuple[Feature, ...]:
        """Return the values of a domain."""
        return tuple(one for one in self.values if one.domain == domain)


def choose_logged(
    registry: Registry, entity: str | None, domains: Sequence[str] | None = None
) -> LoggedFeatures:
    """Return the logged values of the entity of this name, or of the only one with a domain.

    Raises OfflineError if there is no such entity or domain, or several entities and none is named.
    """
    return LoggedFeatures(registry, served_entity(registry, entity), domains)


def create_logged(
    session: duckdb.DuckDBPyConnection, features: LoggedFeatures, source: LogSource
) -> tuple[LogSource, list[tuple[str, str, str]]]:
    """Create the table `features` of the labels: `point` and every value, NULL where a label has no read.

    The session has the table `labels`: `point`, the entity's keys, `label_time` in microseconds since 1970, and
    `request_id` if there is one. Creates `points` too. Returns the source with the files that were read, and reason,
    remedy and condition on a point `p` for everything that leaves a label without values (see `refuse_points`).

    Raises LabelsRefused for request ids that are no texts or whole numbers, LogUnreadable and BadRow for the log, and
    LogChanged if the files of the source are not what they were.
    """
    return _Logged(session, features, source).create()


def days_of_reads(session: duckdb.DuckDBPyConnection, features: LoggedFeatures) -> tuple[date, date]:
    """Return the UTC dates of the oldest and newest read that a label has, or of the labels if none has one."""
    reads = " union all ".join(f"select {_AT} as moment from chosen_{name}" for name in features.domains)
    for query in (reads, f"select {TIME} as moment from points"):
        first, last = session.execute(f"select min(moment), max(moment) from ({query})").fetchall()[0]
        if first is not None:
            break
    return _moment(first).date(), _moment(last).date()


class _Logged:
    """The steps of one join, in one session."""

    def __init__(
        self, session: duckdb.DuckDBPyConnection, features: LoggedFeatures, source: LogSource
    ) -> None:
        self.session = session
        self.features = features
        self.source = source
        self.table = features.registry.contract.tables[features.entity.name]
        self.keys = ", ".join(features.key_names)
        self.read: list[list[LogFile]] = [[] for _ in source.places]
        self.end: datetime | None = None

    def create(self) -> tuple[LogSource, list[tuple[str, str, str]]]:
        self._create_points()
        self._load()
        for name in self.features.domains:
            self._choose(name)
        columns = [f"c_{one.domain}.{one.name}" for one in self.features.values]
        joins = [
            f"left join chosen_{name} as c_{name} on c_{name}.point = p.point"
            for name in self.features.domains
        ]
        self.session.execute(
            f"create table features as select {', '.join(['p.point', *columns])} from points as p {' '.join(joins)}"
        )
        read = LogSource(self.source.places, self.source.within, tuple(map(tuple, self.read)))
        return read, list(self._refusals())

    def _create_points(self) -> None:
        kinds = {row[0]: str(row[1]) for row in self.session.execute("describe labels").fetchall()}
        request = "cast(null as varchar)"
        if (kind := kinds.get(REQUEST_ID)) is not None:
            if kind not in ("VARCHAR", "UUID") and not kind.endswith("INT") and not kind.endswith("INTEGER"):
                raise LabelsRefused(
                    f"the labels' column {REQUEST_ID} is {kind}, and a request id is a text or a whole number: "
                    "convert it, or rename the column to join by time"
                )
            request = f"nullif(trim(cast({REQUEST_ID} as varchar)), '')"
        self.session.execute(
            f"create table points as select point, {self.keys}, {TIME}, {request} as {_REQUEST} from labels"
        )

    def _load(self) -> None:
        """Create the table of each domain with the rows of the log that a label may have."""
        features = self.features
        schemas = {name: self._schema(name) for name in features.domains}
        for name, schema in schemas.items():
            self.session.register("empty", schema.empty_table())
            self.session.execute(f"create table logged_{name} as from empty")
            self.session.unregister("empty")
        first, last, requests = self.session.execute(
            f"select min({TIME}), max({TIME}), count({_REQUEST}) from points"
        ).fetchall()[0]
        since, until = _moment(first) - self.source.within, _moment(last)
        ids = self.session.execute(f"select distinct {self.keys} from points").fetchall()
        wanted: set[Id] = {row[0] if len(row) == 1 else tuple(row) for row in ids}
        waiting: dict[str, list[tuple[Id, ServedRow]]] = {name: [] for name in features.domains}
        names = {key: domain.name for key, domain in features.by_key.items()}
        for row in self._rows():
            if row.entity != features.entity.name:
                continue
            if self.end is None or row.served_at > self.end:
                self.end = row.served_at
            domain = names.get(row.domain)
            if domain is None or not (since <= row.served_at <= until or (requests and row.request_id)):
                continue
            id_ = self._id(row)
            if id_ not in wanted:
                continue
            waiting[domain].append((id_, row))
            if len(waiting[domain]) >= ROWS_AT_ONCE:
                self._insert(domain, schemas[domain], waiting[domain])
                waiting[domain] = []
        for name, rows in waiting.items():
            if rows:
                self._insert(name, schemas[name], rows)

    def _id(self, row: ServedRow) -> Id:
        try:
            return self.table.parse_key(row.key)
        except ValueError:
            # Without the key: it names a person.
            raise BadRow(
                f"row {excerpt(row.row_id)}: its key is none of {self.features.entity.name}"
            ) from None

    def _rows(self) -> Iterator[ServedRow]:
        """Yield the rows of the source's files, and note what was read."""
        for number, place in enumerate(self.source.places):
            found = {log_name(place, file): file for file in log_files(place)}
            if self.source.files is None:
                if not found:
                    raise LogUnreadable(
                        f"{place} has no file of the served log (*.jsonl): name another folder"
                    )
                for name, file in found.items():
                    yield from self._rows_of(number, name, file, None)
                continue
            for known in self.source.files[number]:
                if known.name not in found:
                    raise LogChanged(
                        f"{place} no longer has {known.name}, from which the training set was made: name the place to "
                        "which the log was moved"
                    )
                yield from self._rows_of(number, known.name, found[known.name], known)

    def _rows_of(self, number: int, name: str, file: Path, known: LogFile | None) -> Iterator[ServedRow]:
        digest, size = hashlib.sha256(), 0
        if known is None or known.bytes:
            for line, row in read_lines(file):
                digest.update(line)
                size += len(line)
                yield row
                if known is not None and size >= known.bytes:
                    break
        read = LogFile(name, size, digest.hexdigest())
        if known is not None and read != known:
            raise LogChanged(
                f"{file} has other lines than when the training set was made, e.g. because an erasure removed some: "
                "the set cannot be made again"
            )
        self.read[number].append(read)

    def _schema(self, domain: str) -> pa.Schema:
        return pa.schema(
            [
                *(
                    pa.field(key.name, pa.int64() if key.type == "bigint" else pa.string())
                    for key in self.features.keys
                ),
                (_AT, pa.int64()),
                (_ROW, pa.string()),
                (_REQUEST, pa.string()),
                (_LACKS, pa.string()),
                *((one.name, _arrow_type(one.type)) for one in self.features.values_of(domain)),
            ]
        )

    def _insert(self, domain: str, schema: pa.Schema, rows: Sequence[tuple[Id, ServedRow]]) -> None:
        values = self.features.values_of(domain)
        places = {one.name: _places(one.type) for one in values}
        declared = next(one for one in self.features.by_key.values() if one.name == domain)
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        for id_, row in rows:
            found = row_values(row, declared)
            for name, part in zip(self.features.key_names, id_parts(id_), strict=True):
                columns[name].append(part)
            columns[_AT].append((row.served_at - _EPOCH) // _MICROSECOND)
            columns[_ROW].append(row.row_id)
            columns[_REQUEST].append(row.request_id)
            lacking = None if found is None else next((name for name in places if name not in found), None)
            if found is None:
                columns[_LACKS].append(f"the read of {domain} failed, so that nothing was seen")
            elif lacking is not None:
                columns[_LACKS].append(
                    f"{domain} was served by contract version {row.contract_version}, which has no {lacking}"
                )
            else:
                columns[_LACKS].append(None)
            for name, digits in places.items():
                value = None if found is None else found.get(name)
                columns[name].append(value if digits is None else _rounded(row, name, value, digits))
        batch = pa.table(
            [pa.array(columns[one.name], one.type) for one in schema],
            schema=schema,
        )
        self.session.register("batch", batch)
        self.session.execute(f"insert into logged_{domain} from batch")
        self.session.unregister("batch")

    def _choose(self, domain: str) -> None:
        """Create the table of the read that each label has: `point`, and the columns of the logged row."""
        others = ", ".join(
            f"g.{name}"
            for name in self._schema(domain).names
            if name not in (*self.features.key_names, _REQUEST)
        )
        same = " and ".join(f"g.{key} = p.{key}" for key in self.features.key_names)
        within = self.source.within // _MICROSECOND
        # Rows of one instant have one order, and a row that was delivered twice is one.
        once = (
            f"select * from logged_{domain} qualify row_number() over "
            f"(partition by {self.keys}, {_AT} order by {_ROW} desc) = 1"
        )
        self.session.execute(
            f"create table chosen_{domain} as select p.point, {others} "
            f"from (select * from points where {_REQUEST} is null) as p asof join ({once}) as g "
            f"on {same} and p.{TIME} >= g.{_AT} where g.{_AT} >= p.{TIME} - {within}"
        )
        # A request that read more than once: its last read up to the label, or else the first one after it.
        self.session.execute(
            f"insert into chosen_{domain} select p.point, {others} from points as p join logged_{domain} as g "
            f"on {same} and g.{_REQUEST} = p.{_REQUEST} qualify row_number() over (partition by p.point order by "
            f"g.{_AT} <= p.{TIME} desc, abs(p.{TIME} - g.{_AT}), g.{_ROW} desc) = 1"
        )

    def _refusals(self) -> Iterator[tuple[str, str, str]]:
        within = self.source.within
        if self.end is None:
            yield (
                f"the log has no read of {self.features.entity.name}",
                "name another folder of the log",
                "true",
            )
            return
        yield (
            f"the log ends at {self.end.isoformat()}, and the label is newer, so that its last read may not be written "
            "yet",
            "build it again later, or leave these labels out with --drop-refused",
            f"p.{_REQUEST} is null and p.{TIME} > {(self.end - _EPOCH) // _MICROSECOND}",
        )
        for domain in self.features.domains:
            missing = f"p.point not in (select point from chosen_{domain})"
            drop = "leave these labels out with --drop-refused"
            yield (
                f"the log has no read of {domain} with the label's {REQUEST_ID}",
                f"{drop}, or the domain with --domain",
                f"p.{_REQUEST} is not null and {missing}",
            )
            yield (
                f"the log has no read of {domain} in the {within} before the label",
                f"{drop}, the domain with --domain, or allow older reads with --within-seconds",
                f"p.{_REQUEST} is null and {missing}",
            )
            found = self.session.execute(
                f"select distinct {_LACKS} from chosen_{domain} where {_LACKS} is not null order by 1"
            ).fetchall()
            for (reason,) in found:
                quoted = "'" + str(reason).replace("'", "''") + "'"
                yield (
                    reason,
                    f"{drop}, or the domain with --domain",
                    f"p.point in (select point from chosen_{domain} where {_LACKS} = {quoted})",
                )


def _arrow_type(kind: str) -> pa.DataType:
    """Return Arrow's type of a value's type in DuckDB."""
    if kind.endswith("[]"):
        return pa.list_(_arrow_type(kind.removesuffix("[]")))
    places = _places(kind)
    if places is not None:
        return pa.decimal128(_DIGITS, places)
    return pa.int64() if kind == "bigint" else pa.string()


def _places(kind: str) -> int | None:
    """Return the decimal places of a value's type in DuckDB, None if it is no decimal."""
    kind = kind.removesuffix("[]")
    return int(kind.removesuffix(")").rpartition(",")[2]) if kind.startswith("decimal(") else None


def _rounded(row: ServedRow, name: str, value: Any, places: int) -> Any:
    """Return a decimal or a list of them with so many places."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_rounded(row, name, one, places) for one in value]
    try:
        found: Decimal = with_places(value, places)
    except InvalidOperation:
        found = Decimal(10) ** _DIGITS
    if found.adjusted() >= _DIGITS - places:
        raise BadRow(
            f"row {excerpt(row.row_id)}: {name} has more digits than a training set can hold ({_DIGITS}, {places} of "
            "them after the point)"
        )
    return found


def _moment(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND


def _named(places: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(one["place"]) for one in places)
