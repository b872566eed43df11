"""Check a project's declarations; report each error with its position and a correct example."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from dagster_prefs.declarations.check_domains import (
    Domain,
    check_domain,
    check_key_bytes,
    contract_head,
    contract_of,
)
from dagster_prefs.declarations.check_indexes import check_indexes
from dagster_prefs.declarations.check_tiles import Tile, check_tile
from dagster_prefs.declarations.check_topics import Topic, check_topic
from dagster_prefs.declarations.check_views import check_kept, check_preference, is_kept
from dagster_prefs.declarations.findings import EXAMPLES, NAME, Findings, did_you_mean, is_whole, plain
from dagster_prefs.declarations.personal import check_pii
from dagster_prefs.declarations.read import (
    GENERATED,
    PROJECT_FILE,
    DeclarationError,
    Map,
    ModelYaml,
    ProjectYaml,
    as_map,
    macro_paths,
)
from dagster_prefs.declarations.registry import Entity, KeptView, Key, KeyType, PreferenceView

ENTITY_KEYS = ("keys", "table", "erasable")
MODEL_META = ("topic", "tile", "domain", "preference", "keep", "time", "time_include")
_TABLE = re.compile(r"[A-Za-z0-9_.-]{3,255}")


@dataclass(frozen=True)
class Declarations:
    """The checked declarations of a project; `contract` is the serving contract's JSON."""

    project: str
    entities: Mapping[str, Entity]
    topics: tuple[Topic, ...]
    tiles: tuple[Tile, ...]
    domains: tuple[Domain, ...]
    contract: Mapping[str, Any]
    variables: Mapping[str, Any]
    preferences: tuple[PreferenceView, ...]
    kept: tuple[KeptView, ...]


def check_project(project: ProjectYaml) -> Declarations:
    """Check and return everything that the project declares.

    Raises DeclarationError with a sentence for every problem, each with its file and line.
    """
    variables = {name: plain(value) for name, value in project.variables.items() if name != "entities"}
    findings = Findings(project, variables)
    findings.entities = _entities(findings)
    _windows(findings)
    paths = macro_paths(project.content)
    if GENERATED not in paths:
        findings.say(
            PROJECT_FILE,
            project.content.at("macro-paths"),
            f"macro-paths lacks {GENERATED}, the folder of the hashes by which dbt refuses stale files",
            f"macro-paths: [{', '.join([*paths, GENERATED])}]",
        )
    if not findings.entities or findings.problems:
        # Other problems may be consequences of these.
        raise DeclarationError(findings.problems)
    for model in project.models:
        has_query = "topic" in model.meta or is_kept(findings, model)
        findings.claim(model.name, f"{model.file}:{model.line}", kept=has_query)
        _model(findings, model)
        check_pii(findings, model)
    topics = [topic for model in findings.declaring("topic") if (topic := check_topic(findings, model))]
    # Topics of events before reference data, each in order of declaration.
    topics.sort(key=lambda topic: topic.declared.keep == "last")
    tiles = [tile for model in findings.declaring("tile") if (tile := check_tile(findings, model))]
    if not topics and not findings.problems:
        findings.say(PROJECT_FILE, 1, "no model declares a topic", EXAMPLES["topic"])
    head = contract_head(findings)
    domains = [
        domain for model in findings.declaring("domain") if (domain := check_domain(findings, model, head))
    ]
    preferences = [
        view for model in findings.declaring("preference") if (view := check_preference(findings, model))
    ]
    kept = [found for model in project.models if (found := check_kept(findings, model, topics))]
    _twice(findings, topics, tiles)
    if not findings.problems:
        check_key_bytes(findings, domains, topics)
    check_indexes(findings, topics)
    _exposed_sinks(findings)
    contract = None if findings.problems else contract_of(findings, head, domains, topics)
    if contract is None or findings.problems:
        raise DeclarationError(findings.problems)
    return Declarations(
        project=project.name,
        entities=findings.entities,
        topics=tuple(topics),
        tiles=tuple(tiles),
        domains=tuple(domains),
        contract=contract,
        variables=variables,
        preferences=tuple(preferences),
        kept=tuple(kept),
    )


def _model(findings: Findings, model: ModelYaml) -> None:
    for kind in ("topic", "tile", "domain", "preference"):
        if isinstance(model.content.get("meta"), Map) and kind in model.content["meta"]:
            findings.say(
                model.file,
                model.content["meta"].at(kind),
                f"{model.name}: meta.{kind} belongs under config",
                f"config: {{ meta: {{ {kind}: … }} }}",
            )
        if kind in model.meta and not isinstance(model.meta[kind], Map):
            findings.say(
                model.file,
                model.meta.at(kind),
                f"{model.name}: meta.{kind} must be a mapping",
                EXAMPLES[kind],
            )
    for name in model.meta:
        if name not in MODEL_META and (hint := did_you_mean(name, MODEL_META)):
            findings.say(
                model.file,
                model.meta.at(name),
                f"{model.name}: meta has no key {name!r}{hint}",
                EXAMPLES["topic"],
            )
    declared = [kind for kind in ("topic", "tile", "domain", "preference") if kind in model.meta]
    if len(declared) > 1:
        findings.say(
            model.file,
            model.meta.at(declared[1]),
            f"{model.name}: a {declared[1]} on a {declared[0]}: a domain is declared on a rolling view that "
            "reads a tile, a tile on a model that reads a topic",
            f"meta: {{ {declared[0]}: … }}",
        )
    if declared:
        for column in model.content.get("columns") or []:
            if not isinstance(column, Map) or not column.get("name"):
                line = column.line if isinstance(column, Map) else model.content.at("columns")
                findings.say(
                    model.file,
                    line,
                    f"{model.name}: a column without a name",
                    "- { name: views, data_type: bigint }",
                )
        if not model.columns:
            findings.say(
                model.file,
                model.line,
                f"{model.name} declares no columns",
                "columns: [{ name: event_id, data_type: text }]",
            )


def _entities(findings: Findings) -> dict[str, Entity]:
    variables = findings.project.variables
    declared = variables.get("entities")
    example = "entities: { viewer: { keys: { viewer_id: bigint }, table: viewer_profiles, erasable: true } }"
    if not isinstance(declared, Map) or not declared:
        findings.say(PROJECT_FILE, variables.at("entities"), "vars has no entities", example)
        return {}
    found: dict[str, Entity] = {}
    types: dict[str, tuple[str, str]] = {}
    for name, value in declared.items():
        line = declared.at(name)
        if not isinstance(value, Map) or not NAME.fullmatch(str(name)):
            findings.say(
                PROJECT_FILE, line, f"entity {name!r} must be a name in lower case with a mapping", example
            )
            continue
        findings.known(PROJECT_FILE, value, ENTITY_KEYS, f"entity {name}", example)
        keys = as_map(value.get("keys"), line)
        if not keys:
            findings.say(PROJECT_FILE, value.at("keys"), f"entity {name} has no keys", example)
            continue
        for key, kind in keys.items():
            if kind not in get_args(KeyType):
                findings.say(
                    PROJECT_FILE,
                    keys.at(key),
                    f"entity {name}: the type of key {key} must be one of "
                    f"{', '.join(get_args(KeyType))}, not {kind!r}",
                    f"keys: {{ {key}: text }}",
                )
            other = types.setdefault(str(key), (str(kind), name))
            if other[0] != kind:
                findings.say(
                    PROJECT_FILE,
                    keys.at(key),
                    f"entity {name}: key {key} is a {kind}, and entity {other[1]} has it as a {other[0]}: "
                    "give them one type or two names",
                    f"keys: {{ {name}_id: {kind} }}",
                )
        table = value.get("table")
        if table is not None and not _TABLE.fullmatch(str(table)):
            findings.say(
                PROJECT_FILE,
                value.at("table"),
                f"entity {name}: {table!r} is not a DynamoDB table name (3 to 255 of A-Z a-z 0-9 _ . -)",
                f"table: {name}_profiles",
            )
        if table is not None and (
            other_table := next((one.name for one in found.values() if one.table == table), None)
        ):
            findings.say(
                PROJECT_FILE,
                value.at("table"),
                f"entity {name} and entity {other_table} have the same table, {table}",
                f"table: {name}_profiles",
            )
        if not isinstance(value.get("erasable", False), bool):
            findings.say(
                PROJECT_FILE,
                value.at("erasable"),
                f"entity {name}: erasable must be true or false, not {value['erasable']!r}",
                "erasable: true",
            )
        made = Entity(
            name=str(name),
            keys=tuple(Key(str(key), kind) for key, kind in keys.items()),
            erasable=value.get("erasable", False) is True,
            table=None if table is None else str(table),
        )
        if other_kind := next(
            (one.name for one in found.values() if one.key == made.key and one.erasable != made.erasable),
            None,
        ):
            findings.say(
                PROJECT_FILE,
                value.at("erasable"),
                f"entity {name} and entity {other_kind} have the first key {made.key.name}, and one of them is "
                "erasable: an erasure takes everything with that key",
                f"erasable: {str(not made.erasable).lower()}",
            )
        found[made.name] = made
    return found


def _windows(findings: Findings) -> None:
    windows = as_map(findings.project.variables.get("windows"), 1)
    for name, days in windows.items():
        if not is_whole(days) or days < 1:
            findings.say(
                PROJECT_FILE,
                windows.at(name),
                f"the window {name} must be a whole number of days, at least 1, not {days!r}",
                f"{name}: 7",
            )


def _exposed_sinks(findings: Findings) -> None:
    """Exposures that read a sink which is not there, as after a domain was renamed."""
    for exposure in findings.project.exposures:
        for reference in exposure.content.get("depends_on") or []:
            found = re.fullmatch(r"""ref\(\s*["'](sink_\w+)["']\s*\)""", str(reference).strip())
            if found and found[1] not in findings.relations and findings.project.sql(found[1]) is None:
                near = did_you_mean(found[1], findings.relations)
                findings.say(
                    exposure.file,
                    exposure.content.at("depends_on"),
                    f"{exposure.name} depends on {found[1]}, which is the sink of no domain and of no tile{near}",
                    f"- ref('{next((name for name in findings.relations if name.startswith('sink_')), 'sink_…')}')",
                )


def _twice(findings: Findings, topics: list[Topic], tiles: list[Tile]) -> None:
    for what, found, example in (
        (
            "the Kafka topic",
            [(one.declared.name, one.file) for one in topics],
            "kafka_topic: shop_events",
        ),
        (
            "the setting PREFS_KAFKA_TOPIC_…",
            [(one.declared.name.replace(".", "_").upper(), one.file) for one in topics],
            "kafka_topic: shop_events",
        ),
        (
            "the training table",
            [(one.declared.table, one.file) for one in tiles],
            "table: viewer_searches_daily",
        ),
    ):
        seen: dict[str, str] = {}
        for name, file in found:
            if name in seen:
                findings.say(
                    file, 1, f"{what} {name} is also declared in {seen[name]}: rename one of them", example
                )
            seen.setdefault(name, file)
