"""The problems found by the checks of declarations, and the lookups that the checks share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

from dagster_prefs.declarations.names import NAME_BYTES, QUERY_SUFFIX, bytes_too_many
from dagster_prefs.declarations.read import Map, ModelYaml, ProjectYaml
from dagster_prefs.declarations.registry import Entity, Key

NAME = re.compile(r"[a-z][a-z0-9_]*")
# The SQL type of a key column, by the type that the entity declares.
KEY_SQL_TYPES: Mapping[str, str] = {"bigint": "bigint", "text": "text", "uuid": "text"}
# Relations of the platform itself.
PLATFORM_RELATIONS = (
    "rejected_events", "ingest_progress", "tile_fingerprints", "canary_keys", "deployments", "erased_subjects",
    "bootstrap_parts", "event_exports", "ingest_files", "kafka_topics", "replayed_events", "online_published",
    "raw_arrivals", "raw_retained", "live_pending", "live_views", "live_due", "live_builds", "live_changes",
    "live_outbox", "live_follower",
)  # fmt: skip
# Seconds: the default target, five from event to DynamoDB, for declarations without their own.
LIVE: Mapping[str, Any] = {"warn_seconds": 3, "error_seconds": 5}

EXAMPLES: Mapping[str, str] = {
    "topic": "topic: { kafka_topic: search_events, identity: event_id, entity: viewer, time: searched_at }",
    "tile": "tile: { entity: viewer, day: search_date }",
    "preference": "preference: { entity: shop_user, reads: [category, score] }",
    "domain": 'domain: { key: "engagement#search", owner: search@example.com }',
}


@dataclass
class Findings:
    """A project's entities and variables, its declarations' problems, and who declares each relation."""

    project: ProjectYaml
    variables: Mapping[str, Any]
    entities: Mapping[str, Entity] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    relations: dict[str, str] = field(default_factory=dict)
    domain_keys: dict[str, str] = field(default_factory=dict)

    def say(self, file: str, line: int, what: str, example: str) -> None:
        """Note a problem: what is wrong at this position, and a correct example."""
        self.problems.append(f"{file}:{line}: {what} (example: `{example}`)")

    def known(self, file: str, given: Map, known: Collection[str], where: str, example: str) -> None:
        """Note every unknown key of a declaration."""
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known) or f": known are {', '.join(known)}"
                self.say(file, given.at(name), f"{where} has no key {name!r}{hint}", example)

    def claim(self, relation: str, place: str, *, kept: bool = False, model: str = "") -> None:
        """Reserve a relation's name for a declaration; note a problem if it is taken or too long.

        `kept` marks a kept view, which has a second name; `model` is the name from which it is derived, if any.
        """
        if excess := bytes_too_many(relation, kept=kept):
            file, _, line = place.rpartition(":")
            given = model or relation
            what = f" of {relation}" if model else ""
            behind = f"; `{QUERY_SUFFIX}` goes behind a kept view's" if kept else ""
            most = len(given.encode()) - excess
            self.say(
                file,
                int(line),
                f"{given} is too long a name{what}: PostgreSQL's have {NAME_BYTES} bytes{behind}: use at most {most}",
                f"- name: {given[:20]}",
            )
        if relation in PLATFORM_RELATIONS:
            file, _, line = place.rpartition(":")
            self.say(
                file,
                int(line),
                f"{relation} is a relation of the platform: use another name",
                "- name: my_events",
            )
        elif relation in self.relations:
            file, _, line = place.rpartition(":")
            self.say(
                file,
                int(line),
                f"{relation} is also declared in {self.relations[relation]}: rename one of them",
                f"- name: other_{relation}",
            )
        else:
            self.relations[relation] = place

    def declaring(self, key: str) -> list[ModelYaml]:
        """Return the models whose meta has this key."""
        return [model for model in self.project.models if key in model.meta]

    def needs_sql(self, model: ModelYaml, kind: str) -> None:
        """Note a problem if the hand-written SQL of a model is missing."""
        if self.project.sql(model.name) is None:
            self.say(
                model.file,
                model.line,
                f"{model.name} is a {kind} and has no SQL: write {model.name}.sql next to its YAML",
                'select viewer_id, … from {{ ref("view_events") }}',
            )

    def entity(self, model: ModelYaml, given: Map, kind: str) -> Entity | None:
        """Return the entity that a declaration names; None, with a problem noted, if there is none."""
        name = given.get("entity")
        if found := self.entities.get(str(name)):
            return found
        what = (
            f"{model.name}: a {kind} without an entity"
            if name is None
            else f"{model.name}: no entity {name!r}"
        )
        self.say(
            model.file,
            given.at("entity"),
            f"{what}{did_you_mean(name, self.entities) if name else ''}: dbt_project.yml has "
            f"{', '.join(self.entities) or 'none'}",
            f"{kind}: {{ entity: {next(iter(self.entities), 'viewer')}, … }}",
        )
        return None

    def column(
        self, model: ModelYaml, given: Map, key: str, types: Collection[str], example: str
    ) -> str | None:
        """Return the column that `key` of a declaration names.

        Returns None, with a problem noted, if there is no such column of one of the types.
        """
        name = given.get(key)
        if name is None:
            self.say(model.file, given.line, f"{model.name}: {key} is missing", example)
            return None
        column = model.columns.get(str(name))
        if column is None:
            self.say(
                model.file,
                given.at(key),
                f"{model.name}: {key} names {name!r}, which is not one of its columns"
                f"{did_you_mean(name, model.columns)}",
                example,
            )
            return None
        if column.type not in types:
            self.say(
                model.file,
                column.line,
                f"{model.name}: {key} names the column {name}, which must be {' or '.join(types)}, "
                f"not {column.type or 'without data_type'}",
                f"- {{ name: {name}, data_type: {next(iter(types))} }}",
            )
            return None
        return str(name)

    def keys(self, model: ModelYaml, entity: Entity, keys: Iterable[Key]) -> None:
        """Note the keys that the model lacks as columns, or has with another type."""
        for key in keys:
            wanted, column = KEY_SQL_TYPES[key.type], model.columns.get(key.name)
            example = f"- {{ name: {key.name}, data_type: {wanted} }}"
            if column is None:
                self.say(
                    model.file,
                    model.content.at("columns"),
                    f"{model.name} has no column {key.name}, the key of entity {entity.name}"
                    f"{did_you_mean(key.name, model.columns)}",
                    example,
                )
            elif column.type != wanted:
                self.say(
                    model.file,
                    column.line,
                    f"{model.name}: {key.name}, the key of entity {entity.name}, must be {key.type}, "
                    f"not {column.type or 'without data_type'}",
                    example,
                )

    def freshness(self, model: ModelYaml, given: Map, example: str) -> Mapping[str, Any]:
        """Return the freshness target of a declaration, or the platform's default."""
        value = given.get("freshness")
        if value is None:
            return LIVE
        names = ("warn_seconds", "error_seconds")
        seconds = [value[name] for name in names if name in value] if isinstance(value, Map) else []
        numbers = [
            one for one in seconds if isinstance(one, int | float) and not isinstance(one, bool) and one > 0
        ]
        if (
            not isinstance(value, Map)
            or set(value) != set(names)
            or len(numbers) != 2
            or numbers[0] > numbers[1]
        ):
            self.say(
                model.file,
                given.at("freshness"),
                f"{model.name}: freshness must be two numbers of seconds, warn_seconds not above "
                f"error_seconds, not {plain(value)!r}",
                "freshness: { warn_seconds: 3, error_seconds: 5 }",
            )
            return LIVE
        return cast(Mapping[str, Any], plain(value))


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest of the known names, or an empty text."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a YAML value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Convert YAML content to JSON's types; a date becomes its text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
