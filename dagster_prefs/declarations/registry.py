"""A project's declarations for everything outside dbt: entities, topics, tiles, domains, variables.

`prefs generate` writes them to `registry.json` in the project's folder, from the YAML of the dbt project. No
other part of the platform knows a topic, a tile, a domain or an attribute by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dagster_prefs.declarations.contract import DOMAIN_KEY, Contract, contract_dict, parse_contract
from dagster_prefs.declarations.contract import REGISTRY as REGISTRY
from dagster_prefs.errors import PrefsError, excerpt

# Incremented when an older reader would misinterpret the file.
FORMAT = 1

FieldType = Literal["text", "bigint", "int", "decimal", "boolean", "timestamptz"]
MessageFormat = Literal["json", "json_schema", "avro"]
KeyType = Literal["bigint", "text", "uuid"]
# How a view is kept current on the embedded engine.
Keeping = Literal["rows", "identity", "key", "merging", "rebuilt"]


# The usual name of a dbt project's folder within the folder of the whole.
PROJECT_FOLDER = "dbt_project"


class RegistryError(PrefsError):
    """A project's registry is missing or unreadable, or lacks a requested name."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key column of an entity; a `uuid` is stored as text in lower case."""

    name: str
    type: KeyType


@dataclass(frozen=True, slots=True)
class Entity:
    """The subject of rows. Reserved ids, events and erasures refer to its first key.

    `table` is its DynamoDB table without the environment's prefix, None if it has no domain. An `erasable` entity is a
    person, whose data `prefs erase` can erase.
    """

    name: str
    keys: tuple[Key, ...]
    erasable: bool
    table: str | None = None

    @property
    def key(self) -> Key:
        """The first key column."""
        return self.keys[0]

    @property
    def key_names(self) -> tuple[str, ...]:
        """The names of the key columns, in order."""
        return tuple(key.name for key in self.keys)


@dataclass(frozen=True, slots=True)
class FieldDeclaration:
    """One field of a topic's messages.

    A text has at most `max_bytes` in UTF-8; a decimal is rounded to `scale` places; a number is from
    `minimum` to `maximum`; `accepted` lists the only permitted values, if there are any. A message may omit
    an `optional` field. `prose` is text for people, in which numbers keep their spelling.
    """

    name: str
    type: FieldType = "text"
    description: str = ""
    optional: bool = False
    max_bytes: int | None = None
    scale: int | None = None
    minimum: int | None = None
    maximum: int | None = None
    accepted: tuple[str, ...] = ()
    prose: bool = False


@dataclass(frozen=True)
class TopicDeclaration:
    """One kind of message: `relation` holds its typed events, `raw` its raw messages.

    Among several deliveries of one `identity` the first counts, or with `keep` = last the last (reference
    data). `entity` and `time` (the field of the event time) are None for reference data. `format` is that of the
    messages in Kafka: JSON, or JSON or Avro in Confluent's wire format.
    """

    name: str
    relation: str
    raw: str
    parsed: str
    identity: str
    keep: Literal["first", "last"]
    entity: str | None
    time: str | None
    fields: tuple[FieldDeclaration, ...]
    format: MessageFormat = field(default="json", kw_only=True)

    @cached_property
    def by_name(self) -> Mapping[str, FieldDeclaration]:
        """The fields by name."""
        return MappingProxyType({field.name: field for field in self.fields})

    def sought(self, keys: Iterable[str]) -> tuple[FieldDeclaration, ...]:
        """Return the fields by which a raw message is found: identity, event time, and the keys of its entity."""
        names = {self.identity, self.time, *keys}
        return tuple(field for field in self.fields if field.name in names)


@dataclass(frozen=True, slots=True)
class TileColumn:
    """One column of a tile; `minimum` is the least value that the audit accepts.

    `drift` has the limits of its drift, `psi` and `ks` with `warn` and `error` each, False if it is not judged, None
    for the defaults of values/drift.py.
    """

    type: str
    description: str
    minimum: int | None = None
    drift: Mapping[str, Any] | Literal[False] | None = None


@dataclass(frozen=True, slots=True)
class TileDeclaration:
    """One row per entity and UTC `day` (and the rest of `key`), exported to the training table `table`.

    `metric` names the columns whose total is `metric_total` among the fingerprints; `at_most` lists (smaller,
    larger) pairs of columns that every row respects; `sink` is the RisingWave sink that writes the table,
    where sinks export. `drift` has the limits of a drift of its rows (`rows`: by which factor, `min_rows`), False if
    the tile is not judged, None for the defaults of values/drift.py.
    """

    relation: str
    table: str
    description: str
    entity: str
    day: str
    key: tuple[str, ...]
    columns: Mapping[str, TileColumn]
    metric: tuple[str, ...]
    at_most: tuple[tuple[str, str], ...] = ()
    sink: str = ""
    drift: Mapping[str, Any] | Literal[False] | None = None


@dataclass(frozen=True, slots=True)
class PreferenceView:
    """A view that is read over the Postgres wire for one key of an entity: the columns `reads`."""

    relation: str
    entity: str
    reads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeptView:
    """How a view is kept current: `by` rows, by identity, by `key`, by merging, or rebuilt `every_seconds`.

    `inputs` are the relations that it reads; those in `whole` are read whole, whatever changed.
    """

    relation: str
    by: Keeping
    key: tuple[str, ...]
    inputs: tuple[str, ...]
    whole: tuple[str, ...] = ()
    every_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Upstream:
    """A relation from which a view is computed, with its `time` column.

    `only` is the condition on the rows that the view shows; a rolling view shows those whose `day` is one of
    the last `days` (UTC).
    """

    relation: str
    time: str
    only: str = "true"
    day: str | None = None
    days: int = 0


@dataclass(frozen=True, slots=True)
class WatchedView:
    """A view with a time column, and the relations from which its newest time is computed.

    The time of a rolling view is in epoch milliseconds. `columns` are the names of the view's columns;
    `unclear` gives the reason why the age of missing rows cannot be determined, where that is so.
    """

    topic: str
    relation: str
    time: str
    upstreams: tuple[Upstream, ...]
    columns: frozenset[str] = frozenset()
    unclear: str = ""

    @property
    def is_rolling(self) -> bool:
        """Whether the view is a domain's, whose time is in epoch milliseconds, be it over tiles or over events."""
        return DOMAIN_KEY in self.columns or any(upstream.day for upstream in self.upstreams)


@dataclass(frozen=True)
class Registry:
    """All declarations of a project.

    `variables` are the dbt project's own (weights, windows, tiers, thresholds). `hashes` maps each file that
    affects a deployment to its SHA-256, relative to the project's folder. `queries` maps every tile, every
    domain's rolling view, and every other view with a time, to its SQL as RisingWave gets it, without the
    names of database and schema, and without a spread: windows, upstreams and the features of training sets
    are derived from it. `watched` are the views whose freshness is measured. `personal` has the personal columns
    of relations (declarations/personal.py).
    """

    project: str
    entities: Mapping[str, Entity]
    topics: Mapping[str, TopicDeclaration]
    tiles: Mapping[str, TileDeclaration]
    contract: Contract
    variables: Mapping[str, Any]
    hashes: Mapping[str, str]
    queries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    preferences: Mapping[str, PreferenceView] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, KeptView] = dataclasses.field(default_factory=dict)
    watched: tuple[WatchedView, ...] = ()
    personal: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def query(self, relation: str) -> str:
        """Return the compiled SQL of a relation. Raises RegistryError if the registry holds none."""
        if relation not in self.queries:
            raise RegistryError(f"the registry has no query for {relation}: run `prefs generate`")
        return self.queries[relation]

    def entity(self, name: str) -> Entity:
        """Return the entity of this name. Raises RegistryError naming the existing ones."""
        if name not in self.entities:
            raise RegistryError(f"unknown entity {excerpt(name)}: the project has {', '.join(self.entities)}")
        return self.entities[name]

    def family(self, name: str) -> tuple[Entity, ...]:
        """Return the entities that share the first key column of the named one, in declared order.

        An erasure covers all of them, and is recorded under the name of the first.
        """
        return family_of(self.entities, self.entity(name))

    def is_personal(self, relation: str, column: str) -> bool:
        """Return whether a column of typed events, a tile or a view identifies people, or is made from what does."""
        return column in personal_keys(self.entities) or column in self.personal.get(relation, ())

    def topic(self, name: str) -> TopicDeclaration:
        """Return the topic of this name. Raises RegistryError naming the existing ones."""
        if name not in self.topics:
            near = difflib.get_close_matches(name, self.topics, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise RegistryError(
                f"unknown topic {excerpt(name)}: {hint}the project has {', '.join(self.topics)}"
            )
        return self.topics[name]


def family_of(entities: Mapping[str, Entity], entity: Entity) -> tuple[Entity, ...]:
    """Return the entities that share the first key column of this one, in declared order."""
    return tuple(one for one in entities.values() if one.key == entity.key)


def personal_keys(entities: Mapping[str, Entity]) -> frozenset[str]:
    """Return the key columns of all people."""
    return frozenset(name for entity in entities.values() if entity.erasable for name in entity.key_names)


def uuid_keys(entities: Mapping[str, Entity], entity: Entity | None) -> set[str]:
    """Return the fields that hold UUIDs in a topic about an entity: its keys, and those of its family."""
    family = family_of(entities, entity) if entity else ()
    return {key.name for one in family for key in one.keys if key.type == "uuid"}


def parse_registry(content: Mapping[str, Any]) -> Registry:
    """Parse the decoded JSON of a registry.

    Raises RegistryError if it has another format, or was not written by `prefs generate`.
    """
    if content.get("format") != FORMAT:
        raise RegistryError(
            f"it has format {content.get('format')!r}, and this version reads {FORMAT}: run `prefs generate` with it"
        )
    try:
        registry = Registry(
            project=content["project"],
            entities=_each(
                content["entities"],
                lambda name, value: Entity(
                    name=name,
                    keys=tuple(Key(key, kind) for key, kind in value["keys"].items()),
                    erasable=value["erasable"],
                    table=value["table"],
                ),
            ),
            topics=_each(
                content["topics"],
                lambda name, value: TopicDeclaration(
                    **{
                        **value,
                        "name": name,
                        "fields": tuple(
                            FieldDeclaration(**{**field, "accepted": tuple(field.get("accepted", ()))})
                            for field in value["fields"]
                        ),
                    }
                ),
            ),
            tiles=_each(
                content["tiles"],
                lambda name, value: TileDeclaration(
                    **{
                        **value,
                        "relation": name,
                        "key": tuple(value["key"]),
                        "metric": tuple(value["metric"]),
                        "at_most": tuple((low, high) for low, high in value["at_most"]),
                        "columns": _each(value["columns"], lambda _, column: TileColumn(**column)),
                    }
                ),
            ),
            preferences=_each(
                content.get("preferences", {}),
                lambda name, value: PreferenceView(name, value["entity"], tuple(value["reads"])),
            ),
            kept=_each(
                content.get("kept", {}),
                lambda name, value: KeptView(
                    name,
                    value["by"],
                    tuple(value["key"]),
                    tuple(value["inputs"]),
                    tuple(value["whole"]),
                    value["every_seconds"],
                ),
            ),
            watched=tuple(
                WatchedView(
                    **{
                        **value,
                        "upstreams": tuple(Upstream(**upstream) for upstream in value["upstreams"]),
                        "columns": frozenset(value["columns"]),
                    }
                )
                for value in content["watched"]
            ),
            contract=parse_contract(content["contract"]),
            variables=MappingProxyType(dict(content["variables"])),
            hashes=MappingProxyType(dict(content["hashes"])),
            queries=MappingProxyType(dict(content.get("queries", {}))),
            personal=_each(content["personal"], lambda _, names: tuple(names)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RegistryError(
            f"`prefs generate` did not write it in this form ({error}): run `prefs generate` again"
        ) from None
    _check_tables(registry)
    return registry


def _check_tables(registry: Registry) -> None:
    """Raise RegistryError if a table of the contract is not that of its entity."""
    for name, table in registry.contract.tables.items():
        entity = registry.entity(name)
        wanted = f"{entity.table} by " + ", ".join(
            f"{key.name} ({'N' if key.type == 'bigint' else 'S'})" for key in entity.keys
        )
        found = f"{table.name} by " + ", ".join(f"{key.name} ({key.type})" for key in table.columns)
        if found != wanted:
            raise RegistryError(
                f"the contract's table of entity {name} is {found}, and the entity says {wanted}: "
                "run `prefs generate`"
            )


def registry_dict(registry: Registry) -> dict[str, Any]:
    """Return the JSON form of a registry, from which `parse_registry` reads an equal one."""
    return {
        "format": FORMAT,
        "project": registry.project,
        "entities": {
            entity.name: {
                "keys": {key.name: key.type for key in entity.keys},
                "erasable": entity.erasable,
                "table": entity.table,
            }
            for entity in registry.entities.values()
        },
        "topics": {
            topic.name: {
                "relation": topic.relation,
                "raw": topic.raw,
                "parsed": topic.parsed,
                "identity": topic.identity,
                "keep": topic.keep,
                "entity": topic.entity,
                "time": topic.time,
                **({} if topic.format == "json" else {"format": topic.format}),
                "fields": [_without_defaults(field) for field in topic.fields],
            }
            for topic in registry.topics.values()
        },
        "tiles": {
            tile.relation: {
                "table": tile.table,
                "description": tile.description,
                "entity": tile.entity,
                "day": tile.day,
                "key": list(tile.key),
                "metric": list(tile.metric),
                "at_most": [list(pair) for pair in tile.at_most],
                "sink": tile.sink,
                **({} if tile.drift is None else {"drift": tile.drift}),
                "columns": {name: _without_defaults(column) for name, column in tile.columns.items()},
            }
            for tile in registry.tiles.values()
        },
        "preferences": {
            view.relation: {"entity": view.entity, "reads": list(view.reads)}
            for view in registry.preferences.values()
        },
        "kept": {
            view.relation: {
                "by": view.by,
                "key": list(view.key),
                "inputs": list(view.inputs),
                "whole": list(view.whole),
                "every_seconds": view.every_seconds,
            }
            for view in registry.kept.values()
        },
        "watched": [
            {
                "relation": view.relation,
                "topic": view.topic,
                "time": view.time,
                "upstreams": [dataclasses.asdict(upstream) for upstream in view.upstreams],
                "columns": sorted(view.columns),
                "unclear": view.unclear,
            }
            for view in registry.watched
        ],
        "personal": {name: list(columns) for name, columns in registry.personal.items()},
        "contract": contract_dict(registry.contract),
        "variables": dict(registry.variables),
        "queries": dict(sorted(registry.queries.items())),
        "hashes": dict(sorted(registry.hashes.items())),
    }


def render_registry(registry: Registry) -> str:
    """Render the registry as stable JSON text."""
    return json.dumps(registry_dict(registry), indent=2, ensure_ascii=False) + "\n"


def find_project(start: Path | None = None, *, named: Path | None = None) -> Path:
    """Find the folder of the dbt project.

    It is `named` (PREFS_PROJECT_DIR), or else searched from `start` (the working folder) upwards: the first
    folder with a `dbt_project.yml` that declares entities, or with such a folder named `dbt_project`; without
    any, the first with a `dbt_project.yml`. The named one may contain only the registry, for a service that
    only reads.

    Raises RegistryError naming the searched folders.
    """
    if named is not None:
        if not any((named / file).is_file() for file in ("dbt_project.yml", REGISTRY)):
            raise RegistryError(
                f"PREFS_PROJECT_DIR is {named}, which has neither dbt_project.yml nor {REGISTRY}: name a dbt project, "
                "or for a service a folder with a copy of its registry"
            )
        return named.resolve()
    at = (start or Path(os.curdir)).resolve()
    found = [
        project
        for folder in (at, *at.parents)
        for project in (folder, folder / PROJECT_FOLDER)
        if (project / "dbt_project.yml").is_file()
    ]
    # A dbt project of other models may lie within or beside ours.
    if declaring := next(filter(_declares, found), None) or next(iter(found), None):
        return declaring
    raise RegistryError(
        f"no dbt project in {at} or above it: change into one, or set PREFS_PROJECT_DIR to its folder"
    )


def project_home(project: Path) -> Path:
    """Return the folder that holds what belongs to a project beside its models: `.env`, `.prefs`, `workspace.yaml`."""
    return project.parent if project.name == PROJECT_FOLDER else project


def _declares(project: Path) -> bool:
    """Return whether a dbt project declares entities; reads no YAML, which readers need not have installed."""
    try:
        text = (project / "dbt_project.yml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(r"(?m)^\s+entities\s*:", text) is not None or (project / REGISTRY).is_file()


def open_registry(given: Registry | Mapping[str, Any] | Path | str) -> Registry:
    """Return the registry from any of its forms: itself, decoded JSON, its file or its project's folder.

    Raises RegistryError naming what is wrong and the remedy.
    """
    if isinstance(given, Registry):
        return given
    if isinstance(given, Mapping):
        return parse_registry(given)
    if isinstance(given, Path | str):
        return load_registry(Path(given))
    raise RegistryError(
        f"a registry is needed, not {excerpt(given)}: pass the path of the project's {REGISTRY}, or its decoded JSON"
    )


def load_registry(project: Path) -> Registry:
    """Load the registry of the project in this folder, or in this file.

    Raises RegistryError naming the file, what is wrong and the remedy.
    """
    path = project if project.suffix == ".json" else project / REGISTRY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RegistryError(f"{path} is missing: run `prefs generate` in the project") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise RegistryError(
            f"{path} cannot be read ({reason}): run `prefs generate` in the project"
        ) from None
    if not isinstance(content, dict):
        raise RegistryError(f"{path} is not a registry: run `prefs generate` in the project")
    try:
        return parse_registry(content)
    except PrefsError as error:
        raise RegistryError(f"{path}: {error}") from None


def _each(values: Mapping[str, Any], make: Any) -> Mapping[str, Any]:
    return MappingProxyType({name: make(name, value) for name, value in values.items()})


def _without_defaults(value: FieldDeclaration | TileColumn) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(value)}
    found = {name: getattr(value, name) for name in defaults}
    return {
        name: list(content) if isinstance(content, tuple) else content
        for name, content in found.items()
        if content != defaults[name]
    }
