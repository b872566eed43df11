"""What an event message is, and how messages are read out of files.

A message is the bytes that go into a raw table. A JSON line is its own message, byte for byte, valid or
not: judging it is the typed layer's work, which says why it refused a line. A CSV row becomes a JSON
object whose values are the cells' text, so that no digit of a price is lost on the way.
"""

from __future__ import annotations

import base64
import csv
import difflib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Literal

from dagster_prefs import textfiles
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.fields import ID_BYTES, NAME_BYTES, Field, cell_text, parse_time, shift_time
from dagster_prefs.textfiles import ROW_FAULTS, RowFault, csv_rows, without_terminator

Mapping = Literal["auto", "rees46"]

# A later event time is refused by the typed layer.
FUTURE_TOLERANCE = timedelta(hours=24)
# How far to look for a record that tells its topic before giving up.
SAMPLE_LINES = 1000
SAMPLE_BYTES = 4 * textfiles.MIB


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
# An empty cell, and how pandas writes one where it is told to.
REES46_MISSING = frozenset({"", "NaN", "<NA>", "NaT"})

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
    """One record of a file: its first physical line (1-based) and its message, None where it is blank.

    `fault` says why a CSV row could not be read; its message then holds the row as it came.
    """

    line: int
    message: bytes | None
    fault: str | None = None


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


class LineReader(textfiles.LineReader):
    """The physical lines of a file of events; iterating raises EventFileError."""

    refusal = EventFileError
    formats = "JSON lines or CSV in UTF-8, plain or gzip"
    again = "ingest it again"


def detect(path: Path, topic: str | None = None, mapping: Mapping | None = "auto") -> FileFormat:
    """How to read `path`, from its content; its name only decides where the content does not.

    `mapping` is `auto` (a known foreign CSV format is recognised by its columns), `rees46` (the file
    must have these columns) or None (only our own column names).

    Raises EventFileError or UnknownTopic naming what was found and what was expected.
    """
    check_file(path)
    wanted = find_topic(topic) if topic is not None else None
    head: list[bytes] = []
    size = 0
    with LineReader(path) as reader:
        try:
            for _, line in reader:
                if line.strip():
                    head.append(line)
                size += len(line)
                if len(head) == SAMPLE_LINES or size >= SAMPLE_BYTES:
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
    _refuse_json_over_lines(path, head)
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
        yield Record(number, without_terminator(line) if line.strip() else None)


def _csv_records(lines: Iterator[tuple[int, bytes]], file_format: FileFormat) -> Iterator[Record]:
    for number, line in lines:
        if line.strip():
            break
        yield Record(number, None)
    to_message = _rees46_message if file_format.mapping == "rees46" else _plain_message
    columns = file_format.columns
    texts = {field.name for field in file_format.topic.declared if field.type == "text"} - PROSE
    text_columns = {at for at, name in enumerate(columns) if REES46_NAMES.get(name, name) in texts}
    for row in csv_rows(lines):
        if row.fault:
            yield Record(row.line, _faulty_message(row.raw, row.fault), ROW_FAULTS[row.fault])
        elif not row.cells:
            yield Record(row.line, None)
        elif len(row.cells) != len(columns):
            told = f"{ROW_FAULTS['cells']}: {len(row.cells)} cells, {len(columns)} columns"
            yield Record(row.line, _faulty_message(row.raw, "cells"), told)
        else:
            cells = [cell_text(cell) if at in text_columns else cell for at, cell in enumerate(row.cells)]
            yield Record(row.line, to_message(columns, cells))


def _faulty_message(raw: bytes, fault: RowFault) -> bytes:
    """A row that is no message, as one that says so: the row as text, and byte for byte where text cannot hold it."""
    text = raw.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    message = {"malformed_row": fault, "row": text}
    if text.encode() != raw:
        message["row_base64"] = base64.b64encode(raw).decode()
    return _encode(message).encode()


def row_fault(document: dict[str, object]) -> str | None:
    """Why a message is a CSV row that could not be read, None where it is none."""
    fault = document.get("malformed_row")
    return ROW_FAULTS.get(fault) if isinstance(fault, str) else None  # type: ignore[call-overload]


def _plain_message(columns: Sequence[str], cells: Sequence[str]) -> bytes:
    named = zip(columns, cells, strict=True)
    return _encode({name: cell for name, cell in named if cell != ""}).encode()


def _rees46_message(columns: Sequence[str], cells: Sequence[str]) -> bytes:
    message = {
        REES46_NAMES.get(name, name): cell
        for name, cell in zip(columns, cells, strict=True)
        if cell.strip() not in REES46_MISSING
    }
    if message.get("event_type", "").strip() == "cart":
        message["event_type"] = "add_to_cart"
    identity = _content_hash(message, TOPICS["user.events"])
    return _encode({"event_id": f"rees46-{identity[:32]}"} | message).encode()


def _content_hash(message: dict[str, str], topic: Topic) -> str:
    """A hash of what the topic declares, and of nothing else that a tool adds, reorders or formats in its own way."""
    values = [_canonical(message.get(name, ""), name == topic.time_field) for name in topic.fields]
    return hashlib.sha256(_encode(values).encode()).hexdigest()


def _canonical(cell: str, is_time: bool) -> str:
    """The one spelling of a value: 541312140.0 is 541312140, 33.20 is 33.2, a moment has one zone."""
    text = cell.strip()
    if not is_time:
        return cell_text(text)
    moment = parse_time(text)
    return moment.isoformat() if moment is not None else text


def _header(line: bytes) -> tuple[str, ...]:
    text = without_terminator(line).decode("utf-8", "replace")
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


def _refuse_json_over_lines(path: Path, head: Sequence[bytes]) -> None:
    """Refuse a JSON array, and objects that go over several lines, whose lines would be rejected one by one.

    Raises EventFileError with a command that writes one object on each line.
    """
    first = head[0].strip()
    if not first.startswith((b"{", b"[")):
        return
    # A file with objects on lines of their own is JSON lines, whatever else is in it.
    objects = any(isinstance(_json_value(line), dict) for line in head)
    alone = _json_value(first)
    if isinstance(alone, list):
        over_lines = not objects and (len(head) == 1 or any(isinstance(item, dict) for item in alone))
    elif alone is not None or len(head) == 1:
        over_lines = False
    elif _starts_with_json(b"".join(head)):
        over_lines = first.startswith(b"[") or not objects
    elif first.startswith(b"["):
        # The sample may end within the array.
        listed = sum(line.strip().startswith(b",") or line.strip().endswith(b",") for line in head)
        over_lines = 2 * listed >= len(head) or (first in (b"[", b"[{") and not objects)
    else:
        over_lines = first == b"{" and not objects
    if over_lines:
        what, each = (
            ("a JSON array", ".[]") if first.startswith(b"[") else ("JSON of several lines an object", ".")
        )
        raise EventFileError(
            f"{path} is {what}, and is read one line at a time: write one object on each line, "
            f"e.g. with `jq -c '{each}'`"
        )


def _starts_with_json(text: bytes) -> bool:
    try:
        json.JSONDecoder().raw_decode(text.decode("utf-8", "replace").lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def _json_value(line: bytes) -> object:
    """The JSON value on a line, None where there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _topic_of_json(path: Path, head: Sequence[bytes]) -> Topic:
    first: str | None = None
    for line in head:
        value = _json_value(line)
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
