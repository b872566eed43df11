"""Read the declarations of a dbt project without dbt: its YAML, with the line of every key.

dbt cannot parse a project at the time of generating: a tile may refer to a typed model whose SQL is not generated yet,
and a removed folder leaves dangling references.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dagster_prefs.errors import PrefsError

PROJECT_FILE = "dbt_project.yml"
# The folder of generated models, below the first model path; and the folder of the generated macro, in the project's
# folder.
GENERATED = "generated"
YAML_SUFFIXES = (".yml", ".yaml")


class DeclarationError(PrefsError):
    """Declarations of a project are invalid; one sentence per problem, each with file and line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Map(dict[Any, Any]):
    """A YAML mapping; `line` is its first line, `lines` the line of each key, counted from 1."""

    line: int
    lines: dict[Any, int]

    def at(self, key: str) -> int:
        """Return the line of a key, or of the mapping if it has no such key."""
        return self.lines.get(key, self.line)


# Equivalent to SafeLoader, and nine times as fast where libyaml is available.
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(FAST_LOADER):  # type: ignore[misc, valid-type]
    """A YAML loader like dbt's, with line numbers, that rejects duplicate keys."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[Map]:
    found = Map()
    found.line, found.lines = node.start_mark.line + 1, {}
    yield found
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key_node.tag != "tag:yaml.org,2002:merge" and key in found.lines:
            raise yaml.MarkedYAMLError(
                problem=f"{key!r} is given twice, first in line {found.lines[key]}: remove one of them",
                problem_mark=key_node.start_mark,
            )
        found.lines[key] = key_node.start_mark.line + 1
    loader.flatten_mapping(node)
    found.update(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


@dataclass(frozen=True)
class ModelYaml:
    """The YAML of one model; `file` is relative to the project's folder."""

    file: str
    content: Map

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.content["name"])

    @property
    def line(self) -> int:
        """The line where the model begins."""
        return self.content.line

    @property
    def description(self) -> str:
        """The description on one line."""
        return " ".join(str(self.content.get("description") or "").split())

    @property
    def config(self) -> Map:
        """The model's `config`."""
        return as_map(self.content.get("config"), self.line)

    @cached_property
    def meta(self) -> Map:
        """The model's `config.meta`."""
        return as_map(self.config.get("meta"), self.line)

    @cached_property
    def columns(self) -> dict[str, ColumnYaml]:
        """The model's columns by name, in declared order."""
        columns = [ColumnYaml(value) for value in self.content.get("columns") or [] if isinstance(value, Map)]
        return {column.name: column for column in columns}

    @property
    def unique_keys(self) -> list[list[str]]:
        """The columns of each unique index."""
        indexes = self.config.get("indexes")
        return [
            [str(name) for name in index.get("columns") or []]
            for index in (indexes if isinstance(indexes, list) else [])
            if isinstance(index, Map) and index.get("unique")
        ]


@dataclass(frozen=True)
class ColumnYaml:
    """The YAML of one column."""

    content: Map

    @property
    def name(self) -> str:
        """The column's name."""
        return str(self.content.get("name"))

    @property
    def line(self) -> int:
        """The line where the column begins."""
        return self.content.line

    @property
    def type(self) -> str:
        """`data_type` in lower case."""
        return str(self.content.get("data_type") or "").strip().lower()

    @property
    def description(self) -> str:
        """The description on one line."""
        return " ".join(str(self.content.get("description") or "").split())

    @cached_property
    def meta(self) -> Map:
        """The column's `config.meta`."""
        config = as_map(self.content.get("config"), self.line)
        return as_map(config.get("meta"), self.line)

    @property
    def is_not_null(self) -> bool:
        """Whether a test or a constraint ensures that it is never NULL."""
        tests = [*(self.content.get("data_tests") or []), *(self.content.get("tests") or [])]
        constraints = self.content.get("constraints") or []
        return any(
            test == "not_null" or (isinstance(test, dict) and "not_null" in test) for test in tests
        ) or (any(isinstance(one, dict) and one.get("type") == "not_null" for one in constraints))


@dataclass(frozen=True)
class ExposureYaml:
    """The YAML of one exposure."""

    file: str
    content: Map

    @property
    def name(self) -> str:
        """The exposure's name."""
        return str(self.content.get("name"))

    @property
    def meta(self) -> Map:
        """The exposure's `config.meta`."""
        config = as_map(self.content.get("config"), self.content.line)
        return as_map(config.get("meta"), self.content.line)


@dataclass(frozen=True)
class ProjectYaml:
    """A dbt project as it is written by hand, without generated models.

    `files` are all files that affect a deployment, generated ones included, relative to `folder` in order.
    """

    folder: Path
    content: Map
    models: list[ModelYaml] = field(default_factory=list)
    exposures: list[ExposureYaml] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The project's name."""
        return str(self.content.get("name"))

    @property
    def variables(self) -> Map:
        """The project's `vars`."""
        return as_map(self.content.get("vars"), self.content.line)

    @property
    def generated(self) -> Path:
        """The folder of the generated models."""
        return self.folder / model_paths(self.content)[0] / GENERATED

    @property
    def queries(self) -> tuple[str, ...]:
        """The names of the hand-written models with SQL, in order."""
        return tuple(sorted(self._sql))

    def sql(self, model: str) -> str | None:
        """Return the SQL of a hand-written model, None if it has none."""
        path = self._sql.get(model)
        return None if path is None else path.read_text(encoding="utf-8")

    def sql_file(self, model: str) -> str | None:
        """Return the SQL file of a hand-written model, relative to the project's folder."""
        path = self._sql.get(model)
        return None if path is None else path.relative_to(self.folder).as_posix()

    @cached_property
    def _sql(self) -> dict[str, Path]:
        return {
            path.stem: path
            for root in model_paths(self.content)
            for path in sorted((self.folder / root).rglob("*.sql"))
            if not path.is_relative_to(self.generated)
        }


def as_map(value: Any, line: int) -> Map:
    """Return the value if it is a mapping, else an empty mapping at this line."""
    if isinstance(value, Map):
        return value
    empty = Map()
    empty.line, empty.lines = line, {}
    return empty


def read_project(folder: Path) -> ProjectYaml:
    """Read a project's YAML.

    Raises DeclarationError naming file and line if a file is missing or is no YAML.
    """
    content = project_content(folder)
    project = ProjectYaml(folder, content)
    problems: list[str] = []
    for root in model_paths(content):
        for path in sorted((folder / root).rglob("*")):
            if path.suffix not in YAML_SUFFIXES or path.is_relative_to(project.generated):
                continue
            file = path.relative_to(folder).as_posix()
            try:
                found = _load(folder, path)
            except DeclarationError as error:
                problems += error.problems
                continue
            for kind, made in (("models", project.models), ("exposures", project.exposures)):
                for value in found.get(kind) or []:
                    if not isinstance(value, Map) or not value.get("name"):
                        problems.append(
                            f"{file}:{value.line if isinstance(value, Map) else found.at(kind)}: an entry of `{kind}` "
                            f"has no name: give it one (example: `- name: view_events`)"
                        )
                    else:
                        made.append((ModelYaml if kind == "models" else ExposureYaml)(file, value))  # type: ignore[arg-type]
    if problems:
        raise DeclarationError(problems)
    return project


def model_paths(content: Map) -> list[str]:
    """Return the folders of the project's models."""
    return [str(path) for path in content.get("model-paths") or ["models"]]


def macro_paths(content: Map) -> list[str]:
    """Return the folders of the project's macros."""
    return [str(path) for path in content.get("macro-paths") or ["macros"]]


def project_content(folder: Path) -> Map:
    """Return the content of a project's dbt_project.yml. Raises DeclarationError if there is none."""
    return _load(folder, folder / PROJECT_FILE)


def project_files(folder: Path) -> list[Path]:
    """Return every file that affects a deployment: dbt_project.yml, and the SQL and YAML of models and macros."""
    content = project_content(folder)
    roots = [*model_paths(content), *macro_paths(content)]
    found = [
        path
        for root in roots
        for path in (folder / root).rglob("*")
        if path.suffix in (".sql", *YAML_SUFFIXES) and path.is_file()
    ]
    return [folder / PROJECT_FILE, *sorted(found)]


def _load(folder: Path, path: Path) -> Map:
    file = path.relative_to(folder).as_posix()
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except FileNotFoundError:
        raise DeclarationError([f"{path} is missing: name the folder of a dbt project"]) from None
    except OSError as error:
        raise DeclarationError([f"{path} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise DeclarationError([f"{file}:1: it is not UTF-8: save it as UTF-8"]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DeclarationError([f"{file}:{line}: it is not YAML: {error.problem}"]) from None
    except yaml.YAMLError as error:
        raise DeclarationError([f"{file}:1: it is not YAML: {' '.join(str(error).split())}"]) from None
    if content is None:
        return as_map(None, 1)
    if not isinstance(content, Map):
        raise DeclarationError([f"{file}:1: a mapping is needed at the top (example: `models:`)"])
    return content
