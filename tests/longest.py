"""In which order the files of tests are handed to the processes of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# The files that take longest, roughly the longest first (`make test` prints the ten slowest tests). They are handed
# out first, so that no process is left with a long one at the end, and `make test-fast` leaves them out: each takes
# more than five seconds of a processor or fifteen of waiting. Terraform's stands where its apply, which begins with
# the run and mostly waits, will have ended.
LONGEST = (
    "dbt/test_plan_and_apply.py",
    "end_to_end/test_demo.py",
    "dbt/test_lifecycle.py",
    "end_to_end/test_foreign_story.py",
    "erasure/test_erase.py",
    "declarations/test_projects.py",
    "terraform/test_terraform_apply.py",
    "terraform/test_terraform_module.py",
    "freshness/test_stages.py",
    "freshness/test_broken_stages.py",
    "freshness/test_freshness_definitions.py",
    "events/test_contact.py",
    "offline_store/test_foreign_training.py",
    "erasure/test_erase_on_glue.py",
    "offline_store/test_export_failures.py",
    "dbt/test_views_against_oracle.py",
    "end_to_end/test_ui.py",
    "dbt/test_live_steps.py",
    "console/test_pages.py",
    "dbt/test_risingwave_rules.py",
    "offline_store/test_training_set.py",
    "offline_store/test_parity.py",
    "dbt/test_cost_measured.py",
    "freshness/test_training_definitions.py",
    "test_definitions.py",
    "test_anywhere.py",
    "dbt/test_rejected_replay.py",
    "dbt/test_refresh_job.py",
    "erasure/test_erase_command.py",
    "local/test_services.py",
    "end_to_end/test_foreign_commands.py",
    "serving/test_profiles.py",
    "offline_store/test_other_engines.py",
    "dbt/test_no_content_stops_anything.py",
    "deployment/test_image.py",
    "offline_store/test_windows.py",
    "dynamodb/test_changefeed.py",
    "local/test_who_gets_in.py",
    "dynamodb/test_publisher.py",
    "serving/test_server_clients.py",
    "engine/test_old_server.py",
    "test_cli.py",
    "dbt/test_noted_arrivals.py",
    "offline_store/test_full_disk.py",
    "serving/test_foreign_serving.py",
    "offline_store/test_label_limits.py",
    "events/test_limits.py",
    "engine/test_tls.py",
    "events/test_any_project.py",
    "offline_store/test_export.py",
    "engine/test_refusals.py",
    "offline_store/test_maintenance.py",
    "events/test_foreign_models.py",
    "deployment/test_security_doc.py",
    "dynamodb/test_contract_current.py",
    "erasure/test_erase_foreign_project.py",
    "test_without_dagster.py",
)


_RANKS = {FOLDER / name: rank for rank, name in enumerate(LONGEST)}


def longest_first(items: list[pytest.Item]) -> None:
    """Put the longest files first and mark them slow; the others keep their order."""
    for item in items:
        if item.path in _RANKS:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: _RANKS.get(item.path, len(_RANKS)))


def left_out(file: Path, markers: str) -> bool:
    """Whether `-m MARKERS` leaves out a whole file, so that nobody need import it."""
    return markers == "not slow" and file in _RANKS
