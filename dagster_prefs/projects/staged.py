"""Change a dbt project completely or not at all: in a copy, from which files are taken once `generate` succeeded."""

from __future__ import annotations

import difflib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dagster_prefs.declarations.contract import REGISTRY
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import whole_file

# Updates a project's generated files and its registry; raises PrefsError for an invalid declaration.
Generate = Callable[[Path], object]
# What dbt and the platform write into a project's folder.
_WRITTEN = ("target", "logs", "dbt_packages", "__pycache__", ".*")


class ProjectRefused(PrefsError):
    """A project cannot be created or changed as asked."""


@dataclass(frozen=True)
class Changes:
    """What changed in a project: path → contents before and after, None where there is no file."""

    files: Mapping[str, tuple[bytes | None, bytes | None]]

    def diff(self) -> str:
        """Return a unified diff, as `git diff` shows it."""
        lines: list[str] = []
        for name, (before, after) in sorted(self.files.items()):
            lines += difflib.unified_diff(
                (before or b"").decode(errors="replace").splitlines(),
                (after or b"").decode(errors="replace").splitlines(),
                "/dev/null" if before is None else f"a/{name}",
                "/dev/null" if after is None else f"b/{name}",
                lineterm="",
            )
        return "\n".join(lines)


def changed_as_a_whole(project: Path, change: Callable[[Path], object], generate: Generate) -> Changes:
    """Apply `change` to a copy of the project, generate there, and copy the files that differ back.

    The registry is copied last, so that after an interruption the project is recognised as stale. Raises what
    `change` and `generate` raise, and then leaves the project unchanged; ProjectRefused if its folder cannot be
    written.
    """
    with beside(project) as copy:
        shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns(*_WRITTEN))
        before = _contents(copy)
        try:
            change(copy)
            generate(copy)
        except PrefsError as error:
            # The copy is deleted before the message is read, so the message names the project instead.
            error.args = tuple(str(arg).replace(str(copy), str(project)) for arg in error.args)
            raise
        after = _contents(copy)
    names = sorted(before.keys() | after.keys(), key=lambda name: (name == REGISTRY, name))
    changes = Changes(
        {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
    )
    try:
        for name, (_, content) in changes.files.items():
            write(project / name, content)
    except OSError as error:
        raise ProjectRefused(
            f"{error.filename} cannot be written ({error.strerror}): make it writable, and run the command again"
        ) from None
    return changes


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a path in the same parent folder, where relative paths lead to the same places; removed at the end."""
    # The copy has the folder's name, because messages quote it.
    place = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        yield place
    except OSError as error:
        raise ProjectRefused(
            f"{error.filename or folder.parent} cannot be written ({error.strerror}): make it writable, or use another "
            "folder"
        ) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write(path: Path, content: bytes | None) -> None:
    """Replace a file, readable by everyone who can read the project; None removes it. Raises OSError."""
    if content is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o644)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
