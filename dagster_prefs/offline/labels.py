"""Labels: who, when, and whatever else the model is to learn from, read and checked before anything is joined."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog

from dagster_prefs.offline.catalog import OfflineError, explained
from dagster_prefs.offline.tables import VIEWER
from dagster_prefs.offline.windows import features

TIME = "label_time"
# What rows are numbered by while they are joined.
POINT = "point"

_INSTANT = pa.timestamp("us", tz="UTC")
_ZONED = r":\d{2}(\.\d+)?(Z|[+-]\d{2}(:?\d{2})?)$"


class LabelsRefused(OfflineError):
    """The labels cannot be used as they are; nothing was written."""


def read_labels(catalog: Catalog, source: str, *, now: datetime, timezone: str | None = None) -> pa.Table:
    """Read labels from a `.parquet` or `.csv` file, or from the Iceberg table `namespace.table`.

    The result has every column of the source; `viewer_id` is int64, `label_time` a UTC instant in
    microseconds. Times need a zone (`Z`, an offset, a zoned Parquet type) unless `timezone` (e.g.
    `Europe/Berlin`) says which one times without it are in.

    Raises LabelsRefused naming the first offending row (from 1): a missing column, no rows, a viewer that is
    no integer, a time that is missing, has no zone, or lies after `now`, a column named like a feature, or one of
    durations.
    """
    table = _read(catalog, source)
    check_columns(source, table.column_names)
    for field in table.schema:
        if pa.types.is_duration(field.type) or pa.types.is_interval(field.type):
            raise LabelsRefused(
                f"{source} has the column {field.name} of type {field.type}, which files have no equal of: write it as "
                "a number, e.g. of seconds"
            )
    if table.num_rows == 0:
        raise LabelsRefused(f"{source} has no rows: a training set needs at least one label")
    table = _replace(table, VIEWER, _viewers(table[VIEWER], source))
    times = _instants(table[TIME], source, timezone)
    late = pc.greater(times, pa.scalar(now, _INSTANT))
    if pc.any(late).as_py():
        row = _first(late)
        raise LabelsRefused(
            f"{source} row {row + 1}: label_time {times[row].as_py().isoformat()} is in the future "
            f"(now is {now.isoformat()}), when its features cannot be known: correct or drop it"
        )
    return _replace(table, TIME, times)


def check_columns(source: str, columns: Sequence[str]) -> None:
    """Refuse columns that no labels can have: a key is missing, a name is taken or there twice.

    Raises LabelsRefused naming the column and what to call it.
    """
    for name in (VIEWER, TIME):
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"rename {near[0]}" if near else "add it"
            raise LabelsRefused(f"{source} has no column {name} (it has {', '.join(columns)}): {hint}")
    clashes = sorted({feature.name for feature in features()} & set(columns))
    if clashes:
        raise LabelsRefused(
            f"{source} has the column {clashes[0]}, which is the name of a feature: rename it, e.g. to "
            f"label_{clashes[0]}"
        )
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise LabelsRefused(f"{source} has the column {repeated[0]} twice: rename one")
    if POINT in columns:
        raise LabelsRefused(f"{source} has the column {POINT}, which is reserved: rename it")


def _read(catalog: Catalog, source: str) -> pa.Table:
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".csv"):
        if not path.is_file():
            raise LabelsRefused(f"{source} does not exist: name a Parquet or CSV file, or an Iceberg table")
        try:
            if suffix == ".parquet":
                return pq.read_table(path)
            text = pa.csv.ConvertOptions(column_types={TIME: pa.string()}, strings_can_be_null=True)
            return pa.csv.read_csv(path, convert_options=text)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            # pyarrow takes a CSV file without a header line for one that is empty.
            raise LabelsRefused(
                f"{source} cannot be read as {suffix[1:]} ({reason}): write it again"
            ) from error
    if source.count(".") == 1 and "/" not in source:
        with explained(f"the table {source}"):
            return catalog.load_table(source).scan().to_arrow()
    raise LabelsRefused(
        f"{source} is neither a .parquet nor a .csv file nor an Iceberg table (namespace.table): name one of these"
    )


def _viewers(values: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    if values.null_count:
        raise LabelsRefused(f"{source} row {_first(pc.is_null(values)) + 1}: viewer_id is missing: fill it")
    try:
        viewers = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise LabelsRefused(
            f"{source}: viewer_id must be an integer ({str(error).splitlines()[0]}): correct it"
        ) from error
    except pa.ArrowNotImplementedError as error:
        raise LabelsRefused(
            f"{source}: viewer_id must be an integer, it is {values.type}: convert it"
        ) from error
    negative = pc.less(viewers, 0)
    if pc.any(negative).as_py():
        raise LabelsRefused(
            f"{source} row {_first(negative) + 1}: viewer ids below 0 are canaries and have no training data: "
            "drop it"
        )
    return viewers


def _instants(values: pa.ChunkedArray, source: str, timezone: str | None) -> pa.ChunkedArray:
    kind = values.type
    if values.null_count:
        raise LabelsRefused(f"{source} row {_first(pc.is_null(values)) + 1}: label_time is missing: fill it")
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return values.cast(_INSTANT, safe=False)
    if pa.types.is_timestamp(kind):
        return _localize(values.cast(pa.timestamp("us"), safe=False), values, source, timezone)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
        texts = pc.replace_substring_regex(texts, r"\s*(UTC|Z)$", "Z")
        texts = pc.replace_substring_regex(texts, r"\s+([+-]\d{2}(:?\d{2})?)$", r"\1")
        zoned = pc.match_substring_regex(texts, _ZONED)
        if not pc.all(zoned).as_py():
            naive = pc.if_else(zoned, pa.scalar(None, pa.string()), texts)
            parsed = _parse(naive, pa.timestamp("us"), source)
            local = _localize(parsed, values, source, timezone, pc.invert(zoned))
            given = _parse(pc.if_else(zoned, texts, pa.scalar(None, pa.string())), _INSTANT, source)
            return pc.coalesce(given, local)
        return _parse(texts, _INSTANT, source)
    raise LabelsRefused(
        f"{source}: label_time must be a timestamp with a zone or ISO 8601 text, it is {kind}: convert it"
    )


def _parse(texts: pa.ChunkedArray, kind: pa.DataType, source: str) -> pa.ChunkedArray:
    try:
        return texts.cast(kind)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise LabelsRefused(f"{source}: label_time must be ISO 8601 ({reason}): correct it") from error


def _localize(
    local: pa.ChunkedArray,
    given: pa.ChunkedArray,
    source: str,
    timezone: str | None,
    affected: pa.ChunkedArray | None = None,
) -> pa.ChunkedArray:
    if timezone is None:
        row = 0 if affected is None else _first(affected)
        raise LabelsRefused(
            f"{source} row {row + 1}: label_time {given[row].as_py()} has no zone: write it with Z or an offset, "
            "or say which zone it is in (e.g. timezone UTC)"
        )
    try:
        return pc.assume_timezone(local, timezone).cast(_INSTANT)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise LabelsRefused(
            f"{source}: label_time cannot be read in the zone {timezone} ({reason}): write it with an offset, or name "
            "another zone"
        ) from error


def _replace(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, pa.field(name, values.type, nullable=False), values)


def _first(mask: pa.ChunkedArray) -> int:
    row: int = pc.index(mask, True).as_py()
    return row
