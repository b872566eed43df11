"""Tell whether a project's registry is of the files that are there: by their hashes, without dbt.

Nothing runs on a stale registry: what is served, exported and trained on would silently differ from what the models do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from dagster_prefs.declarations.contract import REGISTRY
from dagster_prefs.declarations.read import project_files
from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.errors import PrefsError


class StaleRegistry(PrefsError):
    """A project's files are not those that its registry was generated from."""


def hashes_of(folder: Path) -> dict[str, str]:
    """File that decides what a deployment does → SHA-256 of its content; paths are relative to the project's folder."""
    return {
        Path(os.path.relpath(path, folder)).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in project_files(folder)
    }


def changed_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """The files that are new, changed or gone since these hashes were taken, each with what happened to it."""
    now = hashes_of(folder)
    return [
        f"{name} ({'new' if name not in hashes else 'gone' if name not in now else 'changed'})"
        for name in sorted(now.keys() | hashes.keys())
        if now.get(name) != hashes.get(name)
    ]


def current_registry(folder: Path) -> Registry:
    """The registry of a project.

    Raises StaleRegistry naming the files that differ, with the remedy; RegistryError where there is none.
    """
    registry = load_registry(folder)
    if changed := changed_files(folder, registry.hashes):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise StaleRegistry(
            f"{folder / REGISTRY} is stale: {', '.join(changed[:3])}{more}: run `prefs generate` and commit "
            "what it writes"
        )
    return registry
