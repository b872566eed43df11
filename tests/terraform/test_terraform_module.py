"""The module as text: format, validity, the rule of every variable, and a security linter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from declared import enrolments
from terraform_harness import MODULE, Terraform, clean_environment

from dagster_prefs.declarations.registry import registry_dict
from dagster_prefs.environment import Environment

VARIABLE = re.compile(r'^variable "(\w+)" \{\n(.*?)^\}', re.MULTILINE | re.DOTALL)


def test_format(terraform_binary: str) -> None:
    done = subprocess.run(
        [terraform_binary, "fmt", "-check", "-recursive", "-diff", str(MODULE)],
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_validity(terraform: Terraform) -> None:
    answer = json.loads(terraform.run("validate", "-json", check=False).stdout)
    assert answer["diagnostics"] == []
    assert answer["valid"]


def test_rule_of_every_variable(terraform: Terraform) -> None:
    done = terraform.run("test", "-json", check=False, timeout_seconds=600)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    summary = next(event["test_summary"] for event in events if event["type"] == "test_summary")
    wrong = [event["@message"] for event in events if event["@level"] == "error"]
    assert (summary["status"], summary["failed"], summary["errored"], summary["skipped"]) == (
        "pass",
        0,
        0,
        0,
    ), wrong
    written = sum(path.read_text().count('\nrun "') for path in (MODULE / "tests").glob("*.tftest.hcl"))
    assert summary["passed"] == written > 0


def test_the_module_is_tested_with_a_composite_key_as_generated(tmp_path: Path) -> None:
    """The registry that the rules are run with has the table of a composite key as `prefs generate` writes it."""
    registry = json.loads((MODULE / "tests" / "registry_with_three_tables.json").read_text())
    generated = registry_dict(enrolments(tmp_path))["contract"]["tables"]["enrolment"]
    assert registry["contract"]["tables"]["enrolment"] == generated
    assert generated["rest_keys"] == [{"name": "course_id", "type": "S"}]


def test_a_region_that_aws_does_not_have_is_refused(terraform: Terraform) -> None:
    """Whether a well-formed region exists is the provider's knowledge, and not a rule of the variable."""
    done = terraform.run(
        "plan", "-no-color", "-state=nowhere.tfstate", "-var=environment=prod", "-var=region=eu-central-9",
        "-var=endpoint_url=http://127.0.0.1:9", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "invalid AWS Region: eu-central-9" in done.stderr


def test_no_rule_is_untested() -> None:
    variables = dict(VARIABLE.findall((MODULE / "variables.tf").read_text()))
    ruled = {name for name, body in variables.items() if "validation {" in body}
    tests = "".join(path.read_text() for path in (MODULE / "tests").glob("*.tftest.hcl"))
    refused = set(re.findall(r"\bvar\.(\w+)", " ".join(re.findall(r"expect_failures = \[(.*?)\]", tests))))
    assert ruled == refused
    # A yes or no needs no rule beyond its type.
    assert set(variables) - ruled == {"deletion_protection"}


def test_everything_is_described() -> None:
    for name in ("variables.tf", "outputs.tf"):
        blocks = re.findall(
            r'^(?:variable|output) "(\w+)" \{\n(.*?)^\}', (MODULE / name).read_text(), re.M | re.S
        )
        assert blocks
        assert [block for block, body in blocks if not re.search(r"^  description\s*= \S", body, re.M)] == []


def test_example_is_accepted(terraform: Terraform) -> None:
    """The example names existing variables, and all of them with values that their rules accept."""
    example = (MODULE / "example.tfvars").read_text()
    variables = {name for name, _ in VARIABLE.findall((MODULE / "variables.tf").read_text())}
    assert set(re.findall(r"^(\w+)\s*=", example, re.M)) <= variables
    folder = terraform.folder / "example"
    folder.mkdir(exist_ok=True)
    header = (MODULE / "tests" / "naming.tftest.hcl").read_text().split("variables {")[0]
    (folder / "example.tftest.hcl").write_text(
        f'{header}\nvariables {{\n{example}\n}}\n\nrun "example" {{\n  command = plan\n}}\n'
    )
    done = terraform.run("test", "-no-color", "-test-directory=example")
    assert "1 passed, 0 failed" in done.stdout


def test_the_workspace_names_an_environment_of_the_platform(terraform: Terraform) -> None:
    """The names are those that PREFS_ENVIRONMENT gives, in each environment's own state."""
    named = Environment("dev_anna")
    folder = terraform.folder / "workspace"
    folder.mkdir(exist_ok=True)
    header = (MODULE / "tests" / "naming.tftest.hcl").read_text().split("variables {")[0]
    (folder / "workspace.tftest.hcl").write_text(
        f"""{header}
variables {{
  region = "eu-central-1"
}}

run "workspace" {{
  command = plan

  assert {{
    condition = alltrue([for line in ["PREFS_ENVIRONMENT={named.name}", "PREFS_TABLE_PREFIX={named.table_prefix}",
      "PREFS_ICEBERG_NAMESPACE={named.namespace}"] : strcontains(output.env, "${{line}}\\n")])
    error_message = "the workspace's names are not the environment's: ${{output.env}}"
  }}
}}
"""
    )
    there = replace(terraform, workspace=named.workspace)
    done = there.run("test", "-no-color", "-test-directory=workspace")
    assert "1 passed, 0 failed" in done.stdout


def test_security_linter() -> None:
    checkov = os.environ.get("CHECKOV") or shutil.which("checkov")
    if checkov is None:
        pytest.skip(
            "checkov is not on the PATH: run .ci/run, which installs it from infra/locks, or set CHECKOV to the command"
        )
    done = subprocess.run(
        [checkov, "--skip-download", "--framework", "terraform", "dockerfile",
         "--directory", str(MODULE.parent), "--output", "json"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    reports = {report["check_type"]: report for report in json.loads(done.stdout)}
    for report in reports.values():
        results = report["results"]
        assert [(check["check_id"], check["resource"]) for check in results["failed_checks"]] == []
        assert results["parsing_errors"] == []
        reasons = [check["check_result"]["suppress_comment"] for check in results["skipped_checks"]]
        assert all(len(reason) >= 20 for reason in reasons), "a finding is skipped without a reason"
    # A linter that read nothing finds nothing.
    assert reports["terraform"]["summary"]["passed"] >= 100
    assert reports["dockerfile"]["summary"]["passed"] >= 10
