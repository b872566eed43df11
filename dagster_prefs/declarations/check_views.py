"""Check the declarations of views that are read for one key, and of how every view is kept current."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import cast, get_args

from dagster_prefs.declarations.check_topics import Topic
from dagster_prefs.declarations.findings import EXAMPLES, Findings, did_you_mean, is_whole, plain
from dagster_prefs.declarations.read import Map, ModelYaml, as_map
from dagster_prefs.declarations.registry import Keeping, KeptView, PreferenceView

PREFERENCE_KEYS = ("entity", "reads")
KEEP_KEYS = ("by", "whole", "every_seconds")
_EXAMPLE = "keep: { by: rebuilt, every_seconds: 300 }"
_REFERENCE = re.compile(r"""ref\(\s*["'](\w+)["']\s*\)""")
_PLAIN_VIEW = re.compile(r"""materialized\s*=\s*["'](?:view|ephemeral)["']""")


def references(sql: str) -> tuple[str, ...]:
    """Return the models that a model's SQL refers to, in order."""
    return tuple(dict.fromkeys(_REFERENCE.findall(sql)))


def check_preference(findings: Findings, model: ModelYaml) -> PreferenceView | None:
    """Return the preference view that a model's YAML declares; None, with its problems noted, if it is invalid."""
    given, example = as_map(model.meta["preference"], model.line), EXAMPLES["preference"]
    before = len(findings.problems)
    findings.known(model.file, given, PREFERENCE_KEYS, f"{model.name}: meta.preference", example)
    findings.needs_sql(model, "preference view")
    entity = findings.entity(model, given, "preference")
    if entity:
        findings.keys(model, entity, entity.keys)
    keys = [key.name for key in entity.keys] if entity else []
    reads = given.get("reads", [name for name in model.columns if name not in keys])
    unknown = [name for name in reads if name not in model.columns] if isinstance(reads, list) else []
    if not isinstance(reads, list) or not reads or unknown:
        findings.say(
            model.file,
            given.at("reads"),
            f"{model.name}: reads must be a list of columns of the view, which are read for one key, "
            f"not {plain(reads)!r}"
            f"{did_you_mean(unknown[0], model.columns) if unknown else ''}",
            example,
        )
    if len(findings.problems) > before or not entity:
        return None
    return PreferenceView(model.name, entity.name, tuple(map(str, reads)))


def is_kept(findings: Findings, model: ModelYaml) -> bool:
    """Return whether a model is a hand-written materialized view, which the embedded engine keeps current."""
    sql = findings.project.sql(model.name)
    materialized = str(model.config.get("materialized", "materialized_view"))
    written = sql is not None and "topic" not in model.meta and not _PLAIN_VIEW.search(sql)
    return written and materialized == "materialized_view"


def check_kept(findings: Findings, model: ModelYaml, topics: Sequence[Topic]) -> KeptView | None:
    """Return how a hand-written view is kept current; None if it is no such view, or its declaration is invalid."""
    if not is_kept(findings, model):
        if "keep" in model.meta:
            what = "a topic's typed model" if "topic" in model.meta else "not a materialized view"
            findings.say(
                model.file,
                model.meta.at("keep"),
                f"{model.name}: meta.keep is only for materialized views that are written by hand, and this is {what}: "
                "remove it",
                _EXAMPLE,
            )
        return None
    before = len(findings.problems)
    inputs = references(findings.project.sql(model.name) or "")
    given = as_map(model.meta.get("keep"), model.line)
    if "keep" in model.meta:
        _check_given(findings, model, inputs)
    reference_data = {topic.declared.relation for topic in topics if topic.declared.keep == "last"}
    whole = [str(name) for name in given.get("whole") or [] if name in inputs]
    whole += [name for name in inputs if name in reference_data and name not in whole]
    unique = next(iter(model.unique_keys), [])
    key = _entity_key(findings, model, [name for name in inputs if name not in whole])
    by = given.get("by") or ("key" if key else None)
    if by is None:
        findings.say(
            model.file,
            model.line,
            f"{model.name}: the way to keep it current cannot be inferred from its YAML, because no unique index has "
            f"the keys of an entity that all its inputs have ({', '.join(inputs) or 'it has none'}): declare meta.keep",
            _EXAMPLE,
        )
    elif by in ("key", "merging") and not (key or unique):
        findings.say(
            model.file,
            model.meta.at("keep"),
            f"{model.name}: keep by {by} needs a unique index, which names the key of a row",
            "indexes: [{ columns: [learner_id], unique: true }]",
        )
    if len(findings.problems) > before:
        return None
    return KeptView(
        relation=model.name,
        by=cast(Keeping, by),
        key=tuple(key or unique) if by == "key" else tuple(unique),
        inputs=inputs,
        whole=tuple(whole),
        every_seconds=given.get("every_seconds"),
    )


def _check_given(findings: Findings, model: ModelYaml, inputs: Collection[str]) -> None:
    given = model.meta["keep"]
    if not isinstance(given, Map):
        findings.say(
            model.file,
            model.meta.at("keep"),
            f"{model.name}: meta.keep must be a mapping, not {given!r}",
            _EXAMPLE,
        )
        return
    findings.known(model.file, given, KEEP_KEYS, f"{model.name}: meta.keep", _EXAMPLE)
    by, every, whole = given.get("by"), given.get("every_seconds"), given.get("whole", [])
    if by is not None and by not in get_args(Keeping):
        findings.say(
            model.file,
            given.at("by"),
            f"{model.name}: keep by must be one of {', '.join(get_args(Keeping))}, not {by!r}",
            _EXAMPLE,
        )
    if (by == "rebuilt") != (every is not None) or (every is not None and (not is_whole(every) or every < 1)):
        findings.say(
            model.file,
            given.at("every_seconds"),
            f"{model.name}: every_seconds must be a whole number of at least 1 for a view that is kept by "
            f"rebuilt, and absent for any other, not {every!r}",
            _EXAMPLE,
        )
    if not isinstance(whole, list) or (unknown := [name for name in whole if name not in inputs]):
        near = did_you_mean(unknown[0], inputs) if isinstance(whole, list) else ""
        findings.say(
            model.file,
            given.at("whole"),
            f"{model.name}: whole must be a list of relations that the view reads "
            f"({', '.join(inputs) or 'none'}), not {plain(whole)!r}{near}",
            "whole: [items]",
        )


def _entity_key(findings: Findings, model: ModelYaml, inputs: Collection[str]) -> list[str]:
    """Return the keys of an entity in the view's unique index, if all inputs that are read by key have them too."""
    columns = {one.name: one.columns for one in findings.project.models}
    for entity in findings.entities.values():
        names = [key.name for key in entity.keys]
        if (
            inputs
            and any(set(names) <= set(unique) for unique in model.unique_keys)
            and all(set(names) <= columns.get(name, {}).keys() for name in inputs)
        ):
            return names
    return []
