"""What an event message is, and how messages are read out of files.

A message is the bytes that go into a raw table. A JSON line is its own message, byte for byte, valid or
not: judging it is the typed layer's work, which says why it refused a line. A CSV row becomes a JSON
object whose values are the cells' text, so that no digit of a price is lost on the way.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import os
import re
import stat
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Literal, cast

from dagster_prefs.errors import PrefsError
from dagster_prefs.events.fields import ID_BYTES, NAME_BYTES, Field, cell_text, parse_time, shift_time

Mapping = Literal["auto", "rees46"]

# Longer than any event, shorter than what would hurt a process of 1 GB.
MAX_LINE_BYTES = 8 * 1024 * 1024
# A stray quote must not swallow the rest of a file into one cell.
MAX_LINES_PER_ROW = 100
# A later event time is refused by the typed layer.
FUTURE_TOLERANCE = timedelta(hours=24)
# How far to look for a record that tells its topic before giving up.
SAMPLE_LINES = 1000

UTF8_BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
FOREIGN_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


class EventFileError(PrefsError):
    """A file cannot be read as events: it is missing, empty, damaged, or of an unknown shape."""


class UnknownTopic(PrefsError):
    """A topic was named that this platform does not have."""


@dataclass(frozen=True)
class Topic:
    """One kind of message: its fields, its raw table, and which field tells its time.

    `declared` is what the YAML of its parsed model declares; `time_field` is None where messages carry no time.
    """

    name: str
    raw_table: str
    declared: tuple[Field, ...]
    time_field: str | None

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The JSON keys."""
        return tuple(field.name for field in self.declared)

    @cached_property
    def required(self) -> frozenset[str]:
        """The keys without which no message of the topic is valid."""
        return frozenset(field.name for field in self.declared if not field.optional)

    def field(self, name: str) -> Field:
        """The field of this name, which must be one of the topic's."""
        return next(field for field in self.declared if field.name == name)

    def matches(self, names: set[str]) -> bool:
        """Whether a record with these keys is surely of this topic."""
        # An item has no event's key: a shop event without its id must not pass for an item.
        return self.required <= names and (self.time_field is not None or not names & EVENT_ONLY_FIELDS)


EVENT_ONLY_FIELDS = frozenset(
    {"event_id", "user_id", "viewer_id", "event_type", "session_id", "event_time", "event_ts"}
)

TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        Topic(
            "user.events",
            "raw_user_events",
            (
                Field("event_id", max_bytes=ID_BYTES),
                Field("user_id", max_bytes=ID_BYTES),
                Field("item_id", optional=True, max_bytes=ID_BYTES),
                Field("event_type"),
                Field("category", optional=True, max_bytes=NAME_BYTES),
                Field("brand", optional=True, max_bytes=NAME_BYTES),
                Field("price", "decimal", optional=True, scale=6, minimum=0),
                Field("session_id", optional=True, max_bytes=ID_BYTES),
                Field("event_time", "timestamptz"),
            ),
            "event_time",
        ),
        Topic(
            "view_events",
            "raw_view_events",
            (
                Field("event_id", max_bytes=ID_BYTES),
                Field("viewer_id", "bigint"),
                Field("content_id", optional=True, max_bytes=ID_BYTES),
                Field("genre", optional=True, max_bytes=NAME_BYTES),
                Field("watch_duration_sec", "int", optional=True, minimum=0),
                Field("completion_pct", "decimal", optional=True, scale=9, minimum=0, maximum=1),
                Field("watched_at", "timestamptz"),
            ),
            "watched_at",
        ),
        Topic(
            "content_interactions",
            "raw_content_interactions",
            (
                Field("event_id", max_bytes=ID_BYTES),
                Field("viewer_id", "bigint"),
                Field("event_type"),
                Field("event_ts", "timestamptz"),
            ),
            "event_ts",
        ),
        Topic(
            "items",
            "raw_items",
            (
                Field("item_id", max_bytes=ID_BYTES),
                Field("title", optional=True, max_bytes=NAME_BYTES),
                Field("category", optional=True, max_bytes=NAME_BYTES),
                Field("brand", optional=True, max_bytes=NAME_BYTES),
                Field("price", "decimal", optional=True, scale=6, minimum=0),
                Field("in_stock", "boolean", optional=True),
            ),
            None,
        ),
    )
}

# Text for people, which a number in a CSV file may be as it stands: there is a film called 2.0.
PROSE = frozenset({"title"})
REES46_COLUMNS = (
    "event_time", "event_type", "product_id", "category_id", "category_code", "brand", "price", "user_id",
    "user_session",
)  # fmt: skip
REES46_NAMES = {"product_id": "item_id", "category_code": "category", "user_session": "session_id"}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def find_topic(name: str) -> Topic:
    """The topic of this name. Raises UnknownTopic naming the topics there are."""
    try:
        return TOPICS[name]
    except KeyError:
        near = difflib.get_close_matches(name, TOPICS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnknownTopic(f"unknown topic {name!r}: {hint}topics are {', '.join(TOPICS)}") from None


@dataclass(frozen=True)
class FileFormat:
    """How a file is read: its topic, and for CSV its columns and mapping."""

    topic: Topic
    kind: Literal["json-lines", "csv"]
    columns: tuple[str, ...] = ()
    mapping: Literal["rees46"] | None = None


@dataclass(frozen=True)
class Record:
    """One record of a file: its first physical line (1-based) and its message, None where it is blank."""

    line: int
    message: bytes | None


def check_file(path: Path) -> os.stat_result:
    """Size and times of a regular, readable, non-empty file; raises EventFileError for anything else."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise EventFileError(f"{path} is a directory: name the files in it, one by one")
        if not stat.S_ISREG(found.st_mode):
            raise EventFileError(f"{path} is not a regular file: write its content to a file first")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise EventFileError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise EventFileError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if found.st_size == 0:
        raise EventFileError(f"{path} is empty: a file of events has at least one line")
    return found


def content_hash(path: Path) -> str:
    """SHA-256 of the file's bytes as stored, in hex; raises EventFileError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EventFileError(f"{path} cannot be read ({error.strerror}): check the disk") from None


class LineReader:
    """The physical lines of a plain or gzip file, with their terminators, in constant memory.

    Iterating raises EventFileError at damage, after every whole line before it was given;
    `bytes_read` is the position in the file on disk, for progress.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("rb")
        self._stream: IO[bytes] = self._file
        head = self._file.read(8)
        self._file.seek(0)
        for magic, name in FOREIGN_MAGIC.items():
            if head.startswith(magic):
                self._file.close()
                raise EventFileError(f"{path} is {name}: give JSON lines or CSV in UTF-8, plain or gzip")
        if head.startswith(GZIP_MAGIC):
            # Its own buffer hands out what it has before it reports damage; one more around it would not.
            self._stream = cast(IO[bytes], gzip.GzipFile(fileobj=self._file))

    @property
    def bytes_read(self) -> int:
        """Bytes of the file on disk that were consumed so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._file.close()

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            for number, line in enumerate(iter(partial(self._stream.readline, MAX_LINE_BYTES), b""), 1):
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise EventFileError(
                        f"{self.path}, line {number}: longer than {MAX_LINE_BYTES} bytes; no event is, "
                        "so put one JSON object or one CSV row on each line"
                    )
                # A byte order mark belongs to the file, not to its first message.
                yield number, line.removeprefix(UTF8_BOM) if number == 1 else line
        except EOFError:
            raise EventFileError(
                f"{self.path} is a truncated gzip file (its data ends after line {number}): "
                "get the whole file and ingest it again"
            ) from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise EventFileError(
                f"{self.path} is a damaged gzip file (after line {number}: {error}): "
                "get an intact copy and ingest it again"
            ) from None
        except OSError as error:
            raise EventFileError(
                f"{self.path} cannot be read after line {number} ({error.strerror}): check the disk"
            ) from None


def detect(path: Path, topic: str | None = None, mapping: Mapping | None = "auto") -> FileFormat:
    """How to read `path`, from its content; its name only decides where the content does not.

    `mapping` is `auto` (a known foreign CSV format is recognised by its columns), `rees46` (the file
    must have these columns) or None (only our own column names).

    Raises EventFileError or UnknownTopic naming what was found and what was expected.
    """
    check_file(path)
    wanted = find_topic(topic) if topic is not None else None
    head: list[bytes] = []
    with LineReader(path) as reader:
        try:
            for _, line in reader:
                if line.strip():
                    head.append(line)
                if len(head) == SAMPLE_LINES:
                    break
        except EventFileError:
            # Whole lines before the damage are still events; reading them will report it again.
            if not head:
                raise
    if not head:
        raise EventFileError(f"{path} is empty: it has blank lines only")
    header = _header(head[0])
    if mapping == "rees46" or _is_header(header):
        return _csv_format(path, header, wanted, mapping)
    suffixes = {suffix.lower() for suffix in path.suffixes}
    looks_json = any(line.lstrip().startswith(b"{") for line in head)
    if looks_json or suffixes & {".json", ".jsonl", ".ndjson"}:
        return FileFormat(wanted or _topic_of_json(path, head), "json-lines")
    if wanted is not None and ".csv" not in suffixes and len(header) < 2:
        return FileFormat(wanted, "json-lines")
    return _csv_format(path, header, wanted, mapping)


def read_records(reader: LineReader, file_format: FileFormat) -> Iterator[Record]:
    """The records of an open file in order, blank lines included, a CSV header left out.

    A CSV row that does not fit its columns, or is not UTF-8, is its own message: the original bytes.
    Raises EventFileError at damage, as LineReader does.
    """
    if file_format.kind == "csv":
        return _csv_records(iter(reader), file_format)
    return _json_records(iter(reader))


def _json_records(lines: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
    for number, line in lines:
        yield Record(number, _without_terminator(line) if line.strip() else None)


def _without_terminator(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


class _Runaway(Exception):
    """A quoted cell goes on for more lines than any real one."""


def _csv_records(lines: Iterator[tuple[int, bytes]], file_format: FileFormat) -> Iterator[Record]:
    for number, line in lines:
        if line.strip():
            break
        yield Record(number, None)
    to_message = _rees46_message if file_format.mapping == "rees46" else _plain_message
    columns = file_format.columns
    texts = {field.name for field in file_format.topic.declared if field.type == "text"} - PROSE
    text_columns = {at for at, name in enumerate(columns) if REES46_NAMES.get(name, name) in texts}
    again: deque[tuple[int, bytes]] = deque()
    taken: list[tuple[int, bytes]] = []

    def feed() -> Iterator[str]:
        while True:
            item = again.popleft() if again else next(lines, None)
            if item is None:
                return
            taken.append(item)
            if len(taken) > MAX_LINES_PER_ROW:
                raise _Runaway
            yield item[1].decode("utf-8", "surrogateescape")

    while True:
        try:
            for cells in csv.reader(feed(), strict=True):
                number, raw = taken[0]
                if len(taken) > 1:
                    raw = b"".join(line for _, line in taken)
                taken.clear()
                if not raw.strip():
                    yield Record(number, None)
                    continue
                raw = _without_terminator(raw)
                cells = [cell_text(cell) if at in text_columns else cell for at, cell in enumerate(cells)]
                try:
                    yield Record(number, to_message(columns, cells, raw))
                except ValueError:
                    yield Record(number, raw)
            return
        except (_Runaway, csv.Error):
            number, raw = taken[0]
            again.extendleft(reversed(taken[1:]))
            taken.clear()
            yield Record(number, _without_terminator(raw))


def _plain_message(columns: Sequence[str], cells: Sequence[str], _: bytes) -> bytes:
    named = zip(columns, cells, strict=True)
    return _encode({name: cell for name, cell in named if cell != ""}).encode()


def _rees46_message(columns: Sequence[str], cells: Sequence[str], raw: bytes) -> bytes:
    message = {"event_id": "rees46-" + hashlib.sha256(raw).hexdigest()[:32]}
    for name, cell in zip(columns, cells, strict=True):
        if cell != "":
            message[REES46_NAMES.get(name, name)] = cell
    if message.get("event_type") == "cart":
        message["event_type"] = "add_to_cart"
    return _encode(message).encode()


def _header(line: bytes) -> tuple[str, ...]:
    text = _without_terminator(line).decode("utf-8", "replace")
    try:
        return tuple(name.strip() for name in next(csv.reader([text]), []))
    except csv.Error:
        return ()


def _is_header(names: Sequence[str]) -> bool:
    known = {name for topic in TOPICS.values() for name in topic.fields} | set(REES46_COLUMNS)
    return bool(names) and sum(name in known for name in names) * 2 >= len(names)


def _csv_format(
    path: Path, header: tuple[str, ...], wanted: Topic | None, mapping: Mapping | None
) -> FileFormat:
    names = set(header)
    found = f"it has {', '.join(header) or 'none'}"[:400]
    if len(names) < len(header):
        twice = sorted(name for name in names if header.count(name) > 1)
        raise EventFileError(f"{path} has the column {', '.join(twice)} twice: give each column its own name")
    if mapping == "rees46" or (mapping == "auto" and names >= set(REES46_COLUMNS)):
        missing = [name for name in REES46_COLUMNS if name not in names]
        if missing:
            raise EventFileError(
                f"{path} lacks the REES46 columns {', '.join(missing)} ({found}): "
                "choose a file in that format, or leave the mapping out"
            )
        if wanted is not None and wanted.name != "user.events":
            raise EventFileError(
                f"{path} has the REES46 columns, which are user.events and not {wanted.name}: "
                "leave the topic out or name user.events"
            )
        return FileFormat(TOPICS["user.events"], "csv", header, "rees46")
    candidates = [topic for topic in ([wanted] if wanted else TOPICS.values()) if topic.required <= names]
    candidates = [topic for topic in candidates if wanted or topic.matches(names)]
    if candidates:
        return FileFormat(max(candidates, key=lambda topic: len(names & set(topic.fields))), "csv", header)
    nearest = wanted or max(TOPICS.values(), key=lambda topic: len(names & set(topic.fields)))
    missing = sorted(nearest.required - names)
    raise EventFileError(
        f"{path} lacks the columns {', '.join(missing)} of {nearest.name} ({found}): rename its columns to "
        f"{', '.join(nearest.fields)}, or use the known mapping rees46 ({', '.join(REES46_COLUMNS)})"
    )


def _topic_of_json(path: Path, head: Sequence[bytes]) -> Topic:
    first: str | None = None
    for line in head:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if not isinstance(value, dict):
            continue
        if first is None:
            first = ", ".join(value)[:200] or "none"
        for topic in TOPICS.values():
            if topic.matches(set(value)):
                return topic
    keys = f"the first record has the keys {first}" if first is not None else "no line is a JSON object"
    raise EventFileError(
        f"{path} does not show its topic in its first {len(head)} lines ({keys}): name the topic, one of "
        + ", ".join(TOPICS)
    )


def event_time(message: bytes, topic: Topic) -> datetime | None:
    """The event time in a message, in UTC; None where the topic has none or it cannot be read."""
    found = _time_text(message, topic)
    return parse_time(found) if found is not None else None


def shift_message(message: bytes, topic: Topic, seconds: int) -> bytes:
    """The message with its event time moved by whole seconds, every other byte as it was.

    Text becomes ISO 8601 with `Z`, a number stays one of its unit. A message whose time cannot be read, before or
    after the move, comes back unchanged.
    """
    text = _time_text(message, topic)
    moved = shift_time(text, seconds) if text is not None else None
    if moved is None or topic.time_field is None:
        return message
    start, end = value_span(message, topic.time_field)
    quoted = message[start : start + 1] == b'"'
    return message[:start] + (f'"{moved}"' if quoted else moved).encode() + message[end:]


def _time_text(message: bytes, topic: Topic) -> str | None:
    if topic.time_field is None:
        return None
    try:
        value = json.loads(message.decode(), parse_int=Decimal, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return topic.field(topic.time_field).text(value.get(topic.time_field))


_SPACE = re.compile(r"[ \t\r\n]*")
_SIMPLE = {
    topic.time_field: re.compile(rb'"%s"\s*:\s*("[^"\\]*"|[0-9]+)(?=[\s,}])' % topic.time_field.encode())
    for topic in TOPICS.values()
    if topic.time_field
}


def value_span(message: bytes, field: str) -> tuple[int, int]:
    """Where the value of a top-level key lies in a valid JSON object; the last one where it is repeated."""
    if message.count(b"{") == 1 and message.count(b'"%s"' % field.encode()) == 1:
        pattern = _SIMPLE.get(field)
        simple = pattern.search(message) if pattern else None
        if simple:
            return simple.span(1)
    text = message.decode()
    decoder = json.JSONDecoder()
    span = (0, 0)
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] == '"':
        name, at = decoder.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        _, at = decoder.raw_decode(text, start)
        if name == field:
            span = (start, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return len(text[: span[0]].encode()), len(text[: span[1]].encode())


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
