"""Write a training set to a Parquet or CSV file, or to an Iceberg table, as a whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.io.pyarrow import UnsupportedPyArrowTypeException
from pyiceberg.table import Table

from dagster_prefs.files import whole_file
from dagster_prefs.iceberg.catalog import OfflineError, ensure_namespace, translated
from dagster_prefs.iceberg.duck import quoted
from dagster_prefs.iceberg.replace import ChangedMeanwhile, replace_all
from dagster_prefs.iceberg.tables import PARQUET, TABLE_PROPERTIES, TRAINING_SET, arrow_schema
from dagster_prefs.training.labels import TIME

ROWS_PER_GROUP = 100_000
_INSTANT = pa.timestamp("us", tz="UTC")


class OutputRefused(OfflineError):
    """The training set cannot be written to this output, which is unchanged."""


def check_output(catalog: Catalog, output: str) -> None:
    """Reject early an output that cannot be written: another kind of file, a missing folder or namespace.

    `output` ends in `.parquet` or `.csv`, or is an Iceberg table, `namespace.table`. Raises OutputRefused.
    """
    if is_table(output):
        with translated(f"the Iceberg namespace of {output}"):
            # It is the user's, whatever its name, and no environment's.
            ensure_namespace(catalog, output.partition(".")[0], {})
        return
    if Path(output).suffix.lower() not in (".parquet", ".csv"):
        raise OutputRefused(
            f"{output} is neither a .parquet nor a .csv file nor an Iceberg table (namespace.table): name one of these"
        )
    if not Path(output).absolute().parent.is_dir():
        raise OutputRefused(f"the folder {Path(output).parent} of the training set does not exist: create it")


def output_within(folder: Path, output: str) -> str:
    """Return the output for `build_training_set`, with a file's path below `folder`, links resolved.

    Raises OutputRefused for a file outside the folder.
    """
    if is_table(output):
        return output
    target = (folder / output).resolve()
    if not target.is_relative_to(folder.resolve()) or target == folder.resolve():
        raise OutputRefused(
            f"{output} is outside {folder}, where training sets of runs started in Dagster are written: name a file "
            "below it, set PREFS_TRAINING_DIR, or use `prefs training-set`"
        )
    return str(target)


def write_output(
    session: duckdb.DuckDBPyConnection,
    columns: Mapping[str, str],
    catalog: Catalog,
    output: str,
    properties: Mapping[str, str],
    *,
    keep_formulas: bool = False,
) -> None:
    """Write the session's relation `result`, ordered by `point`, replacing the content of `output`.

    `columns` are the columns to write with their DuckDB types; `label_time` is microseconds since 1970 in the relation
    and an instant in the output. In CSV, lists are JSON text, and a text that a spreadsheet would read as a formula is
    prefixed with an apostrophe, unless `keep_formulas`. `properties` are added to the snapshot of an Iceberg table.

    Raises OutputRefused for an Iceberg table with other columns, and for a column whose type the output does not
    support; OfflineError for storage that fails.
    """
    try:
        if is_table(output):
            rows = _ordered(session, columns)
            replace_rows(_table(catalog, output, rows.schema), rows, properties)
            return
        is_csv = output.lower().endswith(".csv")
        with whole_file(Path(output)) as partial:
            rows = _as_csv(session, columns, keep_formulas) if is_csv else _ordered(session, columns)
            with (
                pa.csv.CSVWriter(partial, rows.schema)
                if is_csv
                else pq.ParquetWriter(partial, rows.schema, **PARQUET)
            ) as writer:
                for batch in rows:
                    writer.write_batch(batch)
    except (pa.ArrowException, UnsupportedPyArrowTypeException) as error:
        raise OutputRefused(
            f"{output} cannot hold every column of the labels ({str(error).splitlines()[0]}): convert that column, or "
            "write a Parquet file"
        ) from error


def replace_rows(table: Table, rows: Iterable[pa.RecordBatch], properties: Mapping[str, str]) -> None:
    """Replace all rows of a training set's table with `rows`, in one commit, whose snapshot gets `properties`.

    Raises OutputRefused if another writer has changed the table since it was loaded.
    """
    try:
        replace_all(table, rows, properties, kind=TRAINING_SET)
    except ChangedMeanwhile as error:
        raise OutputRefused(str(error)) from error


def is_table(output: str) -> bool:
    """Return whether an output is the name of an Iceberg table (`namespace.table`), and not of a file."""
    return (
        output.count(".") == 1
        and not set(output) & set("/\\")
        and not output.lower().endswith((".parquet", ".csv", ".json", ".txt"))
    )


# The characters that start a formula in some spreadsheet, after any apostrophes: such a text gets one more apostrophe,
# so that removing one restores it. A number is no formula, whatever its sign.
_FORMULA = "^'*[=+@\\t\\r\\n\uff1d\uff0b\uff0d\uff20-]"
_NUMBER = "[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?"


def _as_csv(
    session: duckdb.DuckDBPyConnection, columns: Mapping[str, str], keep_formulas: bool
) -> pa.RecordBatchReader:
    """Convert the rows to types that CSV can hold, and that a spreadsheet displays instead of computing."""
    chosen = []
    for name, kind in columns.items():
        if kind.startswith(("STRUCT", "MAP", "UNION", "BLOB")):
            raise OutputRefused(
                f"the labels' column {name} is {kind}, which CSV cannot represent: convert it, or write a Parquet file"
            )
        column, text = quoted(name), quoted(name)
        if name == TIME:
            text = f"strftime(make_timestamp({column}), '%Y-%m-%dT%H:%M:%S.%fZ')"
        elif kind == "VARCHAR[]":
            text = f"cast(to_json({column}) as varchar)"
        elif kind.endswith("[]"):
            # Decimals are written digit by digit, because JSON would write them as floats.
            text = f"'[' || array_to_string(cast({column} as varchar[]), ',') || ']'"
        elif kind == "VARCHAR" and not keep_formulas:
            text = (
                f"case when regexp_matches({column}, {_literal(_FORMULA)})"
                f" and not regexp_full_match({column}, {_literal(_NUMBER)}) then '''' || {column} else {column} end"
            )
        shown = f"'{name}" if not keep_formulas and re.match(_FORMULA, name) else name
        chosen.append(f"{text} as {quoted(shown)}")
    return _selected(session, chosen)


def _ordered(session: duckdb.DuckDBPyConnection, columns: Mapping[str, str]) -> pa.RecordBatchReader:
    rows = _selected(session, list(map(quoted, columns)))
    place = rows.schema.get_field_index(TIME)
    field = pa.field(TIME, _INSTANT)
    schema = rows.schema.set(place, field)
    return pa.RecordBatchReader.from_batches(
        schema, (batch.set_column(place, field, batch.column(place).cast(_INSTANT)) for batch in rows)
    )


def _selected(session: duckdb.DuckDBPyConnection, chosen: Sequence[str]) -> pa.RecordBatchReader:
    query = f"select {', '.join(chosen)} from result order by point"
    return session.sql(query).to_arrow_reader(ROWS_PER_GROUP)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _table(catalog: Catalog, output: str, schema: pa.Schema) -> Table:
    try:
        table = catalog.load_table(output)
    except NoSuchTableError:
        try:
            return catalog.create_table(output, schema, properties=TABLE_PROPERTIES)
        except ValueError as error:
            raise OutputRefused(
                f"the table {output} cannot be created ({error}): convert that column"
            ) from error
    held = {field.name: field.type for field in arrow_schema(table)}
    wanted: dict[str, Any] = {field.name: field.type for field in schema}
    if list(held) != list(wanted) or any(_plain(held[name]) != _plain(wanted[name]) for name in wanted):
        raise OutputRefused(
            f"the table {output} has other columns ({', '.join(held)}) than this training set "
            f"({', '.join(wanted)}): name another table"
        )
    return table


def _plain(kind: pa.DataType) -> str:
    """Return a type as text, without Arrow's irrelevant distinctions: sizes of offsets, names of list elements."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_plain(kind.value_type)}>"
    return str(kind).replace("large_", "")
