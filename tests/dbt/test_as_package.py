"""A bigger dbt project that has ours as a package: its models read ours, and build beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from declared import COURSES, PROJECT

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt, DbtError

BIGGER = """
name: bigger
version: "1.0"
config-version: 2
profile: bigger
models:
  bigger:
    +materialized: table
vars:
  theirs: 1
"""
MODEL = "select subject, count(*) as lessons from {{ ref('courses', 'lesson_events') }} group by subject\n"
EXPOSURE = """
exposures:
  - name: their_dashboard
    type: dashboard
    owner: { name: They, email: they@example.com }
    depends_on:
      - ref('lessons_by_subject')
      - ref('courses', 'sink_learning_progress')
"""


def bigger_project(folder: Path) -> Path:
    """Their project, with a copy of ours where `dbt deps` would put it."""
    ours = folder / "dbt_packages" / "courses"
    shutil.copytree(COURSES, ours, ignore=shutil.ignore_patterns("target", "logs"))
    shutil.copytree(PROJECT / "macros", ours / "macros")
    declared = ours / "dbt_project.yml"
    declared.write_text(declared.read_text().replace("../../../dbt_project/macros", "macros"))
    (folder / "packages.yml").write_text("packages:\n  - local: dbt_packages/courses\n")
    (folder / "dbt_project.yml").write_text(BIGGER)
    (folder / "profiles.yml").write_text(
        (COURSES / "profiles.yml").read_text().replace("courses:", "bigger:")
    )
    (folder / "models").mkdir()
    (folder / "models" / "lessons_by_subject.sql").write_text(MODEL)
    (folder / "models" / "exposures.yml").write_text(EXPOSURE)
    return ours


def test_models_of_a_bigger_project_read_ours(engine: EngineConfiguration, tmp_path: Path) -> None:
    ours = bigger_project(tmp_path)
    with engine.connect() as session:
        # As `prefs apply` has left them, as far as they are read here.
        session.execute("create table lesson_events (subject text)")
        session.execute("insert into lesson_events values ('maths'), ('maths')")
        session.execute(
            "create table deployments (relation text primary key, kind text, checksum text, source_checksum text, "
            "definition text, state text, deployed_at timestamptz, invocation_id text)"
        )
        session.execute("insert into deployments (relation) values ('lesson_events')")
    dbt = Dbt(engine, tmp_path, tmp_path / "target", {})
    # Twice, because their relation then exists, and is neither ours nor a stranger's; with a variable of theirs.
    for _ in range(2):
        hook, made = dbt.run("run", exclude=["package:courses"], arguments=["--vars", '{"theirs": 2}'])
        assert hook.unique_id.startswith("operation.courses."), "ours checks and prepares the engine"
        assert (hook.ok, made.name, made.status) == (True, "lessons_by_subject", "success"), made.message
    with engine.connect() as session:
        assert session.execute("select * from lessons_by_subject").fetchall() == [("maths", 2)]

    manifest = json.loads(dbt.manifest_path.read_text())
    parents = manifest["parent_map"]
    assert parents["model.bigger.lessons_by_subject"] == ["model.courses.lesson_events"]
    assert set(parents["exposure.bigger.their_dashboard"]) == {
        "model.bigger.lessons_by_subject",
        "model.courses.sink_learning_progress",
    }
    tags = {node["name"]: set(node["tags"]) for node in manifest["nodes"].values()}
    for name in ("raw_lesson_events", "lesson_events_parsed", "lesson_events"):
        assert tags[name] == {"topic_lesson_events", "entity_learner"}
    assert tags["sink_learning_progress"] == {"domain_progress", "entity_learner"}
    assert manifest["exposures"].keys() > {"exposure.bigger.their_dashboard"}, "ours are shown too"

    # A package that differs from its registry is refused there as by itself.
    changed = ours / "models" / "learner_lessons_1d.sql"
    changed.write_text(changed.read_text() + "\n-- changed\n")
    with pytest.raises(DbtError, match=r"learner_lessons_1d\.sql \(changed\)"):
        dbt.run("run", exclude=["package:courses"])
