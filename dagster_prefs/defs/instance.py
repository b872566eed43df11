"""The Dagster instance of this machine, which stores runs and events."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from dagster_prefs.files import make_private_folder

DAGSTER_YAML = """\
# Written by `prefs` when the folder was made; yours to change from then on.
telemetry: { enabled: false }
nux: { enabled: false }
# A click starts its run at once, with or without the daemon; the engine's own lock orders refreshes.
run_coordinator:
  module: dagster.core.run_coordinator
  class: DefaultRunCoordinator
retention:
  schedule: { purge_after_days: 30 }
  sensor:
    purge_after_days: { skipped: 1, failure: 30, success: 30 }
"""


def ensure_dagster_home(data_dir: Path) -> Path:
    """Return `<data_dir>/dagster`; create it with a `dagster.yaml` on first use.

    It stores the runs, events and schedules of the command, the UI and the daemon (SQLite).
    """
    home = data_dir / "dagster"
    make_private_folder(home)
    config = home / "dagster.yaml"
    if not config.exists():
        config.write_text(DAGSTER_YAML)
    return home


@contextmanager
def open_instance(data_dir: Path) -> Iterator[dg.DagsterInstance]:
    """Open the instance that the daemon writes to: that of DAGSTER_HOME, else of the data directory."""
    home = os.environ.get("DAGSTER_HOME") or str(ensure_dagster_home(data_dir))
    with dg.DagsterInstance.from_config(home) as instance:
        yield instance
