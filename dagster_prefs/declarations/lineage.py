"""The lineage of each column: from the fields of a topic's messages to attributes and training columns.

`prefs generate` traces the compiled SQL of every view (see `trace`) and writes `lineage.json` beside the registry,
whose hashes it names: it is refused when the project has changed since. The first step, from a message's field to
the column of its typed event, needs no SQL: the typed model is generated from the declaration of its fields. A test
compares that step with what the generated SQL reads.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dagster_prefs.declarations.registry import REGISTRY, Entity, Registry, TopicDeclaration
from dagster_prefs.errors import PrefsError, excerpt

LINEAGE = "lineage.json"
# Incremented when an older reader would misinterpret the file, or when columns are traced in another way.
FORMAT = 1

Kind = Literal["identity", "transformation", "aggregation", "condition", "order", "filter", "join", "group"]
# In the order of weight: a value is made from the first three, and chosen or arranged by the next two; the last three
# decide which rows count, and which belong together.
KINDS: tuple[Kind, ...] = (
    "identity", "transformation", "aggregation", "condition", "order", "filter", "join", "group",
)  # fmt: skip
VALUES = frozenset(KINDS[:3])
ROWS = frozenset(KINDS[5:])


class LineageError(PrefsError):
    """The lineage is missing or stale, or lacks a requested name."""


@dataclass(frozen=True, order=True, slots=True)
class Column:
    """A column of a relation, or with `is_field` a field of a topic's messages."""

    of: str
    name: str
    is_field: bool = False

    def __str__(self) -> str:
        return f"{self.of}.{self.name}"


# What a column depends on, and how.
Sources = dict[Column, frozenset[Kind]]


def merged(*sources: Sources) -> Sources:
    """Return the union of several sources."""
    found: Sources = {}
    for one in sources:
        for column, kinds in one.items():
            found[column] = found.get(column, frozenset()) | kinds
    return found


def composed(kind: Kind, sources: Sources) -> Sources:
    """Return the sources of a column that depends, as `kind` says, on a column with the given sources."""
    return {column: frozenset(_composed(kind, one) for one in kinds) for column, kinds in sources.items()}


def _composed(outer: Kind, inner: Kind) -> Kind:
    if outer == "identity" or inner in ROWS:
        # What decides the rows of an inner query also decides those of the outer, however it uses the values.
        return inner
    if outer not in VALUES:
        return outer
    if inner not in VALUES:
        return inner
    return "aggregation" if "aggregation" in (outer, inner) else "transformation"


def decisive(sources: Sources) -> Sources:
    """Return what a value is made from or chosen by; for a count of rows, what decides the rows."""
    found = {column: kept for column, kinds in sources.items() if (kept := kinds - ROWS)}
    return found or dict(sources)


def shown_kinds(kinds: frozenset[Kind]) -> str:
    """Return kinds as text, what a value is made from first."""
    return ", ".join(kind for kind in KINDS if kind in kinds)


@dataclass(frozen=True)
class RelationLineage:
    """What a relation's columns depend on: each by `columns`, and all of them by `rows`.

    `reads` are the relations whose rows it has, including those of which it reads no column, as a count does.
    `untraced` says why the query could not be traced; it is empty if it was.
    """

    rows: Sources
    columns: Mapping[str, Sources]
    reads: tuple[str, ...] = ()
    untraced: str = ""


@dataclass(frozen=True)
class Lineage:
    """The lineage of a project's columns.

    `queries` has the compiled SQL of the preference views of which the registry has none.
    """

    topics: Mapping[str, TopicDeclaration]
    entities: Mapping[str, Entity]
    relations: Mapping[str, RelationLineage]
    queries: Mapping[str, str] = field(default_factory=dict)
    _fields: dict[Column, Sources] = field(default_factory=dict, repr=False)
    _upstream: dict[Column, Sources] = field(default_factory=dict, repr=False)

    @cached_property
    def typed(self) -> Mapping[str, TopicDeclaration]:
        """Typed relation → its topic."""
        return {topic.relation: topic for topic in self.topics.values()}

    def columns(self, relation: str) -> tuple[str, ...]:
        """Return the columns of a relation; empty if it is unknown or could not be traced."""
        if topic := self.typed.get(relation):
            return tuple(topic.by_name)
        return tuple(self.relations[relation].columns) if relation in self.relations else ()

    def sources(self, column: Column) -> Sources:
        """Return what a column depends on directly: columns of relations that its relation reads, or fields."""
        if column.is_field:
            return {}
        if topic := self.typed.get(column.of):
            if column.name not in topic.by_name:
                return {}
            read: Sources = {Column(topic.name, column.name, is_field=True): frozenset({"identity"})}
            return merged(read, self._decided(topic))
        found = self.relations.get(column.of)
        return (
            merged(found.columns[column.name], found.rows) if found and column.name in found.columns else {}
        )

    def _decided(self, topic: TopicDeclaration) -> Sources:
        """Return the fields that decide which messages of a topic become events: one message per identity does,
        and an erasure leaves out a key's earlier messages."""
        names = [topic.identity]
        if topic.entity:
            names += [self.entities[topic.entity].key.name, *([topic.time] if topic.time else [])]
        return {Column(topic.name, name, is_field=True): frozenset({"filter"}) for name in names}

    def fields(self, column: Column) -> Sources:
        """Return the fields of messages that a column depends on, through all relations in between."""
        if column.is_field or column.name not in self.columns(column.of):
            return {}
        if column not in self._fields:
            found = self._fields_of(self.sources(column))
            self._fields[column] = merged(found, self._fields_of_rows(column.of))
        return self._fields[column]

    def _fields_of(self, sources: Sources) -> Sources:
        found: Sources = {}
        for source, kinds in sources.items():
            read = {source: frozenset[Kind]({"identity"})} if source.is_field else self.fields(source)
            found = merged(found, *(composed(kind, read) for kind in kinds))
        return found

    def _fields_of_rows(self, relation: str) -> Sources:
        if topic := self.typed.get(relation):
            return self._decided(topic)
        found = self.relations.get(relation)
        if found is None:
            return {}
        return merged(self._fields_of(found.rows), *(self._fields_of_rows(name) for name in found.reads))

    def readers(self, column: Column) -> Sources:
        """Return the columns that depend on a column or field directly, and how."""
        return dict(self._readers.get(column, {}))

    @cached_property
    def _readers(self) -> Mapping[Column, Sources]:
        found: dict[Column, Sources] = {}
        for relation in (*self.typed, *self.relations):
            for name in self.columns(relation):
                for source, kinds in self.sources(Column(relation, name)).items():
                    found.setdefault(source, {})[Column(relation, name)] = kinds
        return found

    def goes_to(self, column: Column) -> Sources:
        """Return every column that depends on a column or field, directly or indirectly."""
        found: Sources = {}
        for relation in (*self.typed, *self.relations):
            for name in self.columns(relation):
                reader = Column(relation, name)
                if kinds := (self.fields(reader) if column.is_field else self.upstream(reader)).get(column):
                    found[reader] = kinds
        return found

    def upstream(self, column: Column) -> Sources:
        """Return every column and field that a column depends on, directly or indirectly."""
        if column not in self._upstream:
            direct = self.sources(column)
            further = [
                composed(kind, self.upstream(source))
                for source, kinds in direct.items()
                if not source.is_field
                for kind in kinds
            ]
            self._upstream[column] = merged(direct, *further)
        return self._upstream[column]


def column_of(name: str, registry: Registry, lineage: Lineage) -> Column:
    """Return the column of a name: `domain.attribute`, `relation.column` or `topic.field`.

    Raises LineageError with near matches for an unknown name, and naming the reason for a column of a view that
    could not be traced.
    """
    of, _, column = name.rpartition(".")
    if of in registry.topics and column in registry.topics[of].by_name and of not in lineage.typed:
        return Column(of, column, is_field=True)
    for domain in registry.contract.domains.values():
        if of in (domain.name, domain.key) and column in domain.attributes:
            return Column(domain.relation, column)
    if column in lineage.columns(of):
        return Column(of, column)
    for tile in registry.tiles.values():
        if of == tile.table and column in tile.columns:
            return Column(tile.relation, column)
    if of in lineage.relations and (reason := lineage.relations[of].untraced):
        raise LineageError(f"the columns of {of} could not be traced: {reason}")
    known = known_names(registry, lineage)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise LineageError(
        f"unknown column {excerpt(name)}: {hint}name a domain's attribute, a relation's column or a topic's field "
        f"(example: {known[0] if known else 'watch.minutes'}); `prefs catalog` lists them"
    )


def known_names(registry: Registry, lineage: Lineage) -> list[str]:
    """Return every name that `column_of` knows."""
    names = [
        f"{domain.name}.{attribute}"
        for domain in registry.contract.domains.values()
        for attribute in domain.attributes
    ]
    names += [
        f"{relation}.{column}"
        for relation in (*lineage.relations, *lineage.typed)
        for column in lineage.columns(relation)
    ]
    names += [f"{topic.name}.{name}" for topic in registry.topics.values() for name in topic.by_name]
    names += [f"{tile.table}.{name}" for tile in registry.tiles.values() for name in tile.columns]
    return list(dict.fromkeys(names))


def origin(column: Column, lineage: Lineage) -> str:
    """Return a sentence on where a column comes from; empty if it is not known."""
    parts: dict[str, list[str]] = {"made from": [], "chosen or ordered by": [], "rows decided by": []}
    for one, kinds in sorted(lineage.fields(column).items()):
        how = "made from" if kinds & VALUES else "chosen or ordered by" if kinds - ROWS else "rows decided by"
        parts[how].append(str(one))
    text = "; ".join(f"{how} {', '.join(names)}" for how, names in parts.items() if names)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def digest_of(hashes: Mapping[str, str]) -> str:
    """Return the hash of a registry's hashes. A lineage states by it from which files it was made."""
    return hashlib.sha256(json.dumps(dict(sorted(hashes.items()))).encode()).hexdigest()


def render_lineage(
    relations: Mapping[str, RelationLineage], queries: Mapping[str, str], hashes: Mapping[str, str]
) -> str:
    """Render a lineage as stable JSON text, a line per column and source."""
    content = {
        "format": FORMAT,
        "files": digest_of(hashes),
        "relations": {
            name: {"untraced": one.untraced}
            if one.untraced
            else {
                "reads": list(one.reads),
                "rows": _sources_dict(one.rows),
                "columns": {column: _sources_dict(found) for column, found in one.columns.items()},
            }
            for name, one in sorted(relations.items())
        },
        "queries": dict(sorted(queries.items())),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _sources_dict(sources: Sources) -> dict[str, str]:
    return {str(column): shown_kinds(kinds) for column, kinds in sorted(sources.items())}


def parse_relations(content: Mapping[str, Any]) -> dict[str, RelationLineage]:
    """Parse the relations of a decoded lineage. Raises LineageError if it was written in another form."""
    if content.get("format") != FORMAT:
        raise LineageError(
            f"it has format {content.get('format')!r}, and this version reads {FORMAT}: run `prefs generate`"
        )
    try:
        return {
            name: RelationLineage(
                _parsed(one.get("rows", {})),
                {column: _parsed(found) for column, found in one.get("columns", {}).items()},
                tuple(one.get("reads", ())),
                one.get("untraced", ""),
            )
            for name, one in content["relations"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LineageError(
            f"`prefs generate` did not write it in this form ({error}): run `prefs generate` again"
        ) from None


def _parsed(content: Mapping[str, str]) -> Sources:
    found: Sources = {}
    for name, kinds in content.items():
        of, _, column = name.rpartition(".")
        unknown = set(kinds.split(", ")) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown kind {sorted(unknown)[0]}")
        found[Column(of, column)] = frozenset(kind for kind in KINDS if kind in kinds.split(", "))
    return found


@dataclass(frozen=True)
class Written:
    """The content of a lineage file, stale or not; `files` is the digest of the files that it was made from."""

    relations: Mapping[str, RelationLineage] = field(default_factory=dict)
    queries: Mapping[str, str] = field(default_factory=dict)
    files: str = ""


def read_lineage(folder: Path) -> Written:
    """Return a project's lineage, stale or not; empty if no file can be read.

    `prefs generate` writes it again.
    """
    try:
        content = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        return Written(parse_relations(content), dict(content["queries"]), str(content["files"]))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, LineageError):
        return Written()


def load_lineage(folder: Path, registry: Registry) -> Lineage:
    """Load the lineage of the project in this folder.

    Raises LineageError if there is none, or if the registry was generated from other files.
    """
    path = folder / LINEAGE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LineageError(
            f"{path} is missing: run `prefs generate` in the project, or copy it together with {REGISTRY}"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise LineageError(f"{path} cannot be read ({reason}): run `prefs generate` in the project") from None
    try:
        relations = parse_relations(content if isinstance(content, dict) else {})
    except LineageError as error:
        raise LineageError(f"{path}: {error}") from None
    if content.get("files") != digest_of(registry.hashes):
        raise LineageError(
            f"{path} is stale: it was made from other files than {REGISTRY}: run `prefs generate` and commit what "
            "it writes"
        )
    return Lineage(registry.topics, registry.entities, relations, dict(content.get("queries", {})))


def walk(lineage: Lineage, column: Column, depth: int = 0) -> Iterator[tuple[int, Column, frozenset[Kind]]]:
    """Yield what a column is made from, step by step to the fields: (depth, column, how), nearest first."""
    for source, kinds in sorted(decisive(lineage.sources(column)).items()):
        yield depth, source, kinds
        yield from walk(lineage, source, depth + 1)
