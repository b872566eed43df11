"""Check the topics of a project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from dagster_prefs.declarations.findings import EXAMPLES, NAME, Findings, did_you_mean, is_whole, plain
from dagster_prefs.declarations.names import kafka_feed, parsed_view, raw_sink, raw_table
from dagster_prefs.declarations.personal import PII
from dagster_prefs.declarations.read import ColumnYaml, ModelYaml, as_map
from dagster_prefs.declarations.registry import (
    Entity,
    FieldDeclaration,
    FieldType,
    MessageFormat,
    TopicDeclaration,
    uuid_keys,
)

TOPIC_KEYS = ("kafka_topic", "format", "identity", "keep", "entity", "time", "freshness")
FIELD_META = (
    "optional",
    "max_bytes",
    "scale",
    "min",
    "max",
    "accepted",
    "accepted_from",
    "default",
    "prose",
    PII,
)
# Columns of every parsed relation, and names that its SQL uses.
RESERVED_FIELDS = frozenset(
    {
        "source",
        "source_partition",
        "source_offset",
        "kafka_timestamp",
        "arrived_at",
        "payload",
        "reason",
        "canary",
    }
    | {"data", "j", "verdict", "delivery", "version"}
)
ID_BYTES, NAME_BYTES = 256, 1024
# A row of a PostgreSQL index holds 2,704 bytes, a partition key of DynamoDB 2,048.
INDEX_BYTES, PARTITION_KEY_BYTES = 2_704, 2_048
MAX_MESSAGE_BYTES = 1_048_576
DIGITS = 28
DEFAULT_SCALE = 6

_KAFKA_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


@dataclass(frozen=True)
class Topic:
    """A topic with the parts that only its SQL needs: its file, and details of some fields.

    `accepted_from` maps a field to the variable whose names it accepts, `defaults` a field to the SQL that
    the typed relation uses if a message omits it. `uuids` are fields whose text is a UUID. `writes_indexes`
    is False if the YAML declares indexes itself.
    """

    declared: TopicDeclaration
    file: str
    accepted_from: Mapping[str, str]
    defaults: Mapping[str, str]
    uuids: frozenset[str]
    writes_indexes: bool
    freshness: Mapping[str, Any]


def check_topic(findings: Findings, model: ModelYaml) -> Topic | None:
    """Return the topic that a model's YAML declares; None, with its problems noted, if it is invalid."""
    given, example = as_map(model.meta["topic"], model.line), EXAMPLES["topic"]
    before = len(findings.problems)
    findings.known(model.file, given, TOPIC_KEYS, f"{model.name}: meta.topic", example)
    if file := findings.project.sql_file(model.name):
        findings.say(
            model.file,
            given.line,
            f"{model.name}: the SQL of a topic's typed model is generated, and {file} is written by hand: "
            "remove it, or rename the topic's model",
            example,
        )
    place = f"{model.file}:{model.line}"
    findings.claim(raw_table(model.name), place)
    findings.claim(kafka_feed(model.name), place)
    findings.claim(raw_sink(model.name), place)
    findings.claim(parsed_view(model.name), place, kept=True, model=model.name)
    name = given.get("kafka_topic", model.name)
    if not _KAFKA_TOPIC.fullmatch(str(name)):
        findings.say(
            model.file,
            given.at("kafka_topic"),
            f"{model.name}: {name!r} is not the name of a Kafka topic: use letters, digits, `.`, `_` and `-`",
            example,
        )
    keep = given.get("keep", "first")
    if keep not in ("first", "last"):
        findings.say(
            model.file,
            given.at("keep"),
            f"{model.name}: keep must be `first` (the first delivery of an event counts) or `last` (reference "
            f"data: the last message counts), not {keep!r}",
            "keep: last",
        )
    message_format = given.get("format", "json")
    if message_format not in get_args(MessageFormat):
        findings.say(
            model.file,
            given.at("format"),
            f"{model.name}: format must be `json`, or in Confluent's wire format `json_schema` or `avro`, not "
            f"{message_format!r}",
            "format: json_schema",
        )
    identity = findings.column(model, given, "identity", ("text",), example)
    entity: Entity | None = None
    time: str | None = None
    if keep == "last":
        for extra in ("entity", "time"):
            if extra in given:
                findings.say(
                    model.file,
                    given.at(extra),
                    f"{model.name}: keep: last declares reference data, which cannot have {extra}",
                    f"topic: {{ kafka_topic: {name}, identity: {identity}, keep: last }}",
                )
    else:
        entity = findings.entity(model, given, "topic")
        time = findings.column(model, given, "time", ("timestamptz",), example)
        if entity:
            findings.keys(model, entity, entity.keys)
    freshness = findings.freshness(model, given, example)
    keys = set(entity.key_names if entity else ())
    required = {name for name in (identity, time, *keys) if name}
    fields = [
        _field(findings, model, column, required, {identity, *keys}) for column in model.columns.values()
    ]
    if len(findings.problems) > before:
        return None
    return Topic(
        declared=TopicDeclaration(
            name=str(name),
            relation=model.name,
            raw=raw_table(model.name),
            parsed=parsed_view(model.name),
            identity=str(identity),
            keep=keep,
            entity=entity.name if entity else None,
            time=time,
            fields=tuple(field for field in fields if field),
            format=message_format,
        ),
        file=model.file,
        accepted_from={
            column.name: str(column.meta["accepted_from"])
            for column in model.columns.values()
            if "accepted_from" in column.meta
        },
        defaults={
            column.name: _literal(column.meta["default"])
            for column in model.columns.values()
            if "default" in column.meta
        },
        uuids=frozenset(uuid_keys(findings.entities, entity) & model.columns.keys()),
        writes_indexes="indexes" not in model.config,
        freshness=freshness,
    )


def _field(
    findings: Findings, model: ModelYaml, column: ColumnYaml, required: set[str], ids: set[str | None]
) -> FieldDeclaration | None:
    meta, name, kind = column.meta, column.name, column.type
    place = f"{model.name}.{name}"
    before = len(findings.problems)

    def wrong(key: str, what: str, example: str) -> None:
        findings.say(model.file, meta.at(key), f"{place}: {what}", example)

    findings.known(
        model.file,
        meta,
        FIELD_META,
        f"{place}: meta",
        "config: { meta: { optional: true, max_bytes: 256 } }",
    )
    if name in RESERVED_FIELDS or not NAME.fullmatch(name):
        findings.say(
            model.file,
            column.line,
            f"{place}: the name is {'used by the platform' if name in RESERVED_FIELDS else 'none in lower case'}: "
            "use another",
            f"- {{ name: {model.name}_{_slug(name)}, data_type: {kind} }}",
        )
    if name.endswith("_text") and name.removesuffix("_text") in model.columns:
        findings.say(
            model.file,
            column.line,
            f"{place}: the SQL that reads {name.removesuffix('_text')} uses this name: use another",
            f"- {{ name: {name}_value, data_type: {kind} }}",
        )
    if kind not in get_args(FieldType):
        findings.say(
            model.file,
            column.line,
            f"the type of {place} must be one of {', '.join(get_args(FieldType))}, not {kind or 'missing'}",
            f"- {{ name: {name}, data_type: text }}",
        )
        return None
    numeric = kind in ("int", "bigint", "decimal")
    for key in ("optional", "prose"):
        if not isinstance(meta.get(key, False), bool):
            wrong(key, f"{key} must be true or false, not {meta[key]!r}", f"{key}: true")
    if meta.get("optional") and name in required:
        wrong(
            "optional",
            "the identity, the key and the time of an event cannot be optional",
            f"- {{ name: {name}, data_type: {kind} }}",
        )
    for key, kinds in (
        ("max_bytes", ("text",)),
        ("scale", ("decimal",)),
        ("accepted", ("text",)),
        ("accepted_from", ("text",)),
    ):
        if key in meta and kind not in kinds:
            wrong(
                key,
                f"{key} is only for {' and '.join(kinds)}, and this column is {kind}",
                f"data_type: {kinds[0]}",
            )
    for key in ("min", "max"):
        if key in meta and not numeric:
            wrong(key, f"{key} is only for numbers, and this column is {kind}", "data_type: int")
        elif key in meta and not is_whole(meta[key]):
            wrong(key, f"{key} must be a whole number, not {meta[key]!r}", f"{key}: 0")
    low: Any = meta.get("min")
    high: Any = meta.get("max")
    if high is not None and low is None:
        wrong("max", "max needs min: the reason of a rejected event names both", f"min: 0, max: {high}")
    elif low is not None and high is None and low != 0:
        wrong(
            "min",
            f"min: {low} needs max: without max only `min: 0` is allowed, which rejects negative numbers",
            "min: 0",
        )
    elif is_whole(low) and is_whole(high) and low > high:
        wrong("min", f"min {low} is above max {high}", f"min: {high}, max: {low}")
    limit: Any = meta.get("max_bytes")
    most = min(INDEX_BYTES, PARTITION_KEY_BYTES) if name in ids else MAX_MESSAGE_BYTES
    if limit is not None and (not is_whole(limit) or not 1 <= limit <= most):
        wrong(
            "max_bytes",
            f"max_bytes must be from 1 to {most}, not {limit!r}"
            + (": an index and a key of DynamoDB cannot hold more" if name in ids else ""),
            f"max_bytes: {ID_BYTES if name in ids else NAME_BYTES}",
        )
    scale: Any = meta.get("scale", DEFAULT_SCALE if kind == "decimal" else None)
    if kind == "decimal" and (not is_whole(scale) or not 0 <= scale < DIGITS):
        wrong(
            "scale",
            f"scale is the number of decimals and must be from 0 to {DIGITS - 1}, not {scale!r}",
            "scale: 6",
        )
    accepted = _accepted(findings, model, column)
    if "default" in meta and not meta.get("optional"):
        wrong("default", "default is only for an optional field", "optional: true, default: true")
    if len(findings.problems) > before:
        return None
    if kind == "text" and limit is None and not accepted:
        limit = ID_BYTES if name in ids else NAME_BYTES
    return FieldDeclaration(
        name=name,
        type=cast(FieldType, kind),
        description=column.description,
        optional=bool(meta.get("optional", False)),
        max_bytes=limit,
        scale=scale,
        minimum=low,
        maximum=high,
        accepted=accepted,
        prose=bool(meta.get("prose", False)),
    )


def _accepted(findings: Findings, model: ModelYaml, column: ColumnYaml) -> tuple[str, ...]:
    meta, place = column.meta, f"{model.name}.{column.name}"
    if "accepted_from" in meta:
        name = meta["accepted_from"]
        values = findings.variables.get(str(name))
        if not isinstance(values, dict | list) or not values:
            findings.say(
                model.file,
                meta.at("accepted_from"),
                f"{place}: accepted_from names {name!r}, and vars has no list or mapping of "
                f"that name{did_you_mean(name, findings.variables)}",
                "accepted_from: interaction_weights",
            )
            return ()
    elif "accepted" in meta:
        values = meta["accepted"]
    else:
        return ()
    if (
        not isinstance(values, dict | list)
        or not values
        or not all(isinstance(one, str) and one and "'" not in one for one in values)
    ):
        findings.say(
            model.file,
            meta.at("accepted"),
            f"{place}: accepted must be a list of texts without quotes, not {plain(values)!r}",
            "accepted: [like, share]",
        )
        return ()
    return tuple(values)


def _literal(value: object) -> str:
    """Return the SQL literal of a default."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return "'" + str(value).replace("'", "''") + "'"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_") or "field"
