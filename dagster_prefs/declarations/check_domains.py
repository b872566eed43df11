"""Check the domains of a project, and build the serving contract from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_prefs.declarations.check_topics import Topic
from dagster_prefs.declarations.contract import (
    DOMAIN_KEY,
    DYNAMODB_ITEM_BYTES,
    LAST_EVENT_AT,
    NULL_ELEMENTS,
    SQL_TYPES,
    ContractError,
    build_contract,
)
from dagster_prefs.declarations.findings import (
    EXAMPLES,
    KEY_SQL_TYPES,
    LIVE,
    Findings,
    did_you_mean,
    is_whole,
    plain,
)
from dagster_prefs.declarations.read import PROJECT_FILE, Map, ModelYaml, as_map
from dagster_prefs.declarations.registry import Entity, FieldDeclaration, Key, family_of
from dagster_prefs.ids import INT64, MAX_SORT_KEY_BYTES, SEPARATOR, encode_part

DOMAIN_KEYS = ("key", "name", "entity", "sink", "owner", "description", "freshness")
HEAD_KEYS = ("version", "owner", "tables", "freshness")
DAILY: Mapping[str, Any] = {"warn_seconds": 93_600, "error_seconds": 180_000}

_DOMAIN = re.compile(r"([a-z][a-z0-9_]*)#([a-z][a-z0-9_]*)")
_DAYS = re.compile(r"_([0-9]+)d$")
_WINDOW = re.compile(
    r"within_window\(\s*(?:[^,()]|\([^()]*\))+?,\s*([^,()]+?)\s*,\s*((?:[^()]|\([^()]*\))+?)\s*\)"
)
_WINDOW_VARIABLE = re.compile(r"""var\(\s*["'](\w+)["']\s*\)(?:\.(\w+)|\[\s*["'](\w+)["']\s*\])?""")


@dataclass(frozen=True)
class Domain:
    """A domain; `resolved` is its `meta.domain` with defaults filled in, `columns` are its view's."""

    key: str
    relation: str
    entity: str
    sink: str
    file: str
    resolved: Mapping[str, Any]
    columns: Mapping[str, Mapping[str, Any]]

    @property
    def items(self) -> tuple[str, ...] | None:
        """The columns that its items have: those of the view without the retired ones."""
        kept = tuple(name for name, column in self.columns.items() if not column["config"]["meta"]["retired"])
        return None if len(kept) == len(self.columns) else kept


@dataclass(frozen=True)
class Head:
    """The contract's head from an exposure: what applies to the whole contract, and the declaring file."""

    file: str
    content: Map


def contract_head(findings: Findings) -> Head:
    """Return the contract's head, an empty one if no exposure declares it."""
    found = [
        (one.file, one.meta["contract"], one.meta.at("contract"))
        for one in findings.project.exposures
        if "contract" in one.meta
    ]
    example = "contract: { version: 1, owner: team@example.com }"
    for file, _, line in found[1:]:
        findings.say(file, line, f"{found[0][0]} also declares meta.contract: keep one of them", example)
    if not found:
        return Head(PROJECT_FILE, as_map(None, 1))
    file, head, line = found[0]
    if not isinstance(head, Map):
        findings.say(file, line, f"meta.contract must be a mapping, not {head!r}", example)
        return Head(file, as_map(None, line))
    findings.known(file, head, HEAD_KEYS, "meta.contract", example)
    return Head(file, head)


def check_domain(findings: Findings, model: ModelYaml, head: Head) -> Domain | None:
    """Return the domain that a model's YAML declares; None, with its problems noted, if it is invalid."""
    given, example = as_map(model.meta["domain"], model.line), EXAMPLES["domain"]
    before = len(findings.problems)
    findings.known(model.file, given, DOMAIN_KEYS, f"{model.name}: meta.domain", example)
    findings.needs_sql(model, "domain")
    key = str(given.get("key"))
    parts = _DOMAIN.fullmatch(key)
    if not parts:
        findings.say(
            model.file,
            given.at("key"),
            f"{model.name}: a domain's key is <product>#<domain> in lower case, not {given.get('key')!r}",
            example,
        )
        return None
    if key in findings.domain_keys:
        findings.say(
            model.file,
            given.at("key"),
            f"{model.name}: the domain {key} is also declared in {findings.domain_keys[key]}: rename one of them",
            f'domain: {{ key: "{parts[1]}#other" }}',
        )
        return None
    findings.domain_keys[key] = model.file
    entity = _domain_entity(findings, model, given)
    if entity and entity.table is None:
        findings.say(
            PROJECT_FILE,
            as_map(findings.project.variables.get("entities"), 1).at(entity.name),
            f"entity {entity.name} has the domain {key} ({model.file}:{given.at('key')}) and no table",
            f"table: {entity.name}_profiles",
        )
    if entity:
        findings.keys(model, entity, entity.keys)
    for name, kind in [
        *((one.name, KEY_SQL_TYPES[one.type]) for one in (entity.keys if entity else ())),
        (DOMAIN_KEY, "text"),
        (LAST_EVENT_AT, "bigint"),
    ]:
        column = model.columns.get(name)
        if column is None or column.type != kind or not column.is_not_null:
            findings.say(
                model.file,
                column.line if column else model.content.at("columns"),
                f"{model.name}: a domain needs the column {name}, a {kind} with a not_null test",
                f"- {{ name: {name}, data_type: {kind}, data_tests: [not_null] }}",
            )
    for column in model.columns.values():
        if re.sub(r"\(.*?\)", "", column.type) not in SQL_TYPES:
            findings.say(
                model.file,
                column.line,
                f"{model.name}.{column.name} is {column.type or 'of no data_type'}, which a DynamoDB item "
                "cannot store: use one of bigint, numeric, double precision, text, text[], numeric[], "
                "bigint[]",
                f"- {{ name: {column.name}, data_type: bigint }}",
            )
    _retired(findings, model, [key.name for key in entity.keys] if entity else [])
    _null_elements(findings, model)
    _named_days(findings, model, entity)
    freshness = findings.freshness(model, given, example)
    owner = given.get("owner", head.content.get("owner"))
    if not owner:
        findings.say(model.file, given.line, f"{model.name}: the domain {key} has no owner", example)
    python_name = str(given.get("name", parts[2]))
    if not python_name.isidentifier():
        findings.say(
            model.file,
            given.at("name"),
            f"{model.name}: {python_name!r} is not a Python identifier",
            f"name: {parts[2]}",
        )
    sink = str(given.get("sink", f"sink_{parts[1]}_{parts[2]}"))
    findings.claim(sink, f"{model.file}:{given.at('sink')}")
    if len(findings.problems) > before or not entity:
        return None
    return Domain(
        key=key,
        relation=model.name,
        entity=entity.name,
        sink=sink,
        file=model.file,
        resolved={
            "key": key,
            "name": python_name,
            "entity": entity.name,
            "sink": sink,
            "owner": owner,
            "description": given.get("description", model.description),
            "freshness": freshness,
        },
        columns={
            column.name: {
                "data_type": column.type,
                "description": column.description,
                "constraints": [{"type": "not_null"}] if column.is_not_null else [],
                "config": {
                    "meta": {
                        "retired": column.meta.get("retired", False),
                        NULL_ELEMENTS: column.meta.get(NULL_ELEMENTS, False),
                    }
                },
            }
            for column in model.columns.values()
        },
    )


def _retired(findings: Findings, model: ModelYaml, keys: Sequence[str]) -> None:
    """Note columns that are marked as retired and cannot be, and values of `retired` that are not true or false."""
    for column in model.columns.values():
        if "retired" not in column.meta:
            continue
        given, example = column.meta["retired"], "config: { meta: { retired: true } }"
        if not isinstance(given, bool):
            findings.say(
                model.file,
                column.meta.at("retired"),
                f"{model.name}.{column.name}: retired must be true or false, not {plain(given)!r}",
                example,
            )
        elif given and column.name in (*keys, DOMAIN_KEY, LAST_EVENT_AT):
            findings.say(
                model.file,
                column.meta.at("retired"),
                f"{model.name}.{column.name}: every item has this column, so it cannot be retired: retire an "
                "attribute, or remove the domain",
                example,
            )


def _null_elements(findings: Findings, model: ModelYaml) -> None:
    """Note values of `null_elements` that are not true or false, and columns other than lists that have it."""
    for column in model.columns.values():
        if NULL_ELEMENTS not in column.meta:
            continue
        given = column.meta[NULL_ELEMENTS]
        if not isinstance(given, bool) or not column.type.endswith("[]"):
            findings.say(
                model.file,
                column.meta.at(NULL_ELEMENTS),
                f"{model.name}.{column.name}: {NULL_ELEMENTS} must be true or false, of a list, and this is "
                f"{plain(given)!r} of {column.type}",
                "- { name: titles, data_type: text[], config: { meta: { null_elements: true } } }",
            )


def _domain_entity(findings: Findings, model: ModelYaml, given: Map) -> Entity | None:
    """Return the entity that a domain names, or else the one whose keys are its unique index."""
    if "entity" in given:
        return findings.entity(model, given, "domain")
    found = [
        entity
        for entity in findings.entities.values()
        if any({key.name for key in entity.keys} == set(unique) for unique in model.unique_keys)
    ]
    if len(found) == 1:
        return found[0]
    findings.say(
        model.file,
        given.line,
        f"{model.name}: which entity the domain is of is not clear: no unique index, or several entities, have its "
        "keys",
        f"domain: {{ entity: {next(iter(findings.entities), 'viewer')}, … }}",
    )
    return None


def _named_days(findings: Findings, model: ModelYaml, entity: Entity | None) -> None:
    """Note attributes whose name states other days than a window of the view, and windows that are not valid."""
    sql = findings.project.sql(model.name) or ""
    file = findings.project.sql_file(model.name)
    days: set[int] = set()
    for found in _WINDOW.finditer(sql):
        line = sql.count("\n", 0, found.start()) + 1
        key, text = found[1].strip("\"'").rpartition(".")[2], found[2].strip()
        if entity and found[1][0] in "\"'" and key != entity.key.name:
            findings.say(
                str(file),
                line,
                f"{model.name}: the window is computed by {key}, and must be by {entity.key.name}, the "
                f"first key of {entity.name}: training sets and parity begin an entity's day by that key",
                f'within_window("watch_date", "{entity.key.name}", var("windows").long)',
            )
        value: Any = int(text) if re.fullmatch(r"-?[0-9]+", text) else None
        if value is None and (variable := _WINDOW_VARIABLE.fullmatch(text)):
            inner = variable[2] or variable[3]
            value = findings.variables.get(variable[1])
            value = value.get(inner) if inner and isinstance(value, dict) else value
            if not is_whole(value):
                findings.say(
                    str(file),
                    line,
                    f"{model.name}: {text} is not a variable with a number of days"
                    f"{did_you_mean(inner, findings.variables.get('windows', {}))}",
                    'within_window("watch_date", "viewer_id", var("windows").long)',
                )
        if not is_whole(value):
            # The number of days is computed in SQL, so it is only known after compilation.
            return
        if value < 1:
            findings.say(
                str(file),
                line,
                f"{model.name}: a window must have at least 1 day, not {value}",
                'within_window("watch_date", "viewer_id", var("windows").long)',
            )
        days.add(value)
    served = [column for column in model.columns.values() if column.meta.get("retired") is not True]
    for column in served:
        if days and (said := _DAYS.search(column.name)) and int(said[1]) not in days:
            right = " or ".join(f"{column.name[: said.start()]}_{one}d" for one in sorted(days))
            findings.say(
                model.file,
                column.line,
                f"{model.name}: the attribute {column.name} says {said[1]} days, and the windows of the view "
                f"are of {' and '.join(map(str, sorted(days)))}: rename it to {right}, here and in {file}",
                f"- {{ name: {right} }}",
            )


def contract_of(
    findings: Findings, head: Head, domains: Sequence[Domain], topics: Sequence[Topic]
) -> Mapping[str, Any] | None:
    """Return the serving contract's JSON; None, with its problems noted, if it is invalid."""
    targets = plain(as_map(head.content.get("freshness"), head.content.line))
    of_topics = {
        topic.declared.name: targets.get("topics", {}).get(topic.declared.name, topic.freshness)
        for topic in topics
        if topic.declared.keep == "first"
    }
    for name in targets.get("topics", {}):
        if name not in of_topics:
            findings.say(
                head.file,
                head.content["freshness"]["topics"].at(name),
                f"a freshness target of {name}, which is not a topic of events{did_you_mean(name, of_topics)}",
                "topics: { view_events: { warn_seconds: 3, error_seconds: 5 } }",
            )
    given = plain(as_map(head.content.get("tables"), head.content.line))
    served = {domain.entity for domain in domains}
    for name in given:
        if name not in served:
            findings.say(
                head.file,
                head.content["tables"].at(name),
                f"tables has {name!r}, which is not an entity with a domain{did_you_mean(name, served)}",
                "tables: { viewer: { max_item_bytes: 409600 } }",
            )
    owners = [domain.resolved["owner"] for domain in domains]
    declared = {
        "version": head.content.get("version", 1),
        "owner": head.content.get("owner") or next(iter(owners), findings.project.name),
        "tables": {
            name: _table_of(entity) | given.get(name, {})
            for name, entity in findings.entities.items()
            if name in served
        },
        "freshness": {
            "topics": of_topics,
            "views": targets.get("views", LIVE),
            "export": targets.get("export", DAILY),
            "canary": targets.get("canary", LIVE),
        },
    }
    # In the format of dbt's manifest, from which the engine's records are made.
    nodes = {
        domain.relation: {
            "name": domain.relation,
            "resource_type": "model",
            "config": {"meta": {"domain": domain.resolved}},
            "columns": domain.columns,
        }
        for domain in domains
    }
    try:
        return build_contract(
            {
                "exposures": {"head": {"name": "head", "config": {"meta": {"contract": declared}}}},
                "nodes": nodes,
            }
        )
    except ContractError as error:
        example = "contract: { version: 1, owner: team@example.com }"
        findings.say(head.file, head.content.line, f"the serving contract: {error}", example)
        return None


def check_key_bytes(findings: Findings, domains: Sequence[Domain], topics: Sequence[Topic]) -> None:
    """Note the domains of composite keys whose sort key may be too long for DynamoDB, or has no limit."""
    place = as_map(findings.project.variables.get("entities"), 1)
    for domain in domains:
        entity = findings.entities[domain.entity]
        family = {one.name for one in family_of(findings.entities, entity)}
        longest = len(domain.key)
        for key in entity.keys[1:]:
            fields = [
                field
                for topic in topics
                if topic.declared.entity in family
                for field in topic.declared.fields
                if field.name == key.name
            ]
            if not fields:
                findings.say(
                    PROJECT_FILE,
                    place.at(entity.name),
                    f"entity {entity.name}: its key {key.name} is a field of no topic about its {entity.key.name}, so "
                    "that nothing limits the key's length and no canary has one",
                    f"- {{ name: {key.name}, data_type: {KEY_SQL_TYPES[key.type]} }} in the topic's columns",
                )
            longest += len(SEPARATOR) + max((_encoded_bytes(key, field) for field in fields), default=0)
        if longest > MAX_SORT_KEY_BYTES:
            texts = [key.name for key in entity.keys[1:] if key.type == "text"]
            most = (MAX_SORT_KEY_BYTES - len(domain.key) - 64 * len(entity.keys)) // (3 * max(1, len(texts)))
            findings.say(
                domain.file,
                1,
                f"{domain.relation}: the sort key of its items may have {longest:,} bytes, and DynamoDB accepts "
                f"{MAX_SORT_KEY_BYTES:,}: it holds {domain.key} and {', '.join(texts)}, whose `#` and `%` take three "
                "bytes each; limit them in their topic",
                f"config: {{ meta: {{ max_bytes: {most} }} }}",
            )


def _encoded_bytes(key: Key, field: FieldDeclaration) -> int:
    """Return the largest number of bytes that a part of a sort key can take."""
    if key.type == "bigint":
        return len(str(-INT64))
    if key.type == "uuid":
        return 36
    if field.accepted:
        return max(len(encode_part(value).encode()) for value in field.accepted)
    return len(encode_part(SEPARATOR)) * (field.max_bytes or 0)


def _table_of(entity: Entity) -> dict[str, Any]:
    attributes = [{"name": key.name, "type": "N" if key.type == "bigint" else "S"} for key in entity.keys]
    return {
        "name": entity.table,
        "partition_key": attributes[0],
        "sort_key": {"name": DOMAIN_KEY, "type": "S"},
        "max_item_bytes": DYNAMODB_ITEM_BYTES,
        "ttl_attribute": None,
    } | ({"rest_keys": attributes[1:]} if attributes[1:] else {})
