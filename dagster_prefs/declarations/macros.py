"""The shared macros of a project: a copy of what the package brings, with a stamp of the package's version.

The macros and the platform's Python agree on relations and functions of the engine, so that a project with
the macros of another version is refused. A project that names the package's own folder in `macro-paths`, or
macros that nobody stamped, has nothing to compare.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dagster_prefs import __version__
from dagster_prefs.declarations.read import macro_paths, project_content
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import whole_file
from dagster_prefs.shipped import shipped

# Below a folder of the project's macros, what the package wrote, with the stamp. dbt reads no JSON there.
FOLDER = "prefs"
STAMP = "version.json"


class MacrosMismatch(PrefsError):
    """A project's shared macros are not those of this version of the package."""


@dataclass(frozen=True)
class Stamped:
    """The shared macros of a project: their folder, and the version and the hashes that the stamp names."""

    folder: Path
    version: str
    hashes: Mapping[str, str]

    def edited(self) -> list[str]:
        """Return the files that were changed, removed or added since the package wrote them."""
        now = _hashes(_contents(self.folder))
        return sorted(
            name for name in now.keys() | self.hashes.keys() if now.get(name) != self.hashes.get(name)
        )


def stamped_macros(project: Path) -> Stamped | None:
    """Return the project's stamped macros, None if it has none.

    Raises MacrosMismatch for an unreadable stamp.
    """
    for path in macro_paths(project_content(project)):
        stamp = project / path / FOLDER / STAMP
        if not stamp.is_file():
            continue
        try:
            content = json.loads(stamp.read_text(encoding="utf-8"))
            return Stamped(stamp.parent, str(content["version"]), dict(content["files"]))
        except (ValueError, KeyError, TypeError):
            raise MacrosMismatch(
                f"{stamp} is no stamp of shared macros: restore it, or run `prefs upgrade --overwrite`"
            ) from None
    return None


def check_macros(project: Path) -> None:
    """Raise MacrosMismatch unless the project's shared macros are of this version, if they are stamped."""
    found = stamped_macros(project)
    if found is None:
        return
    refuse_newer(found)
    if found.version != __version__:
        raise MacrosMismatch(
            f"{found.folder} is of dagster-prefs {found.version}, older than this dagster-prefs {__version__}: run "
            "`prefs upgrade`"
        )
    if found.hashes != _hashes(shared_macros()):
        raise MacrosMismatch(
            f"{found.folder} is of another build of dagster-prefs {__version__}: run `prefs upgrade`"
        )


def refuse_newer(found: Stamped) -> None:
    """Raise MacrosMismatch for macros of a newer version than this package's."""
    if _numbers(found.version) > _numbers(__version__):
        raise MacrosMismatch(
            f"{found.folder} is of dagster-prefs {found.version}, newer than this dagster-prefs {__version__}: install "
            f"dagster-prefs=={found.version}"
        )


def shared_macros() -> dict[str, bytes]:
    """Return the macros that the package brings, by path within their folder."""
    return _contents(shipped("dbt_project") / "macros")


def write_macros(folder: Path) -> None:
    """Write the package's macros with their stamp into a folder, and remove its other macros."""
    wanted = shared_macros()
    for name in _contents(folder).keys() - wanted.keys():
        (folder / name).unlink()
    stamp = {"version": __version__, "files": _hashes(wanted)}
    # The stamp last: an interrupted run leaves the old one, which then does not match.
    for name, content in {**wanted, STAMP: (json.dumps(stamp, indent=2) + "\n").encode()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / name) as file:
            file.write(content)
        (folder / name).chmod(0o644)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.sql"))}


def _hashes(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall("[0-9]+", version)]
