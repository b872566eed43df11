"""The dbt project as tests change and judge it."""

from __future__ import annotations

from pathlib import Path

from dagster_prefs.declarations.declared import DECLARED, declared_macro
from dagster_prefs.engine.dbt import NodeResult

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"


def accept(project: Path) -> None:
    """Let dbt run a project as its files are: of `prefs generate`, what dbt by itself compares."""
    (project / DECLARED).write_text(declared_macro(project))


class Workshop:
    """A copy of the project whose files a test may change; dbt accepts each change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._originals: dict[Path, str] = {}

    def change(self, path: str, old: str, new: str) -> None:
        """Replace a text that must be there."""
        file = self.folder / path
        text = file.read_text()
        assert old in text, f"{path} no longer says {old!r}"
        self._originals.setdefault(file, text)
        file.write_text(text.replace(old, new))
        accept(self.folder)

    def remove(self, path: str) -> None:
        """Delete a file that must be there."""
        file = self.folder / path
        self._originals.setdefault(file, file.read_text())
        file.unlink()
        accept(self.folder)

    def restore(self) -> None:
        """Undo every change so far."""
        for file, text in self._originals.items():
            file.write_text(text)
        accept(self.folder)


def assert_all_ok(results: list[NodeResult]) -> None:
    """Every node succeeded, and there was at least one."""
    assert results
    assert [f"{result.name}: {result.message}" for result in results if not result.ok] == []
