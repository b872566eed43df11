"""One subject's messages in the raw tables: find, count and redact them.

A redacted message keeps its place in its source, so that counts and positions do not change and neither a
file nor a Kafka partition is read again; none of its content remains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from dagster_prefs import ids
from dagster_prefs.declarations.names import QUERY_SUFFIX
from dagster_prefs.declarations.names import REDACTED as REDACTED
from dagster_prefs.declarations.registry import Entity, Registry, TopicDeclaration
from dagster_prefs.declarations.reserved import is_reserved, reserved_range
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.events.raw import RawStoreError, translated
from dagster_prefs.events.schema_registry import unframed

BATCH_ROWS = 500


class SubjectRefused(PrefsError):
    """The given subject is not one that can be erased."""


class AppendOnly(RawStoreError):
    """The engine does not change rows of this raw table."""


@dataclass(frozen=True)
class Subject:
    """The person whose data is erased: an erasable entity and the id in its first key column, as typed events spell it.

    The entity is the first one with that first key column: an erasure covers all of them.
    """

    entity: Entity
    id: str

    @classmethod
    def named(cls, registry: Registry, kind: str, given: str, *, command: str = "erase") -> Subject:
        """Return the subject with the id `given` of the entity called `kind`; `command` is what errors recommend.

        Raises SubjectRefused for an entity that is unknown or not erasable, an id that no event can have, and
        a canary.
        """
        erasable = erasable_kinds(registry)
        entity = registry.entities.get(kind)
        if entity is None or not entity.erasable:
            why = "is not erasable" if entity else "is not an entity of this project"
            kinds = " or ".join(f"`prefs {command} {name} ID`" for name in erasable)
            raise SubjectRefused(
                f"{excerpt(kind)} {why}: {f'use {kinds}' if kinds else 'the project declares no erasable entity'}"
            )
        key = entity.key
        try:
            value = ids.read_key(key, given)
        except ids.BadId as error:
            others = " or ".join(f"`prefs {command} {name} ID`" for name in erasable if name != kind)
            remedy = f"correct it{f', or use {others}' if others else ''}"
            raise SubjectRefused(f"{excerpt(given)} is not a {kind} ({error}): {remedy}") from None
        if is_reserved(key, value):
            raise SubjectRefused(
                f"{kind} {value} is a canary: ids {reserved_range(key)} belong to no person, and the probes need them: "
                f"name another {kind}"
            )
        return cls(registry.family(kind)[0], ids.key_text(key, value))

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"

    @property
    def kind(self) -> str:
        """The entity's name."""
        return self.entity.name

    @property
    def key(self) -> str:
        """The name of the field of a message, and of the column of a relation, that holds the id."""
        return self.entity.key.name

    @property
    def is_number(self) -> bool:
        """Whether the id is a number."""
        return self.entity.key.type == "bigint"

    @property
    def value(self) -> int | str:
        """The id in the type of the relations."""
        return int(self.id) if self.is_number else self.id

    def is_key_of(self, topic: TopicDeclaration) -> bool:
        """Return whether the topic's messages are about this kind of subject."""
        return self.key in topic.by_name


def erasable_kinds(registry: Registry) -> list[str]:
    """Return the names for subjects: for each first key column, the first of its erasable entities."""
    return list(
        dict.fromkeys(
            registry.family(entity.name)[0].name for entity in registry.entities.values() if entity.erasable
        )
    )


class Position(NamedTuple):
    """The position of a message in the raw table of its topic."""

    source: str
    partition: int
    offset: int


class RawMessages:
    """The raw messages of one subject in these topics, up to `until` by the engine's clock.

    Reads over one connection. Rejected messages count if they name the subject, even if unreadable: a value
    equal to the id, under the key's field name anywhere, or under a field that the topic does not declare.
    All methods raise RawStoreError.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        engine: EngineConfiguration,
        topics: Iterable[TopicDeclaration],
        subject: Subject,
        until: datetime,
    ) -> None:
        self._connection = connection
        self._topics = list(topics)
        self._engine = engine
        self._subject = subject
        self._until = until

    def newest_event(self) -> datetime | None:
        """Return the latest time of a valid event of the subject, UTC."""
        newest: datetime | None = None
        for topic in self._topics:
            if not self._subject.is_key_of(topic) or topic.time is None:
                continue
            row = self._ask(
                topic.parsed,
                "select max({time}) from {relation} where {key} = {id} and reason is null"
                " and arrived_at <= {until}",
                time=sql.Identifier(topic.time),
            )[0]
            newest = max((found for found in (newest, row[0]) if found is not None), default=None)
        return newest

    def find(self) -> dict[str, list[Position]]:
        """Find the subject's messages through parsed relations and raw bytes. Returns positions by table."""
        found: dict[str, list[Position]] = {}
        for topic in self._topics:
            own: list[tuple[Any, ...]] = []
            if self._subject.is_key_of(topic):
                own = self._ask(
                    topic.parsed,
                    "select source, source_partition, source_offset from {relation}"
                    " where {key} = {id} and arrived_at <= {until}",
                )
            positions = {Position(*row) for row in own} | self._seen(topic)
            if positions:
                found[topic.raw] = sorted(positions)
        return found

    def read(self, raw_table: str, positions: Sequence[Position]) -> Iterator[dict[str, Any]]:
        """Yield these messages with their positions and times, in order."""
        for (source, partition), offsets in _by_partition(positions).items():
            for start in range(0, len(offsets), BATCH_ROWS):
                query = sql.SQL(
                    'select source, source_partition, source_offset, kafka_timestamp, arrived_at, "data" from {}'
                    " where source = %s and source_partition = %s and source_offset in ({}) order by source_offset"
                ).format(
                    self._relation(raw_table),
                    sql.SQL(", ").join(map(sql.Literal, offsets[start : start + BATCH_ROWS])),
                )
                with (
                    translated(self._engine, raw_table),
                    self._connection.cursor(row_factory=dict_row) as cursor,
                ):
                    yield from cursor.execute(query, (source, partition)).fetchall()

    def count(self) -> dict[str, int]:
        """Count the subject's messages by raw table, from the raw bytes and the rejected payloads."""
        return {topic.raw: len(self._seen(topic)) for topic in self._topics}

    def redact(self, raw_table: str, positions: Sequence[Position]) -> int:
        """Replace the content of these messages, and return their number. Safe to repeat.

        Raises AppendOnly if the engine does not change rows of the raw table and only drops them after a
        retention time.
        """
        done = 0
        for (source, partition), offsets in _by_partition(positions).items():
            for start in range(0, len(offsets), BATCH_ROWS):
                done += self._redact(raw_table, source, partition, offsets[start : start + BATCH_ROWS])
        return done

    def _redact(self, raw_table: str, source: str, partition: int, offsets: Sequence[int]) -> int:
        # RisingWave looks rows up by a list of keys, and treats an unquoted `data` as a keyword.
        change = sql.SQL(
            'update {} set "data" = %s where source = %s and source_partition = %s and source_offset in ({})'
        ).format(self._relation(raw_table), sql.SQL(", ").join(map(sql.Literal, offsets)))
        with translated(self._engine, raw_table):
            try:
                return self._connection.execute(change, (REDACTED, source, partition)).rowcount
            except psycopg.Error as error:
                if "append-only" not in str(error):
                    raise
        raise AppendOnly(
            f"{raw_table} and what is parsed from it keep the subject's messages, because RisingWave changes no "
            "row of a table with PREFS_RAW_RETENTION_SECONDS"
        )

    def redact_read(self, raw_table: str, positions: Sequence[Position]) -> int:
        """Redact what the embedded engine has read from those messages that have left the raw table by retention.

        Returns their number. The parsed relation keeps them as it would if they had been redacted before.
        """
        (topic,) = (one for one in self._topics if one.raw == raw_table)
        empty = [
            "payload = %(text)s, reason = 'erased'",
            *(["canary = null"] if topic.entity else []),
            *(f"{{{place}}} = null" for place in range(len(topic.fields))),
        ]
        change = sql.SQL(
            "update {parsed} as t set " + ", ".join(empty) + " from"
            " unnest(%(s)s::text[], %(p)s::int[], %(o)s::bigint[]) as gone (s, p, o)"
            " where t.source = gone.s and t.source_partition = gone.p and t.source_offset = gone.o"
            " and not exists (select from {raw} as raw where raw.source = gone.s and raw.source_partition = gone.p"
            " and raw.source_offset = gone.o)"
        ).format(
            *(sql.Identifier(field.name) for field in topic.fields),
            parsed=self._relation(topic.parsed),
            raw=self._relation(raw_table),
        )
        sources, partitions, offsets = map(list, zip(*positions, strict=True))
        with translated(self._engine, topic.parsed):
            return self._connection.execute(
                change, {"text": REDACTED.decode(), "s": sources, "p": partitions, "o": offsets}
            ).rowcount

    def _seen(self, topic: TopicDeclaration) -> set[Position]:
        """Return the messages with the id in its own field, and rejected ones that name it elsewhere."""
        found = set(self._rejected(topic))
        if self._subject.is_key_of(topic):
            rows = self._ask(
                topic.raw,
                # Filtering by the bytes first is ten times as fast as the pattern alone.
                "select source, source_partition, source_offset, data from {relation} where arrived_at <= {until}"
                " and ({hints}) and encode(data, 'escape') ~ {pattern}",
                hints=sql.SQL(" or ").join(
                    sql.SQL("position({}::bytea in data) > 0").format(sql.Literal(form.encode()))
                    for form in _in_json(self._subject)
                ),
                pattern=sql.Literal(self._pattern()),
            )
            found |= {
                Position(source, partition, offset)
                for source, partition, offset, data in rows
                if not _of_another(self._subject, data)
            }
        return found

    def _rejected(self, topic: TopicDeclaration) -> Iterator[Position]:
        """Yield rejected messages that name the subject but could not be parsed as its events."""
        native = self._subject.is_key_of(topic)
        rows = self._ask(
            topic.parsed,
            "select source, source_partition, source_offset, payload from {relation}"
            " where reason is not null and reason <> 'erased' and arrived_at <= {until} and {keyless}"
            " and ({hints})",
            keyless=sql.SQL("{} is null").format(sql.Identifier(self._subject.key))
            if native
            else sql.SQL("true"),
            hints=sql.SQL(" or ").join(
                sql.SQL("strpos(payload, {}) > 0").format(sql.Literal(text))
                for text in spellings(self._subject)
            ),
        )
        for *position, payload in rows:
            if names(self._subject, payload, topic):
                yield Position(*position)

    def _pattern(self) -> str:
        # The spelling of encode(…, 'escape'): octal for everything beyond ASCII, a doubled backslash.
        forms = sorted({_escaped(text.encode()) for text in _in_json(self._subject)})
        either = "|".join(re.escape(form).replace("\\ ", " ") for form in forms)
        # If the id is a number, a quoted value may have leading zeros and a fraction of zeros, too. If it is a
        # text, only an unquoted number may have that fraction.
        zeros, tail = ("0*", "([.]0+)?") if self._subject.is_number else ("", "")
        blank = r"([ \t\r\n]|\\\\[trn])*"
        return (
            rf'"{self._subject.key}"[ \t\r\n]*:[ \t\r\n]*("{blank}{zeros}({either}){tail}{blank}"'
            rf"|{zeros}({either})([.]0+)?[ \t\r\n]*[,}}])"
        )

    def _ask(self, relation: str, query: str, **parts: sql.Composable) -> list[tuple[Any, ...]]:
        with translated(self._engine, relation):
            return self._connection.execute(
                sql.SQL(query).format(
                    relation=self._relation(relation),
                    key=sql.Identifier(self._subject.key),
                    id=sql.Literal(self._subject.value),
                    until=sql.SQL("{}::timestamptz").format(sql.Literal(self._until.isoformat())),
                    **parts,
                )
            ).fetchall()

    def _relation(self, name: str) -> sql.Identifier:
        return sql.Identifier(self._engine.schema, name)


def keyed_relations(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, subject: Subject
) -> dict[str, sql.Composed]:
    """Return every relation with the subject's key column, and the condition for its rows there."""
    rows = connection.execute(
        "select c.relname, t.typname from pg_catalog.pg_attribute a"
        " join pg_catalog.pg_class c on c.oid = a.attrelid"
        " join pg_catalog.pg_namespace n on n.oid = c.relnamespace"
        " join pg_catalog.pg_type t on t.oid = a.atttypid"
        " where n.nspname = %s and a.attname = %s and c.relkind in ('r', 'm', 'v')"
        # The query of a kept view holds nothing itself.
        " and right(c.relname, %s) <> %s order by c.relname",
        (engine.schema, subject.key, len(QUERY_SUFFIX), QUERY_SUFFIX),
    ).fetchall()
    return {
        name: sql.SQL("{} = {}").format(
            sql.Identifier(subject.key),
            sql.Literal(subject.value if kind in ("int8", "int4") else subject.id),
        )
        for name, kind in rows
    }


def _by_partition(positions: Sequence[Position]) -> dict[tuple[str, int], list[int]]:
    partitions: dict[tuple[str, int], list[int]] = {}
    for source, partition, offset in positions:
        partitions.setdefault((source, partition), []).append(offset)
    return partitions


def spellings(subject: Subject) -> list[str]:
    """Return the spellings of the id in a payload: plain, JSON-escaped, and as escaped non-text bytes."""
    forms = _in_json(subject)
    return list(dict.fromkeys([*forms, *(_escaped(form.encode()) for form in forms)]))


def _in_json(subject: Subject) -> list[str]:
    escaped = json.dumps(subject.id)[1:-1]
    forms = [subject.id, escaped, escaped.replace("/", "\\/")]
    if subject.entity.key.type == "uuid":
        forms.append(subject.id.upper())
    return list(dict.fromkeys(forms))


def _of_another(subject: Subject, message: bytes) -> bool:
    """Return whether the message belongs to another subject, and only mentions this one."""
    try:
        document = json.loads(unframed(message), parse_float=Decimal, parse_int=Decimal)
    except (ValueError, RecursionError):
        return False
    value = document.get(subject.key) if isinstance(document, dict) else None
    text = ids.id_text(value)
    return text is not None and not _same(subject, text)


def names(subject: Subject, payload: str, topic: TopicDeclaration) -> bool:
    """Return whether a rejected payload names the subject.

    A JSON payload does if a field called like the key has the id as its value, at any depth, or, in a topic
    of this kind of subject, any value outside the topic's own fields. Any other payload does if the id
    follows the name of the key, or, in a topic of this kind and without that name, if the id stands alone
    anywhere.
    """
    native = subject.is_key_of(topic)
    try:
        document = json.loads(payload, parse_float=Decimal, parse_int=Decimal)
    except (ValueError, RecursionError):
        return _text_names(subject, payload, native)
    own = set(topic.by_name) - {subject.key} if native else set()
    return _value_names(subject, document, own, anywhere=native)


def _value_names(subject: Subject, value: Any, skipped: set[str], *, anywhere: bool) -> bool:
    if isinstance(value, dict):
        return any(
            _value_names(subject, part, set(), anywhere=anywhere or _is_key(subject, name))
            for name, part in value.items()
            if name not in skipped
        )
    if isinstance(value, list):
        return any(_value_names(subject, part, set(), anywhere=anywhere) for part in value)
    if not anywhere or value is None or isinstance(value, bool):
        return False
    if isinstance(value, Decimal):
        return _same(subject, ids.id_text(value) or "")
    return _same(subject, value) or _alone(subject).search(value) is not None


def _text_names(subject: Subject, payload: str, native: bool) -> bool:
    payload = _text_of(payload)
    key = subject.key.replace("_", "[_ -]?")
    given = re.findall(rf"(?i){key}\\*[\"']?\s*[:=]\s*\\*[\"']?([^\s\"',}}\ufffd]*)", payload)
    if any(_same(subject, value) for value in given):
        return True
    if given and all(given):
        return False
    if given or native:
        return _alone(subject).search(payload) is not None
    return False


def _alone(subject: Subject) -> re.Pattern[str]:
    forms = "|".join(re.escape(form) for form in spellings(subject))
    return re.compile(rf"(?<![\w.-])(?:{forms})(?:\.0+)?(?![\w-]|\.\d)")


def _is_key(subject: Subject, name: str) -> bool:
    own = (subject.key, subject.key.removesuffix("_id"), subject.kind)
    return _letters(name) in map(_letters, own)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _same(subject: Subject, text: str) -> bool:
    text = text.strip(" \t\r\n")
    if not subject.is_number:
        return (text.lower() if subject.entity.key.type == "uuid" else text) in spellings(subject)
    try:
        return Decimal(text) == int(subject.id)
    except InvalidOperation:
        return False


def _text_of(payload: str) -> str:
    """Decode a payload that the engine shows as escaped bytes, as far as these are text."""
    octal = re.compile(r"(?:\\[0-3][0-7]{2})+")
    return octal.sub(
        lambda found: bytes(int(digits, 8) for digits in found[0][1:].split("\\")).decode(errors="replace"),
        payload,
    )


def _escaped(data: bytes) -> str:
    return "".join(
        f"\\{byte:03o}" if byte == 0 or byte > 127 else "\\\\" if byte == 0x5C else chr(byte) for byte in data
    )
