"""Run Dagster jobs in this process, on the instance that the UI shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from dagster_prefs.defs.instance import ensure_dagster_home
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import Settings


class RunFailed(PrefsError):
    """A Dagster run failed; the message names the job and the reason of each failed step."""


class JobRunner:
    """Runs jobs of the platform's definitions; a context manager.

    Builds definitions and loads dbt once for any number of jobs. `definitions` contain the jobs; by default they are
    all of the platform's. A subset may not need dbt, which takes seconds to load.
    """

    def __init__(self, settings: Settings, definitions: dg.Definitions | None = None) -> None:
        if definitions is None:
            from dagster_prefs.defs.assembly import build_definitions

            definitions = build_definitions(settings)
        self._definitions = definitions
        self._settings = settings
        self._home = ensure_dagster_home(settings.state_dir)
        self._tags = settings.dagster_tags
        self._instance: dg.DagsterInstance | None = None

    def __enter__(self) -> JobRunner:
        self._instance = dg.DagsterInstance.from_config(str(self._home))
        return self

    def __exit__(self, *_: object) -> None:
        if self._instance is not None:
            self._instance.dispose()
            self._instance = None

    def run(
        self, job: str, tags: Mapping[str, str] | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Run one job to its end; `config` is the run configuration of its steps.

        Raises RunFailed if a step failed; the results of the other steps are kept.
        """
        result = self._definitions.resolve_job_def(self._settings.dagster_name(job)).execute_in_process(
            instance=self._instance,
            tags={**self._tags, **(tags or {})},
            raise_on_error=False,
            run_config={**(config or {}), "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        if not result.success:
            reasons = [
                _root_cause(event.step_failure_data.error)
                for event in result.all_events
                if event.is_step_failure and event.step_failure_data.error
            ]
            raise RunFailed(
                f"the Dagster run of {job} failed: {'; '.join(reasons) or f'see run {result.run_id}'}"
            )


def _root_cause(error: object) -> str:
    """Return the innermost message of a step's error, without Dagster's wrapping or a stack."""
    while getattr(error, "cause", None) is not None:
        error = error.cause  # type: ignore[attr-defined]
    message = str(getattr(error, "message", error)).strip()
    # Dagster prefixes the class; only the sentence after it helps a user.
    name, _, sentence = message.partition(": ")
    return sentence if sentence and " " not in name else message
