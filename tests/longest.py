"""In which order the files of tests are handed to the processes of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# The files that take longest, the longest first (`make test` prints the ten slowest tests). They are handed out
# first, so that no process is left with a long one at the end, and `make test-fast` leaves them out. Terraform's
# stands where its apply, which begins with the run and mostly waits, will have ended.
LONGEST = (
    "dbt/test_plan_and_apply.py",
    "end_to_end/test_demo.py",
    "dbt/test_lifecycle.py",
    "erasure/test_erase.py",
    "terraform/test_terraform_apply.py",
    "terraform/test_terraform_module.py",
    "freshness/test_stages.py",
    "freshness/test_broken_stages.py",
    "freshness/test_freshness_definitions.py",
    "local/test_services.py",
    "erasure/test_erase_on_glue.py",
    "offline_store/test_export_failures.py",
    "dbt/test_views_against_oracle.py",
    "end_to_end/test_ui.py",
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
)


def longest_first(items: list[pytest.Item]) -> None:
    """Put the longest files first and mark them slow; the others keep their order."""
    ranks = {FOLDER / name: rank for rank, name in enumerate(LONGEST)}
    for item in items:
        if item.path in ranks:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
