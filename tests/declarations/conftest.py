"""Projects that a test may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from project_copies import EXAMPLE, FOREIGN, Copy


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Copy]:
    """`copy_of(project)`: a copy of it with the macros inside, as one folder that may be changed."""

    def copied(project: Path) -> Copy:
        folder = tmp_path / project.name
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns("target", "logs"))
        if not (folder / "macros").is_dir():
            shutil.copytree(EXAMPLE / "macros", folder / "macros")
            file = folder / "dbt_project.yml"
            file.write_text(file.read_text().replace("../../../dbt_project/macros", "macros"))
        return Copy(folder)

    return copied


@pytest.fixture
def courses_copy(copy_of: Callable[[Path], Copy]) -> Copy:
    """A copy of the foreign project."""
    return copy_of(FOREIGN)
