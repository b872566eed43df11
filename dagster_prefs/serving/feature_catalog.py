"""The catalog of what a project declares, as data: what there is, what it means, where it comes from, how to read it.

Not the shop's catalogue of items (`catalogue`). Everything follows from the registry, the lineage and the project's
YAML; example values come from the engine, where one is asked. A personal value is never an example
(declarations/personal.py).
"""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Domain, Freshness
from dagster_prefs.declarations.lineage import (
    Column,
    Lineage,
    load_lineage,
    origin,
    shown_kinds,
    walk,
)
from dagster_prefs.declarations.read import PROJECT_FILE, ModelYaml, ProjectYaml, read_project
from dagster_prefs.declarations.registry import Entity, Registry, TileDeclaration, TopicDeclaration
from dagster_prefs.declarations.reserved import people_only
from dagster_prefs.declarations.stores import stores_of
from dagster_prefs.errors import PrefsError, excerpt

if TYPE_CHECKING:
    import psycopg

    from dagster_prefs.engine.connection import EngineConfiguration

EntryKind = Literal["entity", "topic", "field", "domain", "attribute", "view", "tile", "column"]
# Rows that examples and the share of NULLs are of, per relation.
SAMPLED_ROWS = 1_000
MOST_EXAMPLES = 5
# An example is cut off behind so many characters.
EXAMPLE_CHARACTERS = 80
GIT_SECONDS = 10.0
REGISTRY_FILE = "registry.json"


class CatalogError(PrefsError):
    """The catalog has no entry of this name."""


@dataclass(frozen=True)
class Change:
    """The last commit of a file: who, and when (ISO 8601)."""

    commit: str
    author: str
    at: str


@dataclass(frozen=True)
class Sample:
    """Values of a column among the first rows of its relation: `null_share` is 0 to 1, of `rows` rows."""

    rows: int
    null_share: float | None
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One thing that a project declares.

    `owner`, `entity`, `type`, `window_days` and `freshness` are None where it has none. `made_from` are the columns and
    fields behind it, nearest first, each with its depth and how it is used; `origin` says the same of the fields in
    a sentence. `goes_to` are its readers and stores. `read` maps a way of reading it (python, curl, sql, training) to
    what to write. `column` is where its values are, `file` where it is declared.
    """

    kind: EntryKind
    name: str
    meaning: str
    type: str | None = None
    owner: str | None = None
    entity: str | None = None
    window_days: int | None = None
    freshness: Freshness | None = None
    is_personal: bool = False
    origin: str = ""
    made_from: tuple[tuple[int, str, str], ...] = ()
    goes_to: tuple[str, ...] = ()
    read: Mapping[str, str] = field(default_factory=dict)
    column: Column | None = None
    file: str | None = None
    changed: Change | None = None
    sample: Sample | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as plain values, for JSON."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        freshness, changed, sample = self.freshness, self.changed, self.sample
        return found | {
            "freshness": freshness
            and {"warn_seconds": freshness.warn_seconds, "error_seconds": freshness.error_seconds},
            "made_from": [
                {"depth": depth, "column": name, "how": how} for depth, name, how in self.made_from
            ],
            "goes_to": list(self.goes_to),
            "read": dict(self.read),
            "column": None if self.column is None else str(self.column),
            "changed": None if changed is None else dict(changed.__dict__),
            "sample": None if sample is None else sample.__dict__ | {"examples": list(sample.examples)},
        }


@dataclass(frozen=True)
class FeatureCatalog:
    """Every entry of a project, in the order in which data flows."""

    entries: tuple[Entry, ...]

    def search(self, words: str) -> tuple[Entry, ...]:
        """Return the entries that have every word in their name, meaning, owner, type or origin; names first."""
        wanted = words.casefold().split()
        found = [entry for entry in self.entries if _has(_searched(entry), wanted)]
        return tuple(sorted(found, key=lambda entry: not _has(entry.name.casefold(), wanted)))

    def entry(self, name: str, kind: str | None = None) -> Entry:
        """Return the entry of a name, of the given kind if several have it.

        Raises CatalogError with near matches.
        """
        found = [one for one in self.entries if one.name == name and kind in (None, one.kind)]
        if found:
            return found[0]
        near = difflib.get_close_matches(name, [one.name for one in self.entries], n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise CatalogError(
            f"the catalog has no {excerpt(name)}: {hint}search it with `prefs catalog --search`"
        )


def _has(text: str, words: Sequence[str]) -> bool:
    return all(word in text for word in words)


def _searched(entry: Entry) -> str:
    parts = (entry.kind, entry.name, entry.meaning, entry.owner, entry.type, entry.entity, entry.origin)
    return " ".join(filter(None, parts)).casefold()


def load_catalog(project: Path, registry: Registry) -> FeatureCatalog:
    """Return the catalog of the project in this folder.

    Raises LineageError if its lineage is missing or stale, DeclarationError if its YAML cannot be read.
    """
    lineage = load_lineage(project, registry)
    # A service may have the registry and the lineage only.
    declared = read_project(project) if (project / PROJECT_FILE).is_file() else None
    return FeatureCatalog(tuple(_Builder(registry, lineage, project, declared).entries()))


class _Builder:
    def __init__(
        self, registry: Registry, lineage: Lineage, folder: Path, declared: ProjectYaml | None
    ) -> None:
        self.registry = registry
        self.lineage = lineage
        self.declared = declared
        self.models: Mapping[str, ModelYaml] = (
            {model.name: model for model in declared.models} if declared else {}
        )
        self._changes = last_changes(folder) if declared else {}

    def entries(self) -> Iterable[Entry]:
        for entity in self.registry.entities.values():
            yield self._entity(entity)
        for topic in self.registry.topics.values():
            yield from self._topic(topic)
        for tile in self.registry.tiles.values():
            yield from self._tile(tile)
        for domain in self.registry.contract.domains.values():
            yield from self._domain(domain)
        for relation in self.registry.preferences:
            yield from self._view(relation)

    def _entity(self, entity: Entity) -> Entry:
        keys = ", ".join(f"{key.name} ({key.type})" for key in entity.keys)
        topics = [topic.name for topic in self.registry.topics.values() if topic.entity == entity.name]
        domains = [one.key for one in self.registry.contract.domains.values() if one.entity == entity.name]
        return self._changed(
            Entry(
                "entity",
                entity.name,
                f"Whom or what rows are about, by {keys}."
                + (" A person, whom `prefs erase` can erase." if entity.erasable else ""),
                type=", ".join(key.type for key in entity.keys),
                entity=entity.name,
                origin=f"Topics about it: {', '.join(topics)}." if topics else "",
                goes_to=tuple(domains),
                read={"python": f'ProfileClient("{REGISTRY_FILE}", entity="{entity.name}")'}
                if domains
                else {},
                file=PROJECT_FILE,
            )
        )

    def _topic(self, topic: TopicDeclaration) -> Iterable[Entry]:
        model = self.models.get(topic.relation)
        file = model.file if model else None
        freshness = self.registry.contract.freshness.topics.get(topic.name)
        about = {"entity": topic.entity, "owner": self._owner(model), "freshness": freshness, "file": file}
        fields_ = tuple(f"{topic.relation}.{name}" for name in topic.by_name)
        yield self._changed(
            Entry(
                "topic",
                topic.name,
                (model.description if model else "") or f"The messages of {topic.name}.",
                goes_to=self._readers(topic.relation) or fields_,
                read={"sql": f"select * from {topic.relation} limit 10"},
                **about,  # type: ignore[arg-type]
            )
        )
        for one in topic.fields:
            column = Column(topic.relation, one.name)
            yield self._changed(
                Entry(
                    "field",
                    f"{topic.name}.{one.name}",
                    one.description,
                    type=one.type,
                    is_personal=self.registry.is_personal(topic.relation, one.name),
                    origin=f"Field {one.name} of the topic's messages.",
                    goes_to=self._goes_to(column),
                    read={"sql": f"select {one.name} from {topic.relation} limit 10"},
                    column=column,
                    **about,  # type: ignore[arg-type]
                )
            )

    def _tile(self, tile: TileDeclaration) -> Iterable[Entry]:
        model = self.models.get(tile.relation)
        export = self.registry.contract.freshness.export
        about = {
            "entity": tile.entity,
            "owner": self._owner(model) or self.registry.contract.owner,
            "file": model.file if model else None,
        }
        key = self.registry.entity(tile.entity).key
        yield self._changed(
            Entry(
                "tile",
                tile.relation,
                tile.description,
                freshness=export,
                goes_to=(*self._readers(tile.relation), f"Iceberg {tile.table}"),
                read={
                    "sql": f"select * from {tile.relation} where {key.name} = {_example(key.type)}",
                    "training": f"the Iceberg table {tile.table}: one row per {tile.entity} and {tile.day}",
                },
                **about,  # type: ignore[arg-type]
            )
        )
        for name, one in tile.columns.items():
            yield self._changed(
                self._column(
                    "column",
                    f"{tile.relation}.{name}",
                    Column(tile.relation, name),
                    one.description,
                    one.type,
                ),
                owner=about["owner"],
                entity=tile.entity,
                file=about["file"],
                read={
                    "sql": f"select {tile.day}, {name} from {tile.relation} where {key.name} = {_example(key.type)}",
                    "training": f"the column {name} of the Iceberg table {tile.table}",
                },
            )

    def _domain(self, domain: Domain) -> Iterable[Entry]:
        model = self.models.get(domain.relation)
        entity = self.registry.entity(domain.entity)
        about = {
            "owner": domain.owner,
            "entity": domain.entity,
            "freshness": domain.freshness,
            "file": model.file if model else None,
        }
        table = self.registry.contract.table_of(domain).name
        yield self._changed(
            Entry(
                "domain",
                domain.key,
                domain.description,
                goes_to=(f"DynamoDB {table}", *(f"{domain.name}.{name}" for name in domain.attributes)),
                read=self._reads(domain, entity, None),
                **about,  # type: ignore[arg-type]
            )
        )
        for name, attribute in domain.attributes.items():
            entry = self._column(
                "attribute",
                f"{domain.name}.{name}",
                Column(domain.relation, name),
                attribute.description,
                attribute.type + (" or null" if attribute.nullable else ""),
            )
            yield self._changed(
                entry,
                **about,
                window_days=self._windows(domain).get(name),
                read=self._reads(domain, entity, name),
            )

    def _view(self, relation: str) -> Iterable[Entry]:
        view, model = self.registry.preferences[relation], self.models.get(relation)
        entity = self.registry.entity(view.entity)
        about = {
            "owner": self._owner(model) or self.registry.contract.owner,
            "entity": view.entity,
            "freshness": self.registry.contract.freshness.views,
            "file": model.file if model else None,
        }
        where = f"where {entity.key.name} = {_example(entity.key.type)}"
        yield self._changed(
            Entry(
                "view",
                relation,
                (model.description if model else "")
                or f"A view of {view.entity}, read over the Postgres wire.",
                goes_to=self._readers(relation),
                read={"sql": f"select {', '.join(view.reads)} from {relation} {where}"},
                **about,  # type: ignore[arg-type]
            )
        )
        for name in view.reads:
            declared = model.columns.get(name) if model else None
            yield self._changed(
                self._column(
                    "column",
                    f"{relation}.{name}",
                    Column(relation, name),
                    declared.description if declared else "",
                    declared.type if declared else None,
                ),
                **about,
                read={"sql": f"select {name} from {relation} {where}"},
            )

    def _column(self, kind: EntryKind, name: str, column: Column, meaning: str, type_: str | None) -> Entry:
        return Entry(
            kind,
            name,
            meaning,
            type=type_,
            is_personal=self.registry.is_personal(column.of, column.name),
            origin=origin(column, self.lineage),
            made_from=tuple(
                (depth, f"field {one}" if one.is_field else str(one), shown_kinds(kinds))
                for depth, one, kinds in walk(self.lineage, column)
            ),
            goes_to=self._goes_to(column),
            column=column,
        )

    def _goes_to(self, column: Column) -> tuple[str, ...]:
        stores = [store["text"] for store in stores_of(column, self.registry)]
        return (*stores, *map(str, sorted(self.lineage.readers(column))))

    def _readers(self, relation: str) -> tuple[str, ...]:
        return tuple(sorted(name for name, one in self.lineage.relations.items() if relation in one.reads))

    def _owner(self, model: ModelYaml | None) -> str | None:
        """Who owns a model: its own owner, else that of a domain that is made from it."""
        if model is None:
            return None
        owner = model.meta.get("owner")
        if isinstance(owner, str):
            return owner
        owners = {
            domain.owner
            for domain in self.registry.contract.domains.values()
            if any(one.of == model.name for name in domain.attributes for one in self._upstream(domain, name))
        }
        return ", ".join(sorted(owners)) or None

    def _upstream(self, domain: Domain, attribute: str) -> Iterable[Column]:
        return self.lineage.upstream(Column(domain.relation, attribute))

    def _reads(self, domain: Domain, entity: Entity, attribute: str | None) -> dict[str, str]:
        position = list(self.registry.contract.tables).index(domain.entity)
        path = "/v1/profiles" if position == 0 else f"/v1/{entity.name}/profiles"
        ids = [_example(key.type) for key in entity.keys]
        words = [one.strip("'") for one in ids]
        asked = ids[0].replace("'", '"') if len(ids) == 1 else f"({', '.join(ids)})".replace("'", '"')
        of = f".{domain.name}" + (f".{attribute}" if attribute else "")
        where = " and ".join(f"{key.name} = {one}" for key, one in zip(entity.keys, ids, strict=True))
        found = {
            "python": f'ProfileClient("{REGISTRY_FILE}", entity="{entity.name}").get({asked}){of}',
            "curl": f"curl 'http://127.0.0.1:8080{path}/{'/'.join(words)}?domains={domain.name}'",
            "sql": f"select {attribute or '*'} from {domain.relation} where {where}",
        }
        if attribute and attribute != LAST_EVENT_AT:
            sources = {one.of for one in self.lineage.sources(Column(domain.relation, attribute))}
            others = sorted(sources - self.registry.tiles.keys())
            found["training"] = (
                f"in no training set: it is made from {', '.join(others)}, which is not exported"
                if others
                else f"the column {attribute} of `prefs training-set --labels labels.csv`"
            )
        return found

    def _windows(self, domain: Domain) -> Mapping[str, int | None]:
        return self._window_days.get(domain.key, {})

    @cached_property
    def _window_days(self) -> Mapping[str, Mapping[str, int | None]]:
        # Imported here, because reading SQL takes longer to import than all else.
        from dagster_prefs.serving.why import window_days

        return {
            domain.key: {name: window_days(self.registry, domain, name) for name in domain.attributes}
            for domain in self.registry.contract.domains.values()
        }

    def _changed(self, entry: Entry, **values: Any) -> Entry:
        whole = replace(entry, **values)
        if whole.file is None:
            return whole
        of = [whole.file]
        relation = whole.column.of if whole.column else whole.name
        if self.declared and (sql := self.declared.sql_file(relation)):
            of.append(sql)
        changes = [self._changes[name] for name in of if name in self._changes]
        return replace(whole, changed=max(changes, key=lambda one: one.at, default=None))


def _example(kind: str) -> str:
    """An id of a key's type, as SQL writes it."""
    return {"bigint": "42", "uuid": "'0f8fad5b-d9cb-469f-a165-70867728950e'"}.get(kind, "'u1'")


def last_changes(folder: Path) -> dict[str, Change]:
    """Return the last commit of each file below a folder, by path in it; empty where git knows no such folder."""
    command = [
        "git",
        "-C",
        str(folder),
        "log",
        "--format=%x00%h%x09%an%x09%aI",
        "--name-only",
        "--relative",
        "--",
        ".",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return {}
    found: dict[str, Change] = {}
    for commit in done.stdout.split("\0")[1:]:
        head, *names = commit.strip().splitlines()
        change = Change(*head.split("\t"))
        for name in filter(None, names):
            found.setdefault(name, change)
    return found


def sampled(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    registry: Registry,
    entries: Sequence[Entry],
) -> tuple[Entry, ...]:
    """Return entries with examples and the share of NULLs of their columns, from the first rows of each relation.

    Canaries are left out. A relation that does not exist leaves its entries as they are. Raises psycopg's errors
    otherwise.
    """
    wanted: dict[str, list[str]] = {}
    for entry in entries:
        if entry.column is not None:
            wanted.setdefault(entry.column.of, []).append(entry.column.name)
    found = {
        (relation, name): sample
        for relation, names in wanted.items()
        for name, sample in _sample(connection, engine, registry, relation, names).items()
    }
    return tuple(
        replace(entry, sample=_shown(entry, found.get((entry.column.of, entry.column.name))))
        if entry.column is not None
        else entry
        for entry in entries
    )


def _shown(entry: Entry, sample: Sample | None) -> Sample | None:
    return replace(sample, examples=()) if sample is not None and entry.is_personal else sample


def _sample(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    registry: Registry,
    relation: str,
    names: Sequence[str],
) -> dict[str, Sample]:
    from psycopg import sql

    columns = list(dict.fromkeys(names))
    there = connection.execute(
        "select column_name from information_schema.columns where table_schema = %s and table_name = %s",
        [engine.schema, relation],
        prepare=False,
    ).fetchall()
    columns = [name for name in columns if (name,) in there]
    if not columns:
        return {}
    present = {name for (name,) in there}
    keys = {one.key.name: one.key for one in registry.entities.values()}
    people = [people_only(key) for name, key in keys.items() if name in present]
    statement = sql.SQL("select {} from {} where {} limit {}").format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.Identifier(engine.schema, relation),
        sql.SQL(" and ").join(people) if people else sql.SQL("true"),
        sql.Literal(SAMPLED_ROWS),
    )
    rows = connection.execute(statement, prepare=False).fetchall()
    found = {}
    for place, name in enumerate(columns):
        values = [row[place] for row in rows]
        examples = dict.fromkeys(str(value)[:EXAMPLE_CHARACTERS] for value in values if value is not None)
        nulls = sum(value is None for value in values)
        found[name] = Sample(len(rows), nulls / len(rows) if rows else None, tuple(examples)[:MOST_EXAMPLES])
    return found
