"""Detect whether a project's registry matches its files: by their hashes, without dbt.

Nothing runs with a stale registry, because serving, export and training would silently differ from the
models.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from dagster_prefs.declarations.contract import REGISTRY
from dagster_prefs.declarations.macros import check_macros
from dagster_prefs.declarations.read import project_files
from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.errors import PrefsError


class StaleRegistry(PrefsError):
    """A project's files differ from those from which its registry was generated."""


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that affects a deployment, by path in the project's folder."""
    return {
        Path(os.path.relpath(path, folder)).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in project_files(folder)
    }


def changed_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Return the files that are new, changed or missing since these hashes, each with its change."""
    now = hashes_of(folder)
    return [
        f"{name} ({'new' if name not in hashes else 'gone' if name not in now else 'changed'})"
        for name in sorted(now.keys() | hashes.keys())
        if now.get(name) != hashes.get(name)
    ]


def current_registry(folder: Path) -> Registry:
    """Return the registry of a project.

    Raises StaleRegistry naming the files that differ, with the remedy; RegistryError if there is none;
    MacrosMismatch for shared macros of another version than the package's.
    """
    check_macros(folder)
    registry = load_registry(folder)
    if changed := changed_files(folder, registry.hashes):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise StaleRegistry(
            f"{folder / REGISTRY} is stale: {', '.join(changed[:3])}{more}: run `prefs generate` and commit "
            "what it writes"
        )
    return registry
