"""Every command of docs/operations.md runs in a test or is marked as needing something that is not here."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore import xform_name

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "operations.md"
BLOCK = re.compile(r"^ *```sh ?([a-z-]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, list[str]]]:
    """(mark, commands) of every shell block."""
    return [
        (mark, [line.strip() for line in body.splitlines() if line.strip()])
        for mark, body in BLOCK.findall(DOCUMENT.read_text())
    ]


def test_blocks_are_found_and_marked() -> None:
    text = DOCUMENT.read_text()
    assert len(blocks()) == text.count("```sh") > 0
    assert {mark for mark, _ in blocks()} <= {"", "needs-aws", "needs-risingwave", "needs-docker"}


def test_unmarked_commands_are_what_the_terraform_tests_run() -> None:
    """They run there with another variables file and without colours; nothing else may differ."""
    harness = "".join(path.read_text() for path in (ROOT / "tests" / "terraform").glob("*.py"))
    for mark, commands in blocks():
        for command in commands if not mark else ():
            program, verb, *options = shlex.split(command)
            if program == "prefs":
                # tests/erasure/test_erase_command.py and tests/dbt/test_plan_and_apply.py run each of these.
                assert verb in ("erase", "subject", "plan", "apply"), f"no test runs `{command}`"
                continue
            assert program == "terraform", f"no test runs `{command}`: mark its block with what it needs"
            assert re.search(rf'terraform\.run\(\s*"{verb}"', harness), command
            for option in options:
                name = option if option.startswith("-var=") else option.split("=")[0]
                assert f'"{name}' in harness, f"no test runs terraform {verb} with {option}"


def test_marked_commands_name_what_exists() -> None:
    """Folders, files, models and targets of commands that cannot run here."""
    models = {path.stem for path in (ROOT / "dbt_project" / "models").rglob("*.sql")}
    profiles = (ROOT / "dbt_project" / "profiles.yml").read_text()
    seen = set()
    for mark, commands in blocks():
        for command in commands if mark else ():
            program, *words = shlex.split(command)
            options = dict(pairwise(words))
            seen.add(program)
            if program == "cd":
                assert (ROOT / words[0]).is_dir(), command
            elif program == "docker" and words[0] == "build":
                assert (ROOT / options["-f"]).is_file(), command
            elif program == "dbt":
                assert options["--select"].strip("+") in models, command
                assert f"{options['--target']}:" in profiles, command
            elif program == "terraform" and words[0] == "import":
                kind, name = next(word for word in words if word.startswith("aws_")).split(".")
                module = "".join(path.read_text() for path in (ROOT / "infra" / "terraform").glob("*.tf"))
                assert f'resource "{kind}" "{name}"' in module, command
    assert {"aws", "cd", "dbt", "docker", "terraform"} <= seen


def aws_commands() -> list[list[str]]:
    """The arguments of every command of the AWS client."""
    commands = (shlex.split(command) for _, found in blocks() for command in found)
    return [command[1:] for command in commands if command[0] == "aws"]


@pytest.mark.parametrize("arguments", aws_commands(), ids=lambda arguments: " ".join(arguments[:2]))
def test_aws_commands_are_known_to_aws(arguments: list[str]) -> None:
    """Service, operation and options exist, and no required one is missing."""
    service, operation, *options = arguments
    model = botocore.session.get_session().get_service_model({"s3api": "s3"}.get(service, service))
    if operation == "wait":
        waiters = botocore.session.get_session().get_waiter_model(model.service_name)
        names = {xform_name(name, "-"): name for name in waiters.waiter_names}
        operation = xform_name(waiters.get_waiter(names[options.pop(0)]).operation, "-")
    operations = {xform_name(name, "-"): name for name in model.operation_names}
    shape: Any = model.operation_model(operations[operation]).input_shape
    known = {f"--{xform_name(name, '-')}" for name in shape.members}
    used = {option for option in options if option.startswith("--")}
    assert used <= known
    assert {f"--{xform_name(name, '-')}" for name in shape.required_members} <= used


def test_every_alarm_is_explained() -> None:
    """The alarms of the Terraform module are the rows of the table, by name."""
    module = (ROOT / "infra" / "terraform" / "observability.tf").read_text()
    named = set(re.findall(r'alarm_name\s*= "\$\{local\.prefix\}(prefs-[a-z-]+)(?:\$|")', module))
    throttles = set(re.findall(r"^\s*((?:read|write)-throttles)\s*=", module, re.MULTILINE))
    explained = set(re.findall(r"`(prefs-[a-z-]+)`", DOCUMENT.read_text().split("## Alarms")[1]))
    reads = {name for name in explained if name.startswith("prefs-read-latency-")}
    operations = re.search(r"read_operations\s*= \[(.*?)\]", module)
    assert operations
    assert reads == {f"prefs-read-latency-{name.lower()}" for name in re.findall(r"\w+", operations[1])}
    expected = (
        {f"prefs-{name}" for name in throttles}
        | {name.removesuffix("-") for name in named - {"prefs-", "prefs-read-latency-"}}
        | reads
    )
    assert explained == expected
