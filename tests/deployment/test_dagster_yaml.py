"""The production instance's configuration, loaded by Dagster on a real PostgreSQL."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dagster import DagsterInstance

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.local.services import LocalServices

CONFIG = Path(__file__).resolve().parents[2] / "infra" / "dagster" / "dagster.yaml"


def test_instance_loads_on_postgresql(
    engine: EngineConfiguration, services: LocalServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(CONFIG, tmp_path)
    for name, value in {
        "DAGSTER_HOME": str(tmp_path),
        "DAGSTER_PG_HOST": engine.host,
        "DAGSTER_PG_PORT": str(engine.port),
        "DAGSTER_PG_DATABASE": engine.database,
        "DAGSTER_PG_USER": engine.user,
        "DAGSTER_PG_PASSWORD": services.passfile.read_text().rpartition(":")[2].strip(),
    }.items():
        monkeypatch.setenv(name, value)
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        queue = instance.get_concurrency_config().run_queue_config
        assert queue is not None
        found = {
            "runs": type(instance.run_storage).__name__,
            "events": type(instance.event_log_storage).__name__,
            "schedules": type(instance.schedule_storage).__name__,
            "coordinator": type(instance.run_coordinator).__name__,
            "at_once": queue.max_concurrent_runs,
            "retries": [instance.run_retries_enabled, instance.run_retries_max_retries],
            "monitored": [instance.run_monitoring_enabled, instance.run_monitoring_max_runtime_seconds],
            "retention": instance.get_settings("retention"),
            "telemetry": instance.telemetry_enabled,
            "stored": instance.get_runs_count(),
        }
    assert found == {
        "runs": "PostgresRunStorage",
        "events": "PostgresEventLogStorage",
        "schedules": "PostgresScheduleStorage",
        "coordinator": "QueuedRunCoordinator",
        "at_once": 4,
        "retries": [True, 2],
        "monitored": [True, 14400],
        "retention": {
            "schedule": {"purge_after_days": 90},
            "sensor": {"purge_after_days": {"skipped": 7, "failure": 30, "success": 90}},
        },
        "telemetry": False,
        "stored": 0,
    }


def test_no_secret_is_written_down() -> None:
    import yaml

    storage = yaml.safe_load(CONFIG.read_text())["storage"]["postgres"]["postgres_db"]
    assert storage.pop("scheme") == "postgresql+psycopg2"
    assert storage == {
        key: {"env": f"DAGSTER_PG_{name}"}
        for key, name in {
            "hostname": "HOST",
            "port": "PORT",
            "db_name": "DATABASE",
            "username": "USER",
            "password": "PASSWORD",
        }.items()
    }
