"""Jobs whose steps are processes: those of Dagster's multi-process executor, and one on an empty disk for each step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import boto3
import dagster as dg
import pytest
from declared import COURSES
from foreign import School, lesson
from step_location import PLACE, WARM, copy_project
from warm import Warm

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt

TESTS = Path(__file__).parent


@pytest.fixture
def place(
    engine: EngineConfiguration,
    aws_endpoint: str,
    session_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with the project as it was cloned, and the settings of an empty engine in the environment."""
    copy_project(tmp_path)
    (tmp_path / "dagster").mkdir()
    (tmp_path / "dagster" / "dagster.yaml").write_text("telemetry: { enabled: false }")
    for name, value in {
        PLACE: str(tmp_path),
        WARM: f"{session_folder}:{os.getpid()}",
        "DAGSTER_HOME": str(tmp_path / "dagster"),
        "PREFS_ENGINE_PORT": str(engine.port),
        "PREFS_ENGINE_DATABASE": engine.database,
        "PREFS_ENGINE_USER": engine.user,
        "PREFS_ICEBERG_WAREHOUSE": (tmp_path / "lake").as_uri(),
        "AWS_ENDPOINT_URL": aws_endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def execute(warm: Warm, place: Path, location: str, job: str) -> set[str]:
    """Run a job as `dagster job execute` does, which loads its location anew; return the steps that succeeded."""
    file = str(TESTS / "step_location.py")
    command = ["dagster", "job", "execute", "-f", file, "-d", str(TESTS), "-a", location, "-j", job]
    done = warm.run(command, environment=dict(os.environ), cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    with dg.DagsterInstance.from_config(str(place / "dagster")) as instance:
        (run,) = instance.get_runs(limit=1)
        assert (run.job_name, run.status) == (job, dg.DagsterRunStatus.SUCCESS)
        steps = instance.get_run_step_stats(run.run_id)
        return {step.step_key for step in steps if step.status is not None and step.status.value == "SUCCESS"}


def test_steps_need_nothing_but_the_project_and_the_settings(
    engine: EngineConfiguration, place: Path, aws_endpoint: str, warm: Warm
) -> None:
    assert execute(warm, place, "in_processes", "school_event_tables") == {"school_dbt_models"}
    School(engine, Dbt(engine, COURSES, place / "target"), made=True).send(
        [lesson("ada", 1), lesson("ada", 2, "completed"), lesson("bob", 1)]
    )

    # What the first job had compiled and noted is gone, as where it ran elsewhere.
    shutil.rmtree(place / "data")
    steps = execute(warm, place, "on_empty_disks", "school_refresh")
    assert {"school__dynamodb__learner_profiles", "school_dbt_models", "school__online__progress"} <= steps
    assert {disk.name for disk in (place / "disks").iterdir()} == steps
    store = boto3.client("dynamodb", endpoint_url=aws_endpoint)
    items = store.scan(TableName="learner_profiles")["Items"]
    assert {item["learner_id"]["S"] for item in items} == {"ada", "bob"}
