"""Read labels: the subject, the time, and any other columns. They are checked before they are joined."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog

from dagster_prefs.declarations.registry import Key
from dagster_prefs.declarations.reserved import PREFIX, UUID_PREFIX, reserved_range
from dagster_prefs.iceberg.catalog import OfflineError, translated
from dagster_prefs.iceberg.files import scan_rows
from dagster_prefs.ids import BLANKS, EXACT_FLOAT, BadId, read_key
from dagster_prefs.textfiles import MAX_CELL_BYTES, MIB, ROW_FAULTS, CsvRow, LineReader, csv_rows
from dagster_prefs.training.windows import FeatureSet

TIME = "label_time"
# The column that numbers rows while they are joined.
POINT = "point"
# Labels are held in memory as a whole while they are checked.
MAX_LABEL_BYTES = 1024 * MIB
ROWS_PER_BATCH = 16_384
CHUNK_BYTES = 8 * MIB

_INSTANT = pa.timestamp("us", tz="UTC")
_ZONED = r":\d{2}(\.\d+)?(Z|[+-]\d{2}(:?\d{2})?)$"


class LabelsRefused(OfflineError):
    """The labels cannot be used as they are; nothing was written."""


# The column types that `--types` accepts, and their Arrow types.
TYPES: Mapping[str, Callable[..., pa.DataType]] = {
    "text": pa.string,
    "int": pa.int64,
    "float": pa.float64,
    "bool": pa.bool_,
    "date": pa.date32,
    "timestamp": lambda: _INSTANT,
    "decimal": lambda precision=38, scale=9: pa.decimal128(int(precision), int(scale)),
}


class _CsvLines(LineReader):
    refusal = LabelsRefused
    formats = "CSV in UTF-8, or a Parquet file named .parquet"
    again = "name it again"


def read_labels(
    catalog: Catalog,
    source: str,
    *,
    features: FeatureSet,
    now: datetime,
    timezone: str | None = None,
    types: Mapping[str, str] | None = None,
) -> pa.Table:
    """Read labels from a `.parquet` or `.csv` file, or from the Iceberg table `namespace.table`.

    The result has every column of the source. The key of the entity of `features` is int64 or a text, according to the
    key's type; `label_time` is a UTC instant in microseconds. Times need a zone (`Z`, an offset, a zoned Parquet type)
    unless `timezone` (e.g. `Europe/Berlin`) gives the zone of those without one. Every other cell of CSV is text as
    written, and NULL if empty, unless `types` gives the column's type (one of `TYPES`). Labels may take MAX_LABEL_BYTES
    in memory.

    Raises LabelsRefused naming the first offending row (from 1): a missing column, no rows, an id that does not have
    the key's type, a time that is missing, has no zone, or lies after `now`, a column named like a feature, a column of
    durations, a cell that does not have its given type, or more than the limits allow.
    """
    given = {name: _type_of(name, kind) for name, kind in (types or {}).items()}
    table = _read(catalog, source, given, features)
    check_columns(source, table.column_names, features)
    for field in table.schema:
        if pa.types.is_duration(field.type) or pa.types.is_interval(field.type):
            raise LabelsRefused(
                f"{source} has the column {field.name} of type {field.type}, which labels cannot have: write it as "
                "a number, e.g. of seconds"
            )
    if table.num_rows == 0:
        raise LabelsRefused(f"{source} has no rows: a training set needs at least one label")
    for key in features.keys[1:]:
        table = _replace(table, key.name, key_values(table[key.name], key, source))
    key = features.key
    ids = key_values(table[key.name], key, source)
    if key.type == "bigint":
        reserved = pc.less(ids, 0)
    else:
        reserved = pc.starts_with(ids, UUID_PREFIX if key.type == "uuid" else PREFIX)
    if pc.any(reserved).as_py():
        raise LabelsRefused(
            f"{source} row {_first(reserved) + 1}: {features.entity.name} ids {reserved_range(key)} are canaries and "
            "have no training data: drop it"
        )
    table = _replace(table, key.name, ids)
    times = _instants(table[TIME], source, timezone)
    late = pc.greater(times, pa.scalar(now, _INSTANT))
    if pc.any(late).as_py():
        row = _first(late)
        raise LabelsRefused(
            f"{source} row {row + 1}: label_time {times[row].as_py().isoformat()} is in the future "
            f"(now is {now.isoformat()}), when its features cannot be known: correct or drop it"
        )
    return _replace(table, TIME, times)


def is_csv(source: str) -> bool:
    """Return whether labels are a CSV file, by their name."""
    return Path(source).suffix.lower() == ".csv"


def check_columns(source: str, columns: Sequence[str], features: FeatureSet) -> None:
    """Reject columns that labels cannot have: a key is missing, or a name is reserved or repeated.

    Raises LabelsRefused naming the column and what to call it.
    """
    for name in (*features.key_names, TIME):
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"rename {near[0]}" if near else "add it"
            raise LabelsRefused(f"{source} has no column {name} (it has {', '.join(columns)}): {hint}")
    clashes = sorted({feature.name for feature in features.values} & set(columns))
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


def _type_of(name: str, kind: str) -> pa.DataType:
    """Return the Arrow type of a column type from `--types`, e.g. `int` or `decimal(18,4)`."""
    found = re.fullmatch(r"([a-z]+)(?:\(([0-9]{1,2}),([0-9]{1,2})\))?", kind.strip())
    if found and found[1] in TYPES and (found[2] is None or found[1] == "decimal"):
        try:
            return TYPES[found[1]](*(digits for digits in found.groups()[1:] if digits is not None))
        except (pa.ArrowInvalid, ValueError):
            pass
    raise LabelsRefused(
        f"column {name} cannot be of type {kind!r}: types are {', '.join(TYPES)}, and decimal(18,4)"
    )


def _read(catalog: Catalog, source: str, types: Mapping[str, pa.DataType], features: FeatureSet) -> pa.Table:
    path = Path(source)
    suffix = path.suffix.lower()
    if types and suffix != ".csv":
        raise LabelsRefused(f"{source} has its own types: types can only be given for CSV")
    if suffix in (".parquet", ".csv"):
        if not path.is_file():
            raise LabelsRefused(f"{source} does not exist: name a Parquet or CSV file, or an Iceberg table")
        try:
            if suffix == ".parquet":
                return _read_parquet(path, source)
            return _typed(_read_csv(path, source, features), source, types, features.key_names)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise LabelsRefused(
                f"{source} cannot be read as {suffix[1:]} ({reason}): write it again"
            ) from error
    if source.count(".") == 1 and "/" not in source:
        with translated(f"the table {source}"):
            return _read_table(catalog, source)
    raise LabelsRefused(
        f"{source} is neither a .parquet nor a .csv file nor an Iceberg table (namespace.table): name one of these"
    )


def _read_csv(path: Path, source: str, features: FeatureSet) -> pa.Table:
    """Read the cells of a CSV file as written, NULL if empty; blank lines are not rows."""
    with _CsvLines(path) as lines:
        rows = (row for row in csv_rows(iter(lines)) if row.cells or row.fault)
        header = next(rows, None)
        if header is None or header.fault:
            reason = ROW_FAULTS[header.fault] if header and header.fault else "it is empty"
            raise LabelsRefused(f"{source} cannot be read as csv (header: {reason}): write it again")
        names = [name.strip() for name in header.cells]
        check_columns(source, names, features)
        schema = pa.schema([pa.field(name, pa.string()) for name in names])
        batches: list[pa.RecordBatch] = []
        size = 0
        for chunk in _chunks(rows):
            for number, row in chunk:
                fault = row.fault or (None if len(row.cells) == len(names) else "cells")
                if fault:
                    raise LabelsRefused(
                        f"{source} row {number} (line {row.line}): {ROW_FAULTS[fault]}; correct it (the columns are "
                        f"{', '.join(names)})"
                    )
                size += len(row.raw)
            _within_limit(source, size)
            columns = zip(*(row.cells for _, row in chunk), strict=True)
            arrays = [pa.array([cell or None for cell in column], pa.string()) for column in columns]
            batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
        return pa.Table.from_batches(batches, schema)


def _chunks(rows: Iterator[CsvRow]) -> Iterator[list[tuple[int, CsvRow]]]:
    """Yield the rows with their numbers, in chunks bounded in rows and in bytes."""
    chunk: list[tuple[int, CsvRow]] = []
    size = 0
    for number, row in enumerate(rows, 1):
        chunk.append((number, row))
        size += len(row.raw)
        if len(chunk) == ROWS_PER_BATCH or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _typed(table: pa.Table, source: str, types: Mapping[str, pa.DataType], keys: tuple[str, ...]) -> pa.Table:
    for name, kind in types.items():
        if name in (*keys, TIME) or name not in table.column_names:
            others = [column for column in table.column_names if column not in (*keys, TIME)]
            raise LabelsRefused(
                f"the type of {name} cannot be given: {source} has the columns {', '.join(others) or 'of the key only'}"
                f" beside {', '.join(keys)} and {TIME}, whose types are fixed"
            )
        values = table[name]
        try:
            typed = values.cast(kind)
        except pa.ArrowInvalid as error:
            row = _first_that_fails(values, kind)
            raise LabelsRefused(
                f"{source} row {row + 1}: {name} is {values[row].as_py()!r}, which is not of type {kind}: "
                "correct it, leave it empty if it is unknown, or give the column another type"
            ) from error
        table = table.set_column(table.schema.get_field_index(name), name, typed)
    return table


def _first_that_fails(values: pa.ChunkedArray, kind: pa.DataType) -> int:
    """Return the first row that cannot be cast, None if all can."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            values.slice(low, middle - low).cast(kind)
        except pa.ArrowInvalid:
            high = middle
        else:
            low = middle
    return low


def _read_parquet(path: Path, source: str) -> pa.Table:
    """Read a Parquet file whose rows fit into the memory limit for labels, however small the file is."""
    # Opened here, because Arrow takes no file name that is not UTF-8.
    with path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        leaves = [parquet.schema.column(number) for number in range(len(parquet.schema))]
        chunks = [(group.column(number), leaf) for group in groups for number, leaf in enumerate(leaves)]
        # A dictionary-encoded value that repeats takes almost no space in the file, but does in memory.
        sizes = [
            max(chunk.total_uncompressed_size, chunk.num_values * _FIXED_BYTES.get(leaf.physical_type, 0))
            for chunk, leaf in chunks
        ]
        _within_limit(source, sum(sizes))
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        file.seek(0)
        size = 0
        # Texts stay dictionary-encoded here, so that nothing is expanded before its size is known.
        for batch in pq.ParquetFile(file, read_dictionary=texts).iter_batches(ROWS_PER_BATCH):
            size += sum(_size(column, source) for column in batch.columns)
            _within_limit(source, size)
        file.seek(0)
        return pq.ParquetFile(file).read()


_FIXED_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}


def _size(values: pa.Array, source: str) -> int:
    """Return the size in bytes of an array once its texts are expanded."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(values.dictionary)
        longest = pc.max(lengths).as_py() or 0
        if longest > MAX_CELL_BYTES:
            raise LabelsRefused(
                f"{source} has a cell of {longest:,} bytes, and the limit is {MAX_CELL_BYTES:,}: omit that column"
            )
        return (pc.sum(pc.take(lengths, values.indices)).as_py() or 0) + 4 * len(values)
    if pa.types.is_map(kind):
        return _size(values.keys, source) + _size(values.items, source) + 4 * len(values)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _size(values.flatten(), source) + 4 * len(values)
    if pa.types.is_struct(kind):
        return sum(_size(part, source) for part in values.flatten())
    return int(values.nbytes)


def _read_table(catalog: Catalog, source: str) -> pa.Table:
    reader = scan_rows(catalog.load_table(source))
    batches = []
    size = 0
    for batch in reader:
        size += batch.nbytes
        _within_limit(source, size)
        batches.append(batch)
    return pa.Table.from_batches(batches, reader.schema)


def _within_limit(source: str, size: int) -> None:
    if size > MAX_LABEL_BYTES:
        raise LabelsRefused(
            f"{source} takes more than {MAX_LABEL_BYTES:,} bytes in memory, the limit for labels: leave columns out, "
            "split it, or load it into an Iceberg table and join there (--print-sql)"
        )


def key_values(values: pa.ChunkedArray, key: Key, source: str) -> pa.ChunkedArray:
    """Return the ids of a column in the key's type: int64 (also for 42.0), or text.

    Raises LabelsRefused naming the first row without a valid id: it is empty, has another type, or is a float beyond
    2^53, which stands for several integers.
    """
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    if key.type != "bigint":
        return _texts(values, key, source)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _whole_numbers(pc.utf8_trim_whitespace(values.cast(pa.string())), key, source)
    if pa.types.is_floating(kind):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
        _all_given(values, key, source)
        exact = pc.and_(
            pc.less(pc.abs(values), pa.scalar(float(EXACT_FLOAT))), pc.equal(pc.floor(values), values)
        )
        _refuse_floats(values, exact, key, source)
        return values.cast(pa.int64())
    _all_given(values, key, source)
    if not (pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        raise LabelsRefused(f"{source}: {key.name} must be an integer, not {kind}: convert it")
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise _no_number(values, _first_that_fails(values, pa.int64()), key, source) from error


def _texts(values: pa.ChunkedArray, key: Key, source: str) -> pa.ChunkedArray:
    """Return the ids of a text or UUID key as the typed events spell them; a number becomes its digits."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = pc.utf8_trim(values.cast(pa.string()), BLANKS)
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
    elif not pa.types.is_integer(kind):
        raise LabelsRefused(f"{source}: {key.name} must be a text, not {kind}: convert it")
    _all_given(values, key, source)
    # Labels often repeat the same few ids.
    unique = pc.unique(values)
    read: dict[object, int | str] = {}
    for given in unique.to_pylist():
        try:
            read[given] = read_key(key, given)
        except BadId as error:
            row = _first(pc.equal(values, pa.scalar(given, values.type)))
            raise LabelsRefused(f"{source} row {row + 1}: {error}: correct it") from None
    if pa.types.is_string(values.type) and all(given == found for given, found in read.items()):
        return values
    places = pc.index_in(values, unique)
    return pc.take(pa.array(list(read.values()), pa.string()), places)


def _whole_numbers(texts: pa.ChunkedArray, key: Key, source: str) -> pa.ChunkedArray:
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    _all_given(texts, key, source)
    whole = pc.match_substring_regex(texts, r"^-?[0-9]+$")
    if not pc.all(whole).as_py():
        floats = pc.match_substring_regex(texts, r"^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?$")
        readable = pc.or_(whole, floats)
        if not pc.all(readable).as_py():
            raise _no_number(texts, _first(pc.invert(readable)), key, source)
        numbers = pc.if_else(whole, pa.scalar(None, pa.string()), texts).cast(pa.float64())
        exact = pc.and_(
            pc.less(pc.abs(numbers), pa.scalar(float(EXACT_FLOAT))), pc.equal(pc.floor(numbers), numbers)
        )
        _refuse_floats(texts, pc.or_kleene(whole, exact), key, source)
        texts = pc.if_else(whole, texts, numbers.cast(pa.int64()).cast(pa.string()))
    try:
        return texts.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise _no_number(texts, _first_that_fails(texts, pa.int64()), key, source) from error


def _all_given(values: pa.ChunkedArray, key: Key, source: str) -> None:
    if values.null_count:
        raise LabelsRefused(f"{source} row {_first(pc.is_null(values)) + 1}: {key.name} is missing: fill it")


def _no_number(values: pa.ChunkedArray, row: int, key: Key, source: str) -> LabelsRefused:
    return LabelsRefused(
        f"{source} row {row + 1}: {key.name} must be an integer of 64 bits, it is {values[row].as_py()!r}: correct it"
    )


def _refuse_floats(values: pa.ChunkedArray, exact: pa.ChunkedArray, key: Key, source: str) -> None:
    if pc.all(exact).as_py():
        return
    row = _first(pc.invert(exact))
    if abs(float(values[row].as_py())) < EXACT_FLOAT:
        raise _no_number(values, row, key, source)
    raise LabelsRefused(
        f"{source} row {row + 1}: {key.name} {values[row].as_py()} is a float beyond 2^53, which may be several "
        "ids: write them as whole numbers"
    )


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
        f"{source}: label_time must be a timestamp with a zone or ISO 8601 text, not {kind}: convert it"
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
