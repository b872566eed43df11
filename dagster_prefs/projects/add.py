"""Scaffold a declaration with its SQL: a working example that passes all checks, to be edited afterwards."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import get_args

import yaml

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.declarations.findings import KEY_SQL_TYPES, NAME, did_you_mean, is_whole
from dagster_prefs.declarations.read import (
    PROJECT_FILE,
    ModelYaml,
    ProjectYaml,
    as_map,
    model_paths,
    read_project,
)
from dagster_prefs.declarations.registry import Entity, KeyType, Registry, TileDeclaration
from dagster_prefs.declarations.stale import current_registry
from dagster_prefs.projects.staged import Changes, Generate, ProjectRefused, changed_as_a_whole

_TEMPLATES = files("dagster_prefs.projects") / "templates" / "add"
_NUMBERS = ("bigint", "int", "decimal")
# Byte limit of each further key column. It keeps every sort key within DynamoDB's limit.
_KEY_BYTES = 64
# Lines of a rolling view: the newest event of a group, and the attribute made of it.
_NEWEST = re.compile(r"^( *)max\(last_event_at\) as last_event_at$", re.M)
_SERVED = re.compile(
    r'^( *)\{\{ epoch_ms\("(max\(last_event_at\)|\w+\.last_event_at)"\) \}\} as last_event_at$', re.M
)
_REF = re.compile(r"""\{\{\s*ref\(\s*["'](\w+)["']\s*\)\s*\}\}""")


@dataclass(frozen=True)
class Scaffold:
    """A scaffold's files, relative to the project (path → text), and the next steps."""

    files: Mapping[str, str]
    next_steps: tuple[str, ...]


@dataclass(frozen=True)
class Added:
    """The changes that a scaffold made, and the next steps."""

    changes: Changes
    next_steps: tuple[str, ...]


class Scaffolding:
    """The scaffolds of one project. Raises StaleRegistry if its files are not those of its registry.

    Every method returns a Scaffold. It raises ProjectRefused if a name is taken or malformed, if an option names
    something that the project does not have, or if an option is missing although there are several candidates.
    """

    def __init__(self, project: Path) -> None:
        self.folder = project
        # Commands are typed next to the dbt project's folder, so next steps name files from there.
        self._at = f"{project.absolute().name}/"
        self._registry: Registry = current_registry(project)
        self._project: ProjectYaml = read_project(project)
        self._models = model_paths(self._project.content)[0]

    def add(self, scaffold: Scaffold, generate: Generate) -> Added:
        """Write a scaffold and run `generate`. Changes everything or nothing.

        Raises what `generate` raises, e.g. DeclarationError for a name that the rules refuse.
        """

        def change(copy: Path) -> None:
            for name, text in scaffold.files.items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_text(text, encoding="utf-8")

        return Added(changed_as_a_whole(self.folder, change, generate), scaffold.next_steps)

    def entity(self, name: str, keys: Sequence[str] = ()) -> Scaffold:
        """Declare an entity with these keys (`column` or `column:type`), by default `<name>_id:text`."""
        self._free("entity", name, self._registry.entities)
        columns: dict[str, str] = {}
        for given in keys or (f"{name}_id:text",):
            column, _, kind = given.partition(":")
            kind = kind or "text"
            if not NAME.fullmatch(column) or kind not in get_args(KeyType):
                raise ProjectRefused(
                    f"{given!r} is not a key: give a column in lower case and one of {', '.join(get_args(KeyType))} "
                    f"(example: {name}_id:bigint)"
                )
            columns[column] = kind
        text = (self.folder / PROJECT_FILE).read_text(encoding="utf-8")
        keys_text = ", ".join(f"{column}: {kind}" for column, kind in columns.items())
        declared = f"{name}: {{ keys: {{ {keys_text} }}, table: {name}_profiles, erasable: true }}"
        return Scaffold(
            {PROJECT_FILE: _with_entity(text, declared)},
            (
                f"declare a topic about it: prefs add topic NAME --entity {name}",
                f"its table {name}_profiles is created with its first domain",
            ),
        )

    def topic(self, name: str, *, entity: str | None = None) -> Scaffold:
        """Declare a topic about an entity; its SQL is generated."""
        self._new_model("topic", name)
        about = self._entity(entity)
        keys = [
            f"{{ name: {key.name}, data_type: {KEY_SQL_TYPES[key.type]}, description: The {about.name}."
            for key in about.keys
        ]
        limit = f", config: {{ meta: {{ max_bytes: {_KEY_BYTES} }} }}"
        keys = [
            f"      - {text}{limit if number and KEY_SQL_TYPES[key.type] == 'text' else ''} }}"
            for number, (key, text) in enumerate(zip(about.keys, keys, strict=True))
        ]
        path = f"{self._models}/{name}.yml"
        return Scaffold(
            {path: _fill("topic.yml", name=name, entity=about.name, keys=_join(keys))},
            (
                f"edit the fields in {self._at}{path}, then run `prefs generate`",
                f"count its events by day: prefs add tile {about.name}_{name}_1d --topic {name}",
            ),
        )

    def tile(self, name: str, *, topic: str | None = None) -> Scaffold:
        """Declare a daily tile over a topic: its events, and the sum of its first number."""
        self._new_model("tile", name)
        timed = {one.name: one for one in self._registry.topics.values() if one.entity and one.time}
        read = timed[_chosen("topic", topic, timed)]
        entity = self._registry.entity(str(read.entity))
        taken = {*entity.key_names, "event_date", "events", "last_event_at"}
        summed = next((one for one in read.fields if one.type in _NUMBERS and one.name not in taken), None)
        measures_sql, measures_yaml = [], []
        if summed is not None:
            kind = "decimal" if summed.type == "decimal" else "bigint"
            cast = "::bigint" if kind == "bigint" else ""
            measures_sql.append(f"    coalesce(sum({summed.name}), 0){cast} as {summed.name},")
            measures_yaml.append(
                f"      - {{ name: {summed.name}, data_type: {kind}, description: The sum of {summed.name}. }}"
            )
        values = {
            "name": name,
            "entity": entity.name,
            "topic": read.relation,
            "time": str(read.time),
            "by": ", ".join(entity.key_names),
        }
        path = f"{self._models}/{name}"
        return Scaffold(
            {
                f"{path}.sql": _fill(
                    "tile.sql", keys=_lines(entity.key_names), measures=_join(measures_sql), **values
                ),
                f"{path}.yml": _fill(
                    "tile.yml", keys=_key_columns(entity), measures=_join(measures_yaml), **values
                ),
            },
            (
                f"count what you need in {self._at}{path}.sql and describe it in {self._at}{path}.yml, "
                "then run `prefs generate`",
                f"serve it: prefs add domain NAME --tile {name}",
            ),
        )

    def domain(self, name: str, *, tile: str | None = None) -> Scaffold:
        """Declare a domain over a tile: a rolling view whose attributes add up the tile's numbers.

        `name` is `<product>#<domain>`, or the domain alone if the product can be inferred.
        """
        read = self._registry.tiles[_chosen("tile", tile, self._registry.tiles)]
        entity = self._registry.entity(read.entity)
        domains = self._registry.contract.domains
        product, _, short = name.rpartition("#")
        products = {key.split("#")[0] for key in domains}
        if not product:
            product = next(iter(products)) if len(products) == 1 else self._registry.project
        self._free("domain", f"{product}#{short}", domains, part=short)
        if entity.table is None:
            raise ProjectRefused(
                f"entity {entity.name} has no table, which a domain needs: write `table: {entity.name}_profiles` in "
                f"{PROJECT_FILE}"
            )
        relation = f"{entity.name}_{short}_rolling"
        self._new_model("domain", relation)
        window, days = self._window()
        numbers = [
            column
            for column, one in read.columns.items()
            if one.type in _NUMBERS and column not in entity.key_names
        ]
        measures_sql, measures_yaml = [], []
        # A training set has one column for each attribute of an entity, of whichever domain.
        taken = {
            one for domain in domains.values() if domain.entity == entity.name for one in domain.attributes
        }

        def named(what: str) -> str:
            attribute = f"{what}_{days}d"
            return f"{short}_{attribute}" if attribute in taken else attribute

        for column in numbers[:2]:
            expression, kind = _sum(read, column)
            measures_sql.append(f"    {expression} as {named(column)},")
            measures_yaml.append(
                _attribute(named(column), kind, f"The sum of {column} in the {days}-day window.")
            )
        if not numbers:
            measures_sql.append(f"    count(*) as {named('days')},")
            measures_yaml.append(
                _attribute(named("days"), "bigint", f"Rows of {read.relation} in the window.")
            )
        values = {
            "name": relation,
            "key": f"{product}#{short}",
            "entity": entity.name,
            "tile": read.relation,
            "day": read.day,
            "first": entity.key.name,
            "window": window,
            "days": str(days),
            "by": ", ".join(entity.key_names),
        }
        path = f"{self._models}/{relation}"
        return Scaffold(
            {
                f"{path}.sql": _fill(
                    "domain.sql", keys=_lines(entity.key_names), measures=_join(measures_sql), **values
                ),
                f"{path}.yml": _fill(
                    "domain.yml",
                    keys=_key_columns(entity, unique=len(entity.keys) == 1),
                    measures=_join(measures_yaml),
                    **values,
                ),
            },
            (
                f"compute your attributes in {self._at}{path}.sql and describe them in {self._at}{path}.yml, "
                "then run `prefs generate`",
                "deploy and try it: prefs plan, prefs apply, prefs demo",
            ),
        )

    def attribute(self, name: str, *, domain: str | None = None, column: str | None = None) -> Scaffold:
        """Add an attribute to a rolling view: the sum of a tile's column, or the number of the tile's rows."""
        domains = self._registry.contract.domains
        named = {one.name: one for one in domains.values()} | dict(domains)
        served: Domain = named[_chosen("domain", domain, domains, also=named)]
        self._free("attribute", name, served.attributes)
        model = next(one for one in self._project.models if one.name == served.relation)
        if name in model.columns:
            raise ProjectRefused(f"{served.relation} already has the column {name}: choose another name")
        file = str(self._project.sql_file(model.name))
        text, kind, what = self._with_attribute(file, name, column)
        return Scaffold(
            {file: text, model.file: self._with_column(model, _attribute(name, kind, what).strip())},
            (
                f"edit its expression in {self._at}{file} and its description in {self._at}{model.file}, "
                "then run `prefs generate`",
                "deploy it: prefs plan, prefs apply",
            ),
        )

    def _with_attribute(self, file: str, name: str, column: str | None) -> tuple[str, str, str]:
        """Return the view's SQL with the attribute, its type and its description."""
        sql = (self.folder / file).read_text(encoding="utf-8")
        served, newest = _SERVED.findall(sql), _NEWEST.findall(sql)
        grouped = _SERVED.search(sql) if served and served[0][1].startswith("max(") else _NEWEST.search(sql)
        reference = _REF.search(sql, grouped.end()) if grouped else None
        tile = self._registry.tiles.get(reference[1]) if reference else None
        if len(served) != 1 or len(newest) > 1 or grouped is None or tile is None:
            raise ProjectRefused(
                f"{file} is not of the form that a scaffold can extend (one group of one tile with "
                "`max(last_event_at) as last_event_at`): write the attribute into it and its YAML by hand"
            )
        if column is None:
            expression, kind, what = "count(*)", "bigint", f"Rows of {tile.relation} in the window."
        elif column in tile.columns and tile.columns[column].type in _NUMBERS:
            expression, kind = _sum(tile, column)
            what = f"The sum of {column} in the window."
        else:
            numbers = [one for one, of in tile.columns.items() if of.type in _NUMBERS]
            raise ProjectRefused(
                f"{tile.relation} has no numeric column {column!r}{did_you_mean(column, numbers)}: it has "
                f"{', '.join(numbers) or 'none'}"
            )
        extended = f"{sql[: grouped.start()]}{grouped[1]}{expression} as {name},\n{sql[grouped.start() :]}"
        if newest:
            # The group is a CTE, so the final select must name the new column as well.
            last = next(_SERVED.finditer(extended))
            extended = (
                f"{extended[: last.start()]}{last[1]}{last[2].removesuffix('.last_event_at')}.{name},\n"
                f"{extended[last.start() :]}"
            )
        return extended, kind, what

    def _with_column(self, model: ModelYaml, column: str) -> str:
        text = (self.folder / model.file).read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        at = model.columns["last_event_at"].line - 1
        before = re.match(r"( *)- ", lines[at])
        if before is None:
            raise ProjectRefused(
                f"{model.file}:{at + 1}: the columns do not stand one per line: add `{column}` there by hand"
            )
        lines.insert(at, f"{before[1]}{column}\n")
        return "".join(lines)

    def _window(self) -> tuple[str, int]:
        """Return the SQL of the longest declared window, and its days."""
        windows = as_map(self._project.variables.get("windows"), 1)
        found = {name: days for name, days in windows.items() if is_whole(days)}
        if not found:
            return "28", 28
        name = max(found, key=lambda one: found[one])
        return f'var("windows").{name}', found[name]

    def _entity(self, name: str | None) -> Entity:
        return self._registry.entity(_chosen("entity", name, self._registry.entities))

    def _new_model(self, kind: str, name: str) -> None:
        self._free(kind, name, self._relations, file=self.folder / self._models / f"{name}.yml")

    @cached_property
    def _relations(self) -> set[str]:
        """Every model and relation of the project, generated ones included."""
        hand = {model.name for model in self._project.models}
        return hand | {path.stem for path in (self.folder / self._models).rglob("*.sql")}

    def _free(
        self,
        kind: str,
        name: str,
        taken: Collection[str],
        *,
        part: str | None = None,
        file: Path | None = None,
    ) -> None:
        if not NAME.fullmatch(name if part is None else part):
            raise ProjectRefused(
                f"{name!r} cannot name {_a(kind)}: use lower-case letters, digits and `_`, a letter first"
            )
        if name in taken or (file is not None and file.exists()):
            raise ProjectRefused(
                f"{name} exists already in {self.folder}: choose another name, or edit what is there"
            )


def _chosen(kind: str, name: str | None, there: Iterable[str], *, also: Collection[str] = ()) -> str:
    """Return the given name, or the only known name if none is given. Raises ProjectRefused."""
    known = list(there)
    if name is None and len(known) == 1:
        return known[0]
    if name is None and not known:
        raise ProjectRefused(
            f"the project has no {kind} to start from: add one first (`prefs add {kind} NAME`)"
        )
    if name is None:
        raise ProjectRefused(
            f"the project has several candidates for --{kind}: choose one of {', '.join(known)}"
        )
    if name not in known and name not in also:
        raise ProjectRefused(
            f"no {kind} {name!r}{did_you_mean(name, known)}: the project has {', '.join(known) or 'none'}"
        )
    return name


def _with_entity(text: str, declared: str) -> str:
    """Return dbt_project.yml with one more entry in `vars: entities`, and everything else unchanged."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    node = _value(_value(root, "vars"), "entities")
    if node is None or not node.value:
        raise ProjectRefused(
            f"{PROJECT_FILE} has no entities to add one to: write `entities: {{ {declared} }}` below `vars`"
        )
    if node.flow_style:
        # Insert after the last entry, before the closing bracket and the blanks in front of it.
        end = node.value[-1][1].end_mark.index
        return f"{text[:end]}, {declared}{text[end:]}"
    first, (_, last) = node.value[0][0], node.value[-1]
    lines = text.splitlines(keepends=True)
    # A block ends at the next token. Comments in front of that token belong to it, not to the block.
    at = last.end_mark.line + (1 if last.end_mark.column > first.start_mark.column else 0)
    while at > 0 and (not lines[at - 1].strip() or lines[at - 1].lstrip().startswith("#")):
        at -= 1
    if at and not lines[at - 1].endswith("\n"):
        lines[at - 1] += "\n"
    lines.insert(at, f"{' ' * first.start_mark.column}{declared}\n")
    return "".join(lines)


def _value(node: yaml.Node | None, key: str) -> yaml.MappingNode | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    found = next((value for name, value in node.value if name.value == key), None)
    return found if isinstance(found, yaml.MappingNode) else None


def _sum(tile: TileDeclaration, column: str) -> tuple[str, str]:
    """Return the SQL of a column's sum over a tile, and its type."""
    if tile.columns[column].type == "decimal":
        return f"coalesce(sum({column}), 0)", "decimal"
    return f"coalesce(sum({column}), 0)::bigint", "bigint"


def _attribute(name: str, kind: str, description: str) -> str:
    return (
        f"      - {{ name: {name}, data_type: {kind}, description: {description}, data_tests: [not_null] }}"
    )


def _key_columns(entity: Entity, *, unique: bool = False) -> str:
    tests = "[not_null, unique]" if unique else "[not_null]"
    return "\n".join(
        f"      - {{ name: {key.name}, data_type: {KEY_SQL_TYPES[key.type]}, description: The {entity.name}., "
        f"data_tests: {tests} }}"
        for key in entity.keys
    )


def _lines(names: Iterable[str]) -> str:
    return "\n".join(f"    {name}," for name in names)


def _join(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _fill(template: str, **values: str) -> str:
    text = Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)
    # The template leaves an empty line where a tile or a view has no measure.
    return re.sub(r"(,|\})\n\n(?= )", r"\1\n", text)


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'ae' else 'a'} {kind}"
