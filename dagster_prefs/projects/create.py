"""Create a project from an example that the package contains."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from dagster_prefs import __version__
from dagster_prefs.declarations import macros
from dagster_prefs.declarations.read import GENERATED
from dagster_prefs.declarations.registry import PROJECT_FOLDER, load_registry
from dagster_prefs.projects import EXAMPLES
from dagster_prefs.projects.staged import Generate, ProjectRefused, beside, write
from dagster_prefs.settings import kafka_variable
from dagster_prefs.shipped import shipped

# The name that the examples have as dbt projects and profiles.
_NAME = "dagster_prefs"
_TEMPLATES = files("dagster_prefs.projects") / "templates"
# Template → its place in the project.
_PLACES = {
    "pyproject.template": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "test_project.template": "tests/test_project.py",
    "ci.yml": ".github/workflows/ci.yml",
}
LOCK = "requirements.lock"
# The folder for the package's wheel, where it is in no index.
WHEELS = "wheels"


def create_project(folder: Path, example: str, generate: Generate) -> list[str]:
    """Create a project in a new or empty folder; return its files outside of the dbt project.

    `example` is one of EXAMPLES; `generate` writes the generated models and the registry. The folder
    appears once everything is written. Raises ProjectRefused if the folder is not empty, or if its name cannot be
    that of a dbt project.
    """
    folder = folder.absolute()
    name = folder.name.lower().replace("-", "_").replace(".", "_")
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ProjectRefused(
            f"{folder.name!r} cannot name a dbt project: use letters, digits, `-` and `_`, a letter first (example: "
            "my-platform)"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ProjectRefused(f"{folder} exists and is not empty: name a new folder")
    with beside(folder) as made:
        project = made / PROJECT_FOLDER
        _write_dbt_project(project, example, name)
        generate(project)
        values = {"distribution": name.replace("_", "-"), "version": __version__, "override": _override()}
        for template, place in _PLACES.items():
            text = (_TEMPLATES / template).read_text(encoding="utf-8")
            write(made / place, Template(text).substitute(values).encode())
        for name in (LOCK, "workspace.yaml"):
            write(made / name, shipped(name).read_bytes())
        write(made / ".env.example", env_example(load_registry(project).topics).encode())
        write(made / WHEELS / ".gitkeep", b"")
        # The folder is readable like any other of its owner; `prefs` itself writes private files.
        for path in (made, *made.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            folder.rmdir()
        os.rename(made, folder)
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_relative_to(folder / PROJECT_FOLDER)
    )


def env_example(topics: Mapping[str, object]) -> str:
    """Return the list of all settings with their defaults, for a project with these topics."""
    lines = shipped(".env.example").read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if re.match(r"# Name of topic \S+ in Kafka\.$", line):
            continue
        if number and re.match(r"# Name of topic \S+ in Kafka\.$", lines[number - 1]):
            if not following.startswith("# Name of topic "):
                for topic in topics:
                    kept += [f"# Name of topic {topic} in Kafka.", f"#{kafka_variable(topic)}={topic}"]
            continue
        kept.append(line)
    return "\n".join(kept) + "\n"


def _write_dbt_project(project: Path, example: str, name: str) -> None:
    left_out = EXAMPLES[example]
    source = (
        shipped("dbt_project")
        if left_out is not None
        else Path(str(files("dagster_prefs.projects") / example))
    )
    shutil.copytree(
        source / "models", project / "models", ignore=shutil.ignore_patterns(GENERATED, *(left_out or ()))
    )
    macros.write_macros(project / "macros" / macros.FOLDER)
    for file, path in (("dbt_project.yml", source), ("profiles.yml", shipped("dbt_project"))):
        text = (path / file).read_text(encoding="utf-8")
        renamed = re.sub(rf"(?m)^(name: |profile: |  |){_NAME}(:?)$", rf"\g<1>{name}\g<2>", text)
        write(project / file, renamed.encode())


def _override() -> str:
    """Return the requirement that resolving dbt-core's dependencies must override."""
    lines = shipped("overrides.txt").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#")]
    return line.replace('"', "'")
