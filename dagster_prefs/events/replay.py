"""Export of rejected messages to a file, and replay of corrected ones.

A rejected message never changes: its correction is a new message, and `replayed_events` records that it was
sent. Where this platform writes the raw tables, the new message has the same partition and offset in the
source `replay:<source>`, so that no interruption or repetition can store it twice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from psycopg import sql

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.formats import (
    EventFileError,
    LineReader,
    check_file,
)
from dagster_prefs.events.ingest import Delivery
from dagster_prefs.events.messages import Topic, topics_of, value_span
from dagster_prefs.events.raw import Place, RawMessage, RawStore, translated
from dagster_prefs.events.rejected import RELATION, stream_rejected
from dagster_prefs.events.schema_registry import UNDECODED
from dagster_prefs.events.validity import ERASED, rejection_reason
from dagster_prefs.files import whole_file

BATCH_SIZE = 1_000
SOURCE_PREFIX = "replay:"
KEYS = ("topic", "source", "partition", "offset", "payload")


class ReplayError(PrefsError):
    """A file of corrections cannot be sent, or rejected messages cannot be written to a file.

    `problems` are (line, reason) of every line that prevents it.
    """

    def __init__(self, message: str, problems: Sequence[tuple[int, str]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


@dataclass(frozen=True)
class ReplayReport:
    """The outcome of a replay: messages sent, sent by an earlier replay, and skipped with the reason."""

    sent: int
    already_replayed: int
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Correction:
    line: int
    topic: Topic
    place: Place
    message: bytes


def export_rejected(
    connection: EngineConfiguration, path: Path, topic: str | None = None, reason: str | None = None
) -> int:
    """Write the open rejected messages to a new JSON-lines file, and return their number.

    Each line has topic, source, partition, offset, reason and payload. The payload is the message itself,
    character for character, if that is a JSON object on one line, else its text as a JSON string. Only the
    owner may read the file. Raises ReplayError if the file exists or cannot be written, else as
    `stream_rejected`.
    """
    taken = ReplayError(f"{path} exists and may contain corrections: name another file")
    if os.path.lexists(path):
        raise taken
    written = 0
    try:
        with whole_file(path, replace=False) as file:
            for event in stream_rejected(connection, topic, reason):
                head = json.dumps(
                    {name: getattr(event, name) for name in (*KEYS[:4], "reason")}, ensure_ascii=False
                )
                file.write(f'{head[:-1]}, "payload": {_embedded(event.payload)}}}\n'.encode())
                written += 1
    except FileExistsError:
        raise taken from None
    except OSError as error:
        raise ReplayError(f"{path} cannot be written ({error.strerror}): choose another folder") from None
    return written


def replay_file(
    connection: EngineConfiguration,
    registry: Registry,
    path: Path,
    *,
    now: datetime,
    skip_invalid: bool = False,
    deliver: Delivery | None = None,
) -> ReplayReport:
    """Send the corrected payloads of an exported file as new messages of their topics.

    Every line is judged as if it arrived `now` (UTC) before the first one is sent. Lines that were replayed
    before are skipped, so that the same file can be sent again after an interruption. `deliver` sends to
    Kafka, as in `ingest_file`.

    Raises ReplayError with every line that is still invalid or is no rejected message, without sending
    anything; with `skip_invalid` those lines are skipped instead. Raises EventFileError, EngineUnavailable,
    RawStoreError.
    """
    before = check_file(path)
    problems: list[tuple[int, str]] = []
    lines = sent = already = 0
    with RawStore(connection) as store:
        for batch, broken in _batches(path, registry):
            judged, _ = _judge(connection, batch, now)
            problems += sorted([*broken, *judged.items()])
            lines += len(batch) + len(broken)
        if problems and not skip_invalid:
            raise ReplayError(
                f"{len(problems)} of {lines} lines of {path} cannot be replayed, and nothing was sent: "
                "correct them, or skip them with --skip-invalid",
                problems,
            )
        after = check_file(path)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise EventFileError(
                f"{path} changed while it was read: let its writer finish and replay it again"
            )
        for batch, _ in _batches(path, registry):
            judged, replayed = _judge(connection, batch, now)
            fresh = [c for c in batch if c.line not in judged and (c.topic.name, c.place) not in replayed]
            _send(store, fresh, now, deliver)
            sent += len(fresh)
            already += len(batch) - len(fresh) - len(judged)
    return ReplayReport(sent, already, dict(Counter(why for _, why in problems)))


def replay_unchanged(
    connection: EngineConfiguration,
    registry: Registry,
    topic: str | None = None,
    reason: str | None = None,
    *,
    now: datetime,
    deliver: Delivery | None = None,
    decode: Callable[[Topic, bytes], bytes] = lambda topic, message: message,
) -> ReplayReport:
    """Send unchanged the open rejected messages that are valid if they arrive `now` (UTC).

    `decode` returns what is stored of a topic's message from Kafka, for one that could not be decoded when it was read.
    Raises as `stream_rejected` and `replay_file`.
    """
    topics = topics_of(registry)
    left_out: Counter[str] = Counter()
    sent = 0

    def valid() -> Iterator[_Correction]:
        for event in stream_rejected(connection, topic, reason):
            found = topics[registry.topic(event.topic).name]
            place = Place(event.source, event.partition, event.offset)
            message = (
                decode(found, store.data(found, place))
                if event.reason == UNDECODED
                else event.payload.encode()
            )
            why = rejection_reason(message, found, now)
            if why is None:
                yield _Correction(0, found, place, message)
            else:
                left_out[why] += 1

    with RawStore(connection) as store:
        corrections = valid()
        while batch := list(islice(corrections, BATCH_SIZE)):
            _send(store, batch, now, deliver)
            sent += len(batch)
    return ReplayReport(sent, 0, dict(left_out))


def _send(store: RawStore, batch: list[_Correction], now: datetime, deliver: Delivery | None) -> None:
    """Send a batch, then record it: an interruption in between repeats messages, but loses none."""
    ordered = sorted(batch, key=lambda correction: (correction.topic.name, correction.place))
    for (_, source), group in groupby(ordered, key=lambda c: (c.topic.name, c.place.source)):
        corrections = list(group)
        topic = corrections[0].topic
        messages = [RawMessage(c.place.partition, c.place.offset, c.message) for c in corrections]
        if deliver is None:
            store.write(topic, SOURCE_PREFIX + source, messages)
        else:
            deliver(topic, messages)
        store.remember_replayed(topic, [c.place for c in corrections], now)


def _judge(
    connection: EngineConfiguration, batch: list[_Correction], now: datetime
) -> tuple[dict[int, str], set[tuple[str, Place]]]:
    """Return why lines cannot be sent (line → reason), and which of the batch were replayed before."""
    rejected, replayed = _known(connection, batch)
    problems = {}
    for correction in batch:
        key = (correction.topic.name, correction.place)
        if key in replayed:
            continue
        reason = rejected.get(key)
        if reason is None:
            source, partition, offset = correction.place
            problems[correction.line] = (
                f"no message of {correction.topic.name} at {source} {partition}/{offset} was rejected: "
                "keep topic, source, partition and offset as they were exported"
            )
        elif reason == ERASED:
            problems[correction.line] = "its subject was erased after the export: remove the line"
        elif why := rejection_reason(correction.message, correction.topic, now):
            problems[correction.line] = why
    return problems, replayed


def _known(
    connection: EngineConfiguration, batch: list[_Correction]
) -> tuple[dict[tuple[str, Place], str], set[tuple[str, Place]]]:
    """Return the reasons with which messages of the batch were rejected, and which were replayed before."""
    values = [
        sorted({correction.place.source for correction in batch}),
        sorted({correction.place.offset for correction in batch}),
    ]

    def at_these_places(columns: str, relation: str, offset: str) -> list[tuple[Any, ...]]:
        query = sql.SQL("select {} from {} where source = any(%s::text[]) and {} = any(%s::bigint[])").format(
            sql.SQL(columns),
            sql.Identifier(connection.schema, relation),
            sql.Identifier(offset),
        )
        with translated(connection, relation):
            return session.execute(query, values).fetchall()

    with connection.connect() as session:
        rejected = at_these_places('topic, source, "partition", "offset", reason', RELATION, "offset")
        replayed = at_these_places(
            "topic, source, source_partition, source_offset", "replayed_events", "source_offset"
        )
    return (
        {(topic, Place(*place)): reason for topic, *place, reason in rejected},
        {(topic, Place(*place)) for topic, *place in replayed},
    )


def _batches(path: Path, registry: Registry) -> Iterator[tuple[list[_Correction], list[tuple[int, str]]]]:
    """Yield the corrections of a file in order, with the invalid lines and their reasons."""
    seen: dict[tuple[str, Place], int] = {}
    batch: list[_Correction] = []
    broken: list[tuple[int, str]] = []
    topics = topics_of(registry)
    with LineReader(path) as reader:
        for number, line in reader:
            if not line.strip():
                continue
            found = _read(number, line, registry, topics)
            if isinstance(found, str):
                broken.append((number, found))
                continue
            first = seen.setdefault((found.topic.name, found.place), number)
            if first != number:
                broken.append((number, f"the same message as line {first}: keep one of them"))
                continue
            batch.append(found)
            if len(batch) >= BATCH_SIZE:
                yield batch, broken
                batch, broken = [], []
    yield batch, broken


def _read(number: int, line: bytes, registry: Registry, topics: Mapping[str, Topic]) -> _Correction | str:
    """Return the correction on a line, or the reason why there is none."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error}): keep one JSON object on the line"
    missing = [name for name in KEYS if not isinstance(value, dict) or name not in value]
    if missing:
        return f"lacks {', '.join(missing)}: keep the keys of the exported line"
    if not isinstance(value["source"], str) or not all(
        isinstance(value[name], int) and not isinstance(value[name], bool) and 0 <= value[name] < limit
        for name, limit in (("partition", 2**31), ("offset", 2**63))
    ):
        return "its source, partition or offset has another type: keep them as they were exported"
    try:
        topic = topics[registry.topic(str(value["topic"])).name]
    except PrefsError as error:
        return str(error)
    payload = value["payload"]
    if isinstance(payload, str):
        # Half of a surrogate pair is kept, so that the typed layer's rules judge the message.
        message = payload.encode("utf-8", "surrogatepass")
    else:
        start, end = value_span(line, "payload")
        message = line[start:end]
    return _Correction(number, topic, Place(value["source"], value["partition"], value["offset"]), message)


def _embedded(payload: str) -> str:
    """Return the message as a JSON value that parses back to exactly this text."""
    try:
        if payload.startswith("{") and not set(payload) & {"\n", "\r"} and payload.endswith("}"):
            json.loads(payload)
            return payload
    except (ValueError, RecursionError):
        pass
    return json.dumps(payload, ensure_ascii=False)
