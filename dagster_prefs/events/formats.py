"""Event messages, and the file formats from which they are read.

A message is the bytes that go into a raw table. A JSON line is its own message, byte for byte, valid or not:
the typed layer judges it and reports why it rejected a line. A CSV row becomes a JSON object whose values are
the cells' text, so that no digit of a price is lost.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dagster_prefs import textfiles
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.errors import PrefsError
from dagster_prefs.events import rees46
from dagster_prefs.events.fields import cell_text
from dagster_prefs.events.messages import Topic, topics_of
from dagster_prefs.textfiles import ROW_FAULTS, RowFault, csv_rows, without_terminator

ColumnMapping = Literal["auto", "rees46"]
TableKind = Literal["parquet", "arrow"]
Topics = Mapping[str, Topic]

# The number of lines to search for a record that identifies its topic.
SAMPLE_LINES = 1000
SAMPLE_BYTES = 4 * textfiles.MIB


class EventFileError(PrefsError):
    """A file cannot be read as events: it is missing, empty, damaged, or of an unknown format."""


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class FileFormat:
    """How to read a file: its topic, and for CSV its columns and mapping."""

    topic: Topic
    kind: Literal["json-lines", "csv"]
    columns: tuple[str, ...] = ()
    mapping: Literal["rees46"] | None = None


@dataclass(frozen=True)
class Record:
    """One record of a file: its first physical line (1-based) and its message, None for a blank line.

    `fault` gives the reason if a CSV row could not be read; its message then contains the original row.
    """

    line: int
    message: bytes | None
    fault: str | None = None


def check_file(path: Path) -> os.stat_result:
    """Return size and times of a readable, non-empty regular file. Raises EventFileError otherwise."""
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
    """Return the SHA-256 of the file's stored bytes, in hex. Raises EventFileError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EventFileError(f"{path} cannot be read ({error.strerror}): check the disk") from None


def table_kind(path: Path) -> TableKind | None:
    """Return the format of a file that holds a table of columns, None for every other file."""
    check_file(path)
    with path.open("rb") as stream:
        head = stream.read(8)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"FEA1"):
        raise EventFileError(
            f"{path} is Feather of version 1: write it as version 2, as Parquet, or as JSON lines"
        )
    # An Arrow stream begins with the length of its schema, after a marker.
    return "arrow" if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) else None


class LineReader(textfiles.LineReader):
    """The physical lines of a file of events. Iterating raises EventFileError."""

    refusal = EventFileError
    formats = "JSON lines or CSV in UTF-8, plain or gzip, or Parquet or Arrow IPC"
    again = "ingest it again"


def detect(
    path: Path, registry: Registry, topic: str | None = None, mapping: ColumnMapping | None = "auto"
) -> FileFormat:
    """Detect how to read `path` for this project, from its content, or else from its name.

    `mapping` is `auto` (a known foreign CSV format is recognised by its columns), `rees46` (the file must
    have these columns) or None (only the platform's own column names).

    Raises EventFileError or RegistryError naming what was found and what was expected.
    """
    check_file(path)
    topics = topics_of(registry)
    wanted = topics[registry.topic(topic).name] if topic is not None else None
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
            # Complete lines before the damage are still events; reading the file reports the damage again.
            if not head:
                raise
    if not head:
        raise EventFileError(f"{path} is empty: it only has blank lines")
    header = _header(head[0])
    if mapping == "rees46" or _is_header(header, topics):
        return _csv_format(path, header, topics, wanted, mapping)
    _refuse_json_over_lines(path, head)
    suffixes = {suffix.lower() for suffix in path.suffixes}
    looks_json = any(line.lstrip().startswith(b"{") for line in head)
    if looks_json or suffixes & {".json", ".jsonl", ".ndjson"}:
        return FileFormat(wanted or _topic_of_json(path, head, topics), "json-lines")
    if wanted is not None and ".csv" not in suffixes and len(header) < 2:
        return FileFormat(wanted, "json-lines")
    return _csv_format(path, header, topics, wanted, mapping)


def read_records(reader: LineReader, file_format: FileFormat) -> Iterator[Record]:
    """Yield the records of an open file in order, including blank lines, excluding a CSV header.

    A CSV row that does not fit its columns, or is not UTF-8, becomes a message of its original bytes. Raises
    EventFileError at damage, as LineReader does.
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
    topic, columns = file_format.topic, file_format.columns
    renamed = rees46.NAMES if file_format.mapping == "rees46" else {}
    texts = {field.name for field in topic.fields if field.type == "text" and not field.prose}
    text_columns = {at for at, name in enumerate(columns) if renamed.get(name, name) in texts}
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
            mapped = file_format.mapping == "rees46"
            message = rees46.message(columns, cells, topic) if mapped else _plain_message(columns, cells)
            yield Record(row.line, message)


def _faulty_message(raw: bytes, fault: RowFault) -> bytes:
    """Wrap an unreadable row in a message that names its fault; in base64 too if it is no clean text."""
    text = raw.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    message = {"malformed_row": fault, "row": text}
    if text.encode() != raw:
        message["row_base64"] = base64.b64encode(raw).decode()
    return _encode(message).encode()


def row_fault(document: dict[str, object]) -> str | None:
    """Return why a message is a CSV row that could not be read, None for every other message."""
    fault = document.get("malformed_row")
    return ROW_FAULTS.get(fault) if isinstance(fault, str) else None  # type: ignore[call-overload]


def _plain_message(columns: Sequence[str], cells: Sequence[str]) -> bytes:
    named = zip(columns, cells, strict=True)
    return _encode({name: cell for name, cell in named if cell != ""}).encode()


def _header(line: bytes) -> tuple[str, ...]:
    text = without_terminator(line).decode("utf-8", "replace")
    try:
        return tuple(name.strip() for name in next(csv.reader([text]), []))
    except csv.Error:
        return ()


def _is_header(names: Sequence[str], topics: Topics) -> bool:
    known = {name for topic in topics.values() for name in topic.names}
    if rees46.target(topics):
        known |= set(rees46.COLUMNS)
    return bool(names) and sum(name in known for name in names) * 2 >= len(names)


def _csv_format(
    path: Path, header: tuple[str, ...], topics: Topics, wanted: Topic | None, mapping: ColumnMapping | None
) -> FileFormat:
    names = set(header)
    found = f"it has {', '.join(header) or 'none'}"[:400]
    if len(names) < len(header):
        twice = sorted(name for name in names if header.count(name) > 1)
        raise EventFileError(f"{path} has the column {', '.join(twice)} twice: give each column its own name")
    shop = rees46.target(topics)
    if mapping == "rees46" and shop is None:
        raise EventFileError(
            f"the mapping rees46 makes messages of {rees46.TOPIC}, which this project does not declare: leave the "
            f"mapping out, and name the columns of {path} as the project's topics do"
        )
    if shop is not None and (mapping == "rees46" or (mapping == "auto" and names >= set(rees46.COLUMNS))):
        missing = [name for name in rees46.COLUMNS if name not in names]
        if missing:
            raise EventFileError(
                f"{path} lacks the REES46 columns {', '.join(missing)} ({found}): "
                "choose a file in that format, or leave the mapping out"
            )
        if wanted is not None and wanted.name != shop.name:
            raise EventFileError(
                f"{path} has the REES46 columns, which are {shop.name} and not {wanted.name}: "
                f"leave the topic out or name {shop.name}"
            )
        return FileFormat(shop, "csv", header, "rees46")
    mapped = f", or use the known mapping rees46 ({', '.join(rees46.COLUMNS)})" if shop else ""
    return FileFormat(topic_of_columns(path, header, topics, wanted, mapped), "csv", header)


def topic_of_columns(
    name: Path | str, columns: Sequence[str], topics: Topics, wanted: Topic | None, remedy: str
) -> Topic:
    """Return the topic whose messages have these columns: `wanted`, or the only one that fits.

    Raises EventFileError, which ends in `remedy`, if none or several do.
    """
    names = set(columns)
    found = f"it has {', '.join(columns) or 'none'}"[:400]
    if wanted is not None and wanted.required <= names:
        return wanted
    if wanted is None and (candidates := _matching(names, topics)):
        if len(candidates) > 1:
            raise _ambiguous(name, "columns", found, candidates)
        return candidates[0]
    nearest = wanted or max(topics.values(), key=lambda topic: _known(topic, names))
    missing = sorted(nearest.required - names)
    raise EventFileError(
        f"{name} lacks the columns {', '.join(missing)} of {nearest.name} ({found}): rename its columns to "
        f"{', '.join(nearest.names)}{remedy}"
    )


def _matching(names: AbstractSet[str], topics: Topics) -> list[Topic]:
    """Return the topics that a record with these keys must belong to, the most specific first.

    A record has all keys that its topic requires. Among the topics that fit, one is dropped in favour of
    another that requires all its keys and more, or else of another that knows more of the record's keys. A
    single topic in the result is certain.
    """
    # An item has none of the keys that only events require; otherwise a shop event without its id would pass
    # for an item.
    of_events = {name for topic in topics.values() if topic.time for name in topic.required}
    fitting = [
        topic
        for topic in topics.values()
        if topic.required <= names and (topic.time or not (names & of_events) - set(topic.names))
    ]
    specific = [topic for topic in fitting if not any(topic.required < other.required for other in fitting)]
    most = max((_known(topic, names) for topic in specific), default=0)
    return [topic for topic in specific if _known(topic, names) == most]


def _known(topic: Topic, names: AbstractSet[str]) -> int:
    return len(names & set(topic.names))


def _ambiguous(path: Path | str, what: str, found: str, candidates: Sequence[Topic]) -> EventFileError:
    *others, last = (topic.name for topic in candidates)
    return EventFileError(
        f"{path} may be of {', '.join(others)} or {last}, by its {what} ({found}): name the topic"
    )


def _refuse_json_over_lines(path: Path, head: Sequence[bytes]) -> None:
    """Raise EventFileError for a JSON array, or objects that span lines: each line would be rejected.

    The message contains a command that writes one object per line.
    """
    first = head[0].strip()
    if not first.startswith((b"{", b"[")):
        return
    # A file with complete objects on single lines is JSON lines, whatever else it contains.
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
    """Return the JSON value on a line, None if there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _topic_of_json(path: Path, head: Sequence[bytes], topics: Topics) -> Topic:
    first: str | None = None
    ambiguous: EventFileError | None = None
    for line in head:
        value = _json_value(line)
        if not isinstance(value, dict):
            continue
        keys = ", ".join(value)[:200] or "none"
        first = first or keys
        found = _matching(set(value), topics)
        if len(found) == 1:
            return found[0]
        if found and ambiguous is None:
            ambiguous = _ambiguous(path, "keys", f"a record has {keys}", found)
    if ambiguous is not None:
        raise ambiguous
    keys = f"the first record has the keys {first}" if first is not None else "no line is a JSON object"
    raise EventFileError(
        f"{path} does not identify its topic in its first {len(head)} lines ({keys}): name the topic, one of "
        + ", ".join(topics)
    )
