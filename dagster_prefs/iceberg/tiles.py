"""The engine's tiles: fingerprints, totals, and a day's rows as a stream of Arrow batches."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, cast

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from psycopg import sql
from psycopg.rows import scalar_row
from psycopg.types.string import ByteaBinaryLoader

from dagster_prefs.declarations.reserved import people_only
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.tables import ErasedSubject, TileTable

LINES_FETCHED = 10_000
# Large enough for the parser to spend its time on rows rather than on calls.
LINES_PARSED = 40_000
# Of 8 KB each: some 25,000 rows of a tile's usual width.
BLOCKS_READ = 400

FINGERPRINTS = "tile_fingerprints"
ERASED = "erased_subjects"

NULL = sql.Literal("\\N")
# The backslash comes first; otherwise it would escape the backslashes of the other escapes.
ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_ESCAPED = {escape: character for character, escape in ESCAPES.items()}
# The start of Arrow's error message: the number of the column, and that of the row within the parsed block.
_CONVERSION = re.compile(r"In CSV column #(\d+): (?:Row #\d+: )?(.*)")
_ESCAPE = re.compile(r"\\.")

_LINES = sql.SQL("select {line} from {tile} where {day} = {value} and {people}")
_LINES_OF_BLOCKS = sql.SQL("""
    select (
        select string_agg({line}, e'\\n')
        from {tile}
        where ctid >= format('(%s,0)', block)::tid and ctid < format('(%s,0)', block + {blocks})::tid
            and {day} = {value} and {people}
    )
    from generate_series(0, pg_relation_size({name}) / current_setting('block_size')::bigint, {blocks}) as block
""")


class TilesUnreadable(OfflineError):
    """The engine cannot deliver tiles."""


class DayUnreadable(TilesUnreadable):
    """The engine's tiles of one day cannot be exported; those of other days can."""


@dataclass(frozen=True)
class Fingerprint:
    """The engine's summary of a day of a tile; `content_hash` changes whenever a row does."""

    row_count: int
    metric_total: Decimal
    content_hash: Decimal
    last_event_at: datetime | None

    @property
    def token(self) -> str:
        """16 hexadecimal digits that differ if the day's content differs."""
        content = f"{self.row_count}|{_plain(self.metric_total)}|{_plain(self.content_hash)}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def properties(self) -> dict[str, str]:
        """Return the fingerprint as snapshot properties."""
        return {
            "prefs.fingerprint": self.token,
            "prefs.row-count": str(self.row_count),
            "prefs.metric-total": _plain(self.metric_total),
            "prefs.content-hash": _plain(self.content_hash),
            "prefs.last-event-at": self.last_event_at.isoformat() if self.last_event_at else "",
        }


class TileSnapshot:
    """One consistent snapshot of the engine: fingerprint, totals and rows of a day belong together."""

    def __init__(
        self, connection: psycopg.Connection[tuple[Any, ...]], engine: EngineConfiguration, spec: TileTable
    ) -> None:
        self._connection = connection
        self._schema = engine.schema
        self._by_blocks = engine.kind == "local"
        self._spec = spec

    def fingerprints(self) -> dict[date, Fingerprint]:
        """Return the fingerprint of every day that the engine holds.

        Raises TilesUnreadable if the fingerprints do not include the tile, because nothing of it would ever
        be exported.
        """
        query = sql.SQL(
            "select tile_date, row_count, metric_total, content_hash, last_event_at from {} where tile = %s"
        ).format(self._relation(FINGERPRINTS))
        rows = self._connection.execute(query, [self._spec.tile]).fetchall()
        if not rows and self._has_rows():
            raise TilesUnreadable(
                f"{FINGERPRINTS} has no row of {self._spec.tile}, which has rows: its model leaves the tile out, or "
                "is being refreshed; run `prefs generate` and `prefs apply`, then export again"
            )
        return {
            day: Fingerprint(int(count), Decimal(metric), Decimal(content), last)
            for day, count, metric, content, last in rows
            if count
        }

    def fingerprint(self, day: date) -> Fingerprint | None:
        """Return the fingerprint of one day, None if the engine has no rows of it."""
        query = sql.SQL(
            "select row_count, metric_total, content_hash, last_event_at from {} where tile = %s and "
            "tile_date = %s"
        ).format(self._relation(FINGERPRINTS))
        row = self._connection.execute(query, [self._spec.tile, day]).fetchone()
        if row is None or not row[0]:
            return None
        return Fingerprint(int(row[0]), Decimal(row[1]), Decimal(row[2]), row[3])

    def _has_rows(self) -> bool:
        query = sql.SQL("select 1 from {tile} where {people} limit 1").format(
            people=people_only(self._spec.entity.key), tile=self._relation(self._spec.tile)
        )
        return self._connection.execute(query).fetchone() is not None

    def totals(self, day: date) -> tuple[int, Mapping[str, Decimal]]:
        """Return the day's row count and, for each column with an exact sum, the sum from the engine."""
        query = sql.SQL("select count(*), {sums} from {tile} where {day} = %s and {people}").format(
            people=people_only(self._spec.entity.key),
            sums=sql.SQL(", ").join(
                sql.SQL("coalesce(sum({}), 0)").format(sql.Identifier(name)) for name in self._spec.totals
            ),
            tile=self._relation(self._spec.tile),
            day=sql.Identifier(self._spec.day),
        )
        row = self._connection.execute(query, [day]).fetchone()
        if row is None:
            raise TilesUnreadable(f"the engine gave no answer about {self._spec.tile} of {day}: run it again")
        return int(row[0]), {
            name: Decimal(value) for name, value in zip(self._spec.totals, row[1:], strict=True)
        }

    def erasures(self) -> tuple[int, datetime | None]:
        """Return the count of the tile's erased subjects and the latest erasure time, to detect a new one."""
        row = self._connection.execute(
            sql.SQL("select count(*), max(erased_at) from {} where subject_kind = %s").format(
                self._relation(ERASED)
            ),
            [self._spec.subject_kind],
        ).fetchone()
        return (int(row[0]), row[1]) if row else (0, None)

    def erased_rows(self, day: date) -> int:
        """Count the day's rows of erased subjects, which the next refresh of the views removes."""
        query = sql.SQL(
            "select count(*) from {tile} as t join ({erased}) as e on e.subject = t.{key}"
            " where t.{day} = %s and t.last_event_at <= e.erased_at"
        ).format(
            tile=self._relation(self._spec.tile),
            erased=self._erased(),
            key=sql.Identifier(self._spec.subject),
            day=sql.Identifier(self._spec.day),
        )
        row = self._connection.execute(query, [day]).fetchone()
        return int(row[0]) if row else 0

    def erased_subjects(self) -> list[ErasedSubject]:
        """Return the erased subjects of the tile's entity, with the time up to which rows are deleted."""
        rows = self._connection.execute(self._erased()).fetchall()
        key = self._spec.entity.key
        return [ErasedSubject(key, value, until) for value, until in rows if value is not None]

    def _erased(self) -> sql.Composed:
        """Return a query for the ids, typed as in the tile, and times of the entity's erased subjects."""
        subject = (
            "case when subject_id ~ '^-?[0-9]{{1,19}}$' then subject_id::bigint end"
            if self._spec.entity.key.type == "bigint"
            else "subject_id"
        )
        return sql.SQL("select " + subject + " as subject, erased_at from {} where subject_kind = {}").format(
            self._relation(ERASED), sql.Literal(self._spec.subject_kind)
        )

    def rows(self, day: date, schema: pa.Schema) -> Generator[pa.RecordBatch]:
        """Stream the day's rows without canaries, unordered, in Arrow batches of a few megabytes.

        Rows travel as lines of text, which Arrow parses: one value per row costs the client a third of what one per
        column does, and one value per run of blocks a tenth of that; RisingWave, whose rows have no place on a disk,
        sends one per row. It supports COPY only from 2.7 on, where it does not distinguish NULL from an empty string.
        The engine does not sort, because it would hold the day in memory next to the streams that it serves.
        """
        fields = [schema.field(column.name) for column in self._spec.columns if column.name != self._spec.day]
        query, at_once = (_LINES_OF_BLOCKS, 1) if self._by_blocks else (_LINES, LINES_PARSED)
        lines_of_day = query.format(
            line=sql.SQL("concat_ws({}, {})").format(
                sql.Literal("\t"), sql.SQL(", ").join(map(_as_text, fields))
            ),
            tile=self._relation(self._spec.tile),
            name=sql.Literal(self._relation(self._spec.tile).as_string(self._connection)),
            day=sql.Identifier(self._spec.day),
            value=sql.Literal(day),
            people=people_only(self._spec.entity.key),
            blocks=sql.Literal(BLOCKS_READ),
        )
        try:
            # Parsing does not hold the interpreter's lock, so it runs while the next lines are read.
            with (
                self._connection.cursor(row_factory=scalar_row) as cursor,
                closing(self._values(cursor, lines_of_day, at_once)) as values,
                ThreadPoolExecutor(1, "tiles") as parser,
            ):
                ahead: Future[pa.RecordBatch] | None = None
                lines = filter(None, values)
                while text := b"\n".join(itertools.islice(lines, at_once)):
                    parsed, ahead = ahead, parser.submit(self._parse, text, fields, day, schema)
                    if parsed:
                        yield parsed.result()
                if ahead:
                    yield ahead.result()
        except pa.ArrowInvalid as error:
            # The original exception is not chained, because its text may contain a person's row.
            raise DayUnreadable(self._defect(day, fields, error)) from None

    @staticmethod
    def _values(cursor: psycopg.Cursor[Any], query: sql.Composed, at_once: int) -> Generator[bytes | None]:
        """Stream a query's only column of text as the bytes that it is sent as."""
        for name in ("text", "varchar"):
            cursor.adapters.register_loader(name, ByteaBinaryLoader)
        size = min(LINES_FETCHED, at_once)
        return cast("Generator[bytes | None]", cursor.stream(query, binary=True, size=size))

    def _defect(self, day: date, fields: list[pa.Field], error: pa.ArrowInvalid) -> str:
        """Describe the rows of one day that failed to parse, and close the snapshot."""
        required = [field.name for field in fields if not field.nullable]
        self._connection.execute("rollback")
        counts = self._connection.execute(
            sql.SQL("select {missing} from {tile} where {day} = %s and {people}").format(
                people=people_only(self._spec.entity.key),
                missing=sql.SQL(", ").join(
                    sql.SQL("count(*) - count({})").format(sql.Identifier(name)) for name in required
                ),
                tile=self._relation(self._spec.tile),
                day=sql.Identifier(self._spec.day),
            ),
            [day],
        ).fetchone()
        missing = {name: count for name, count in zip(required, counts or (), strict=True) if count}
        if missing:
            what = ", ".join(f"{count} rows without {name}" for name, count in missing.items())
            what += ", which the contract requires"
        else:
            found = _CONVERSION.match(_first_line(error))
            where, reason = (
                (fields[int(found[1])].name, found[2]) if found else ("a column", _first_line(error))
            )
            what = f"a value of {where} that its training table cannot hold ({reason})"
        return f"{self._spec.tile} of {day} has {what}: correct the model, then export again"

    def _relation(self, name: str) -> sql.Identifier:
        return sql.Identifier(self._schema, name)

    def _parse(self, lines: bytes, fields: list[pa.Field], day: date, schema: pa.Schema) -> pa.RecordBatch:
        parsed = pa.csv.read_csv(
            pa.BufferReader(lines),
            read_options=pa.csv.ReadOptions(
                column_names=[field.name for field in fields], block_size=len(lines) + 1, use_threads=False
            ),
            parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False, escape_char=False),
            convert_options=pa.csv.ConvertOptions(
                column_types={field.name: field.type for field in fields},
                null_values=["\\N"],
                strings_can_be_null=True,
            ),
        ).combine_chunks()
        arrays = []
        for field in schema:
            if field.name == self._spec.day:
                arrays.append(pa.repeat(pa.scalar(day, pa.date32()), parsed.num_rows))
                continue
            values = parsed.column(field.name).chunk(0)
            arrays.append(_unescape(values) if pa.types.is_large_string(field.type) else values)
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


@contextmanager
def tile_snapshot(engine: EngineConfiguration, spec: TileTable) -> Iterator[TileSnapshot]:
    """Open one consistent, read-only snapshot of the engine.

    Raises TilesUnreadable if a relation is missing or the connection breaks, EngineUnavailable if the engine
    does not answer.
    """
    start = (
        "start transaction isolation level repeatable read read only"
        if engine.kind == "local"
        # A read-only transaction of RisingWave reads one fixed snapshot.
        else "start transaction read only"
    )
    with engine.connect() as connection:
        try:
            connection.execute(start)
            yield TileSnapshot(connection, engine, spec)
            connection.execute("commit")
        except psycopg.errors.UndefinedTable as error:
            raise TilesUnreadable(_missing(spec, error)) from error
        except psycopg.OperationalError as error:
            raise TilesUnreadable(
                f"the connection to the engine was lost while {spec.tile} was read "
                f"({_first_line(error)}): check that the "
                "engine runs, then run it again"
            ) from error
        except psycopg.Error as error:
            if "not found" in str(error):
                raise TilesUnreadable(_missing(spec, error)) from error
            raise TilesUnreadable(
                f"the engine refuses to read {spec.tile} ({_first_line(error)}): apply the models with `dbt build`"
            ) from error


def _missing(spec: TileTable, error: psycopg.Error) -> str:
    reason = _first_line(error)
    return (
        f"the engine lacks {spec.tile}, {FINGERPRINTS} or {ERASED} ({reason}): "
        "create the models with `dbt build` first"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _plain(value: Decimal) -> str:
    # The engines write the same number with different trailing zeros.
    return f"{value.normalize():f}"


def _as_text(field: pa.Field) -> sql.Composable:
    value: sql.Composable = sql.Identifier(field.name)
    if pa.types.is_large_string(field.type):
        for character, escape in ESCAPES.items():
            value = sql.SQL("replace({}, {}, {})").format(value, sql.Literal(character), sql.Literal(escape))
    # A NULL in a required column shortens the line, which then does not parse. Casts would take a fifth of
    # the engine's time, so they are only made where coalesce needs one.
    return sql.SQL("coalesce({}::text, {})").format(value, NULL) if field.nullable else value


def _unescape(values: pa.Array) -> pa.Array:
    if not pc.any(pc.match_substring(values, "\\")).as_py():
        return values
    return pa.array(
        [value and _ESCAPE.sub(lambda found: _ESCAPED[found[0]], value) for value in values.to_pylist()],
        values.type,
    )
