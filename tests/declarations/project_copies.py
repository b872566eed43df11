"""The two projects, and a copy of one that a test may change."""

from __future__ import annotations

from pathlib import Path

from dagster_prefs.declarations.registry import load_registry

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "dbt_project"
FOREIGN = ROOT / "tests" / "projects" / "courses"


class Copy:
    """A copy of a project; what its views compile to is what its registry held at first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._queries = dict(load_registry(folder).queries)

    def change(self, path: str, old: str, new: str) -> int:
        """Replace a text that must be there once; returns its line."""
        file = self.folder / path
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
        file.write_text(text.replace(old, new), encoding="utf-8")
        return text[: text.index(old)].count("\n") + 1

    def write(self, path: str, text: str) -> None:
        """Write a file of the project."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text, encoding="utf-8")

    def compiled(self, folder: Path, relations: object) -> dict[str, str]:
        """What the views compiled to when the project was copied: dbt is not what these tests are about."""
        return self._queries
