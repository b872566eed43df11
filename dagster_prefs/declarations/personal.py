"""Which columns hold personal data: the one rule for examples, statistics and drift.

Personal are the keys of erasable entities, the identities of the events about them, and what is declared `pii: true`,
usually at a field of a topic. It follows along column lineage to all that is made from such a column's values; what is
only chosen, filtered or grouped by them is not personal. `pii` of a column further down is final, for that column and
for what is made from it: `true` where lineage cannot know, `false` where a value no longer says anything about anybody,
such as a number of sessions.

`prefs generate` writes the result into the registry, where a review sees it, and which every reader has.
"""

from __future__ import annotations

from collections.abc import Iterable

from dagster_prefs.declarations.findings import Findings
from dagster_prefs.declarations.lineage import VALUES, Column, Lineage
from dagster_prefs.declarations.read import ModelYaml
from dagster_prefs.declarations.registry import personal_keys

PII = "pii"


def check_pii(findings: Findings, model: ModelYaml) -> None:
    """Note values of `pii` that are not true or false, and keys of people that are declared not to be personal."""
    keys = personal_keys(findings.entities)
    for column in model.columns.values():
        if PII not in column.meta:
            continue
        given, place = column.meta[PII], f"{model.name}.{column.name}"
        if not isinstance(given, bool):
            findings.say(
                model.file,
                column.meta.at(PII),
                f"{place}: pii must be true or false, not {given!r}",
                "config: { meta: { pii: true } }",
            )
        elif not given and column.name in keys:
            findings.say(
                model.file,
                column.meta.at(PII),
                f"{place}: it is a key of an erasable entity, which is always personal: remove pii",
                f"- {{ name: {column.name} }}",
            )


def personal_columns(models: Iterable[ModelYaml], lineage: Lineage) -> dict[str, tuple[str, ...]]:
    """Return the personal columns of each relation that has some: of typed events, tiles and views, as declared.

    A view whose SQL could not be traced may be made from anything: its columns are personal unless declared otherwise.
    """
    declared = {model.name: model for model in models}
    marks: dict[Column, bool] = {
        Column(name, column.name): column.meta[PII]
        for name, model in declared.items()
        for column in model.columns.values()
        if PII in column.meta
    }
    keys = personal_keys(lineage.entities)
    known: dict[Column, bool] = {}

    def is_personal(column: Column) -> bool:
        if column not in known:
            marked = True if column.name in keys else marks.get(column)
            known[column] = made_from_some(column) if marked is None else marked
        return known[column]

    def made_from_some(column: Column) -> bool:
        if topic := lineage.typed.get(column.of):
            about_people = topic.entity is not None and lineage.entities[topic.entity].erasable
            return about_people and column.name == topic.identity
        relation = lineage.relations.get(column.of)
        if relation is None:
            return False
        sources = relation.columns.get(column.name, {})
        return bool(relation.untraced) or any(
            is_personal(source) for source, kinds in sources.items() if kinds & VALUES
        )

    found = {
        name: tuple(column for column in model.columns if is_personal(Column(name, column)))
        for name, model in sorted(declared.items())
    }
    return {name: columns for name, columns in found.items() if columns}
