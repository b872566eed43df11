"""The foreign project as a code location whose steps are processes; `dagster job execute` loads it from its file.

Nothing of the tests' processes is known here but their environment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.step_delegating import CheckStepHealthResult, StepDelegatingExecutor, StepHandler
from dagster._core.executor.step_delegating.step_handler.base import StepHandlerContext
from declared import COURSES, PROJECT
from warm import Warm

from dagster_prefs.component import preference_platform

# The step processes import this module anew, so that what they have to know is in their environment.
PLACE = "TEST_STEP_PLACE"
WARM = "TEST_STEP_WARM"


class EmptyDisks(StepHandler):
    """Starts each step as a container is: a process with nothing but the code, the project and its settings.

    Its working folder and data folder are new, and so is the copy of the project.
    """

    def __init__(self) -> None:
        super().__init__()
        folder, owner = os.environ[WARM].split(":")
        self._warm = Warm(Path(folder), int(owner))
        self._started: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "empty disks"

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        (step,) = step_handler_context.execute_step_args.step_keys_to_execute or ()
        disk = Path(os.environ[PLACE], "disks", step)
        (disk / "home").mkdir(parents=True)
        command = step_handler_context.execute_step_args.get_command_args()
        environment = {**os.environ, PLACE: str(disk)}
        copy_project(disk)
        self._started[step] = self._warm.start(
            ["dagster", *command[command.index("api") :]],
            environment=environment,
            cwd=disk / "home",
            merge=True,
        )
        yield from ()

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        (step,) = step_handler_context.execute_step_args.step_keys_to_execute or ()
        process = self._started[step]
        if process.poll():
            return CheckStepHealthResult.unhealthy(f"{step} ended: {process.communicate(10)[0]}")
        return CheckStepHealthResult.healthy()

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        for process in self._started.values():
            process.terminate()
        yield from ()


@dg.executor(name="empty_disks")
def empty_disks(init_context: dg.InitExecutorContext) -> StepDelegatingExecutor:
    return StepDelegatingExecutor(
        EmptyDisks(), RetryMode.DISABLED, sleep_seconds=0.1, check_step_health_interval_seconds=1
    )


def copy_project(place: Path) -> Path:
    """Put the foreign project there as a checkout has it, without what dbt compiles; return its folder."""
    # Its registry holds the way to the macros.
    for folder in (COURSES, PROJECT / "macros"):
        inside = folder.relative_to(PROJECT.parent)
        shutil.copytree(folder, place / inside, ignore=shutil.ignore_patterns("target", "logs"))
    return place / COURSES.relative_to(PROJECT.parent)


def location(executor: dg.ExecutorDefinition) -> dg.Definitions:
    """The code location of a place: its project, with a job over all assets of a day."""
    place = Path(os.environ[PLACE])
    made = preference_platform(
        place / COURSES.relative_to(PROJECT.parent),
        key_prefix="school",
        settings={"PREFS_DATA_DIR": str(place / "data")},
    )
    return dg.Definitions.merge(made, dg.Definitions(executor=executor))


def in_processes() -> dg.Definitions:
    """The location with Dagster's multi-process executor."""
    # Each process is a fork of one that has imported Dagster and dbt, which cost seconds.
    server = {"start_method": {"forkserver": {"preload_modules": ["dagster_prefs.defs.assembly"]}}}
    return location(dg.multiprocess_executor.configured(server))


def on_empty_disks() -> dg.Definitions:
    """The location whose steps start like containers."""
    return location(empty_disks)
