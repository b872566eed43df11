"""Where Terraform is not installed, its tests say so and the rest of the suite goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_terraform_tests_report_that_they_are_skipped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-q", "tests/terraform",
         "-k", "format or second_plan or rule_of_every_variable or no_rule_is_untested"],
        cwd=ROOT, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SKIPPED \[\d+\] .*: terraform is not on the PATH: install Terraform", done.stdout)
    # What only reads the module's text needs no Terraform.
    assert re.search(r"^1 passed, 3 skipped", done.stdout, re.MULTILINE)
