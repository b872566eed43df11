"""In which order the files of tests are handed to the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# The files that take longest, roughly the longest first (`make test` prints the ten slowest tests). They are handed
# out first, so that no process is left with a long one at the end, and `make test-fast` leaves them out: each takes
# about five seconds of a processor or ten of waiting. The second and the third have services of their own, while
# the first builds the state that all others wait for. Terraform's stand apart: what looks at the applied environment
# comes when the apply, which begins with the run and mostly waits, will have ended.
LONGEST = (
    "dbt/test_plan_and_apply.py",
    "end_to_end/test_ui.py",
    "end_to_end/test_demo.py",
    "dbt/test_lifecycle.py",
    "terraform/test_terraform_module.py",
    "erasure/test_erase.py",
    "terraform/test_terraform_apply.py",
    "events/test_contact.py",
    "offline_store/test_training_set.py",
    "console/test_pages.py",
    "freshness/test_stages.py",
    "dbt/test_views_against_oracle.py",
    "freshness/test_freshness_definitions.py",
    "serving/test_profiles.py",
    "offline_store/test_export_failures.py",
    "dbt/test_live_steps.py",
    "dbt/test_risingwave_rules.py",
    "freshness/test_dashboards.py",
    "serving/test_server_clients.py",
    "test_own_projects.py",
    "offline_store/test_label_limits.py",
    "dynamodb/test_publisher.py",
    "local/test_services.py",
    "dbt/test_live_follower.py",
    "offline_store/test_export.py",
    "dynamodb/test_changefeed.py",
    "serving/test_preferences.py",
    "events/test_limits.py",
    "serving/test_server.py",
    "engine/test_old_server.py",
    "freshness/test_canary.py",
    "values/test_statistics.py",
    "freshness/test_retention.py",
    "events/test_any_project.py",
    "local/test_who_gets_in.py",
    "offline_store/test_parity.py",
    "test_definitions.py",
    "serving/test_catalogue.py",
    "events/test_kafka.py",
    "offline_store/test_damage.py",
    "test_reading_commands.py",
    "offline_store/test_full_disk.py",
    "offline_store/test_maintenance.py",
    "engine/test_refusals.py",
    "engine/test_tls.py",
    "test_cli.py",
    "dbt/test_rejected_replay.py",
    "offline_store/test_windows.py",
    "events/test_foreign_models.py",
)
# Long files too, of which others test a part: the same way with another project, on another store, or in processes of
# their own. They are handed out last, so that a run that has only so much time leaves out these.
LAST = (
    "freshness/test_broken_stages.py",
    "end_to_end/test_wheel.py",
    "end_to_end/test_foreign_story.py",
    "erasure/test_erase_on_glue.py",
    "declarations/test_projects.py",
    "dbt/test_refresh_job.py",
    "test_step_processes.py",
    "freshness/test_embedded.py",
    "offline_store/test_other_engines.py",
    "test_anywhere.py",
    "freshness/test_training_definitions.py",
    "values/test_drift.py",
    "test_without_dagster.py",
    "end_to_end/test_foreign_commands.py",
    "dbt/test_cost_measured.py",
    "erasure/test_erase_command.py",
    "dbt/test_no_content_stops_anything.py",
    "deployment/test_image.py",
    "offline_store/test_foreign_training.py",
    "dbt/test_noted_arrivals.py",
    "dbt/test_served_as_read.py",
    "serving/test_foreign_serving.py",
    "erasure/test_erase_foreign_project.py",
)
UNTIL = "TEST_UNTIL"
"""The variable with the time, in seconds since 1970, after which no test of `LAST` begins; none if it is not set."""


_OTHERS = (1, 0)
_RANKS = {
    FOLDER / name: (group, rank)
    for group, names in ((0, LONGEST), (2, LAST))
    for rank, name in enumerate(names)
}


def longest_first(items: list[pytest.Item]) -> None:
    """Put the longest files first and those of `LAST` behind all, both marked slow; the others keep their order."""
    for item in items:
        if item.path in _RANKS:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: _RANKS.get(item.path, _OTHERS))


def out_of_time(file: Path, now: float) -> bool:
    """Whether a test of this file begins, at `now` in seconds since 1970, after the time that the run has for it."""
    until = os.environ.get(UNTIL)
    return bool(until) and _RANKS.get(file, _OTHERS)[0] == 2 and now > float(until)


# Types every command of the documentation, which takes longer than the suite may: `make test-docs` names it.
DOCUMENTATION = FOLDER / "documentation"


def left_out(file: Path, markers: str, named: Sequence[str]) -> bool:
    """Whether a run with `-m MARKERS` of these paths leaves out a file or folder, so that nobody need import it."""
    if file == DOCUMENTATION or DOCUMENTATION in file.parents:
        return not any(Path(path.split("::")[0]).resolve().is_relative_to(DOCUMENTATION) for path in named)
    return markers == "not slow" and file in _RANKS
