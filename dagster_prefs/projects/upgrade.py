"""Bring a project to this version of the package: its shared macros, generated files, and lock."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dagster_prefs import __version__
from dagster_prefs.declarations import macros
from dagster_prefs.declarations.read import macro_paths, project_content
from dagster_prefs.declarations.registry import project_home
from dagster_prefs.projects.create import LOCK
from dagster_prefs.projects.staged import Changes, Generate, ProjectRefused, changed_as_a_whole, write
from dagster_prefs.shipped import shipped


@dataclass(frozen=True)
class Upgrade:
    """The changes that an upgrade made, and what to review."""

    version_before: str | None
    changes: Changes
    look_at: tuple[str, ...]


def upgrade_project(project: Path, generate: Generate, *, overwrite: bool = False) -> Upgrade:
    """Write this version's shared macros and lock into a project, and run `generate`. Changes everything or nothing.

    Raises ProjectRefused for macros that were edited since the package wrote them, unless `overwrite` says that
    the edits may go; MacrosMismatch for macros of a newer version; DeclarationError.
    """
    before: macros.Stamped | None
    try:
        before = macros.stamped_macros(project)
    except macros.MacrosMismatch:
        if not overwrite:
            raise
        before = None
    if before is not None:
        macros.refuse_newer(before)
        edited = before.edited()
        if edited and not overwrite:
            named = ", ".join(edited[:3]) + (" and more" if len(edited) > 3 else "")
            raise ProjectRefused(
                f"{before.folder} was edited ({named}): move your macros to another folder under another name, or run "
                "`prefs upgrade --overwrite`, which discards them"
            )
    folder = _folder(project)
    changes = changed_as_a_whole(project, lambda copy: macros.write_macros(copy / folder), generate)
    home = project_home(project)
    look_at = list(_look_at(changes))
    if (home / LOCK).is_file() and (home / LOCK).read_bytes() != shipped(LOCK).read_bytes():
        files = {**changes.files, f"../{LOCK}": ((home / LOCK).read_bytes(), shipped(LOCK).read_bytes())}
        changes = Changes(files)
        write(home / LOCK, shipped(LOCK).read_bytes())
        look_at.append(f"{LOCK} has other versions: install them with `uv pip sync --require-hashes {LOCK}`")
    look_at += _pins(home)
    return Upgrade(before.version if before else None, changes, tuple(look_at))


def _folder(project: Path) -> Path:
    """Return the folder of the shared macros within the project. Raises ProjectRefused where there is no place."""
    paths = macro_paths(project_content(project))
    own = [path for path in paths if (project / path).resolve().is_relative_to(project.resolve())]
    named = next((path for path in own if (project / path / macros.FOLDER).is_dir()), None)
    if named is None and any(
        (project / path).resolve() == (shipped("dbt_project") / "macros").resolve() for path in paths
    ):
        raise ProjectRefused(
            f"{project} names the package's own macros in macro-paths, which need no upgrade: run `prefs generate`"
        )
    if named is None and any(list((project / path).rglob("dialect.sql")) for path in own):
        raise ProjectRefused(
            f"{project} has the shared macros in another folder than macros/{macros.FOLDER}: move them there, and "
            "your own ones to another folder"
        )
    return Path(named or own[0]) / macros.FOLDER


def _look_at(changes: Changes) -> list[str]:
    said: Mapping[str, str] = {
        f"/{macros.FOLDER}/": "the shared macros changed, and with them the SQL of views that call them: run "
        "`prefs plan`, which lists what will be rebuilt",
        "/generated/": "generated models changed: review the diff, and run `prefs plan`",
    }
    return [text for part, text in said.items() if any(part in f"/{name}" for name in changes.files)]


def _pins(home: Path) -> list[str]:
    """Return a message for each file that still names another version of the package."""
    found = []
    for name in ("pyproject.toml", "README.md", ".github/workflows/ci.yml"):
        path = home / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        others = set(re.findall(r"dagster-prefs(?:\[[^\]]*\])?==([0-9][\w.]*\w)", text)) - {__version__}
        if others:
            found.append(f"{name} names dagster-prefs {', '.join(sorted(others))}: write {__version__}")
    return found
