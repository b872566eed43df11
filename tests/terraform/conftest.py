"""Terraform on a copy of the module, and one environment applied beside the tests. Nothing is written into the tree."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from background_apply import VARIABLES, copy_module, initialise, start_in_background, wait_for_outcome
from built_state import SESSION_FOLDER, free_port
from terraform_harness import Applied, Terraform, running_provider


@pytest.fixture(scope="session")
def terraform_binary() -> str:
    binary = shutil.which("terraform")
    if binary is None:
        pytest.skip("terraform is not on the PATH: install Terraform 1.9 or newer to run these tests")
    return binary


def pytest_collection_finish(session: pytest.Session) -> None:
    """The apply begins with the run, whichever process will need it and when."""
    binary = shutil.which("terraform")
    if binary and not session.config.option.collectonly and any(map(needs_applied, session.items)):
        # A worker of xdist ends when it has nothing left to do, its parent when all of them have.
        owner = os.getppid() if hasattr(session.config, "workerinput") else os.getpid()
        start_in_background(session.config.stash[SESSION_FOLDER], binary, owner, free_port())


def needs_applied(item: pytest.Item) -> bool:
    """Whether a test looks at the applied environment."""
    return "applied" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="module")
def terraform(terraform_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terraform]:
    """Terraform, initialised in a copy of the module that lies beside the registry as in the tree."""
    terraform = Terraform(terraform_binary, copy_module(tmp_path_factory.mktemp("terraform")))
    if skip := initialise(terraform):
        pytest.skip(skip)
    with running_provider(terraform, terraform.folder / "provider.log") as attached:
        yield attached


@pytest.fixture(scope="module")
def applied(terraform_binary: str, session_folder: Path) -> Iterator[Applied]:
    """The applied environment, for the one file that looks at it.

    It is destroyed after that file: at the end of the session a minute of it would stand alone.
    """
    outcome = wait_for_outcome(session_folder)
    if outcome.skip:
        pytest.skip(outcome.skip)
    assert outcome.returncode == 0, outcome.output
    folder = session_folder / "terraform" / "root" / "infra" / "terraform"
    terraform = Terraform(terraform_binary, folder, outcome.provider)
    variables = [f"-var-file={VARIABLES}"]
    outputs = json.loads(terraform.run("output", "-json").stdout)
    environment = Applied(
        terraform, outcome.endpoint, variables, {name: output["value"] for name, output in outputs.items()}
    )
    yield environment
    # The way out of an environment that holds data: lift the protection, then destroy.
    bucket = environment.outputs["lake_bucket"]
    environment.client("s3").put_object(Bucket=bucket, Key="warehouse/last", Body=b"x")
    # Nobody else changes this server, so the state needs no second look.
    unprotected = [
        "-no-color",
        "-auto-approve",
        "-refresh=false",
        *variables,
        "-var=deletion_protection=false",
    ]
    terraform.run("apply", *unprotected)
    terraform.run("destroy", *unprotected)
    left = terraform.run("state", "list").stdout.split()
    assert left == [], f"destroy left {left}"
    tables = environment.client("dynamodb").list_tables()["TableNames"]
    assert environment.outputs["table_names"]["viewer"] not in tables
    buckets = environment.client("s3").list_buckets()["Buckets"]
    assert bucket not in [entry["Name"] for entry in buckets]
