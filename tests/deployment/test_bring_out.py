"""What is applied already is not applied again; what changed, or is gone from the engine, is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from declared import COURSES

from dagster_prefs.deploy import apply
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings


def test_only_what_was_not_applied_yet_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "courses"
    shutil.copytree(COURSES, project, ignore=shutil.ignore_patterns("target", "logs"))
    applied: list[str] = []
    deployed, broken = [False], [False]

    def apply_plan(engine: EngineConfiguration, dbt: Dbt, *_: Any, **__: Any) -> None:
        dbt.target_dir.mkdir(parents=True, exist_ok=True)
        if broken[0]:
            raise PrefsError("the engine refused a statement")
        applied.append("applied")
        deployed[0] = True

    monkeypatch.setattr(apply, "apply_plan", apply_plan)
    monkeypatch.setattr(Platform, "is_deployed", lambda platform: deployed[0])

    def applies(**settings: Any) -> bool:
        applied.clear()
        Platform(Settings(data_dir=tmp_path / "state", project_dir=project, **settings)).bring_out()
        return bool(applied)

    assert applies(), "nothing is deployed"
    assert not applies()
    model = next(project.glob("models/**/*_1d.sql"))
    model.write_text(model.read_text() + "\n-- another version\n")
    broken[0] = True
    with pytest.raises(PrefsError):
        applies()
    broken[0] = False
    assert applies(), "the version that failed is not applied yet"
    assert applies(expiry_spread_seconds=60), "a setting is part of what is deployed"
    deployed[0] = False
    assert applies(), "the engine is a new one"
    assert not applies()
