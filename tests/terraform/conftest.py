"""Terraform on a copy of the module, and a local AWS server for it. Nothing is written into the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from terraform_harness import CONTRACT, MODULE, ROOT, Applied, Terraform, clean_environment, find_plugins

VARIABLES = "staging.tfvars.json"


@pytest.fixture(scope="session")
def terraform_binary() -> str:
    binary = shutil.which("terraform")
    if binary is None:
        pytest.skip("terraform is not on the PATH: install Terraform 1.9 or newer to run these tests")
    return binary


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs no applied environment first: it runs while Terraform applies, which mostly waits."""
    room = [item for item in items if item.path.parent == Path(__file__).parent]
    places = [place for place, item in enumerate(items) if item in room]
    room.sort(key=lambda item: "applied" in getattr(item, "fixturenames", ()))
    for place, item in zip(places, room, strict=True):
        items[place] = item


@pytest.fixture(scope="session")
def terraform(terraform_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    """Terraform, initialised in a copy of the module that lies beside the contract as in the tree."""
    root = tmp_path_factory.mktemp("terraform")
    folder = root / "infra" / "terraform"
    shutil.copytree(MODULE, folder, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    (root / CONTRACT).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / CONTRACT, root / CONTRACT)
    terraform = Terraform(terraform_binary, folder)
    plugins = find_plugins()
    done = terraform.run("init", "-no-color", *([f"-plugin-dir={plugins}"] if plugins else []), check=False)
    if done.returncode != 0 and plugins is None:
        pytest.skip(
            "the AWS provider is neither on disk nor to be downloaded: "
            "set TF_PLUGIN_DIR to a folder of provider plugins"
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return terraform


@pytest.fixture(scope="session")
def aws_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a local AWS server in a process of its own, on a free loopback port."""
    log = tmp_path_factory.mktemp("aws") / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            env=clean_environment()
            | {"PYTHONUNBUFFERED": "1", "MOTO_RECORDER_FILEPATH": str(log.with_name("requests.jsonl"))},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _wait_for_server(server, log)
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for_server(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())
        if found:
            with urlopen(f"{found[1]}/moto-api/data.json", timeout=10) as answer:
                json.load(answer)
            return found[1]
        if server.poll() is not None:
            break
        time.sleep(0.05)
    pytest.fail(f"the local AWS server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def start_apply(
    terraform: Terraform, aws_server: str, free_port: Callable[[], int]
) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts `terraform apply` of the whole module, with a trust of every kind, at the first call."""
    values = {
        "environment": "staging",
        "region": "eu-central-1",
        "endpoint_url": aws_server,
        "engine": "local",
        "tags": {"team": "engagement"},
        "eks_oidc_provider_arn": "arn:aws:iam::123456789012:oidc-provider/oidc.example.com/id/ABC123",
        "trust": {
            "sink-writer": {"service_accounts": ["risingwave:compute"]},
            "exporter": {"ec2": True},
            "serving-reader": {"principals": ["210987654321"], "external_id": "ranking"},
            "freshness-reader": {
                "service_accounts": ["prefs:freshness"],
                "principals": ["arn:aws:iam::123456789012:role/dagster"],
            },
        },
        "alarm_topic_arns": ["arn:aws:sns:eu-central-1:123456789012:prefs-alarms"],
        "platform_environment": {"PREFS_ENGINE_PORT": str(free_port())},
    }
    (terraform.folder / VARIABLES).write_text(json.dumps(values))
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        if not started:
            started.append(terraform.start("apply", "-no-color", "-auto-approve", f"-var-file={VARIABLES}"))
        return started[0]

    yield start
    for apply in started:
        # Only where the session ends before the apply does; what it says is read, or a full pipe would stop it.
        if apply.poll() is None:
            apply.terminate()
            try:
                apply.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                apply.kill()
                apply.communicate()


@pytest.fixture(scope="session")
def applying(request: pytest.FixtureRequest, start_apply: Callable[[], subprocess.Popen[str]]) -> None:
    """For a long test that needs no applied environment: the apply that others wait for runs meanwhile.

    Where files of tests are spread over processes, the others are at work in another one.
    """
    waited_for = any("applied" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if waited_for and "PYTEST_XDIST_WORKER" not in os.environ:
        start_apply()


@pytest.fixture(scope="session")
def applied(
    start_apply: Callable[[], subprocess.Popen[str]], terraform: Terraform, aws_server: str
) -> Iterator[Applied]:
    """The applied environment; destroyed at the end."""
    apply = start_apply()
    out, err = apply.communicate(timeout=300)
    assert apply.returncode == 0, out + err
    variables = [f"-var-file={VARIABLES}"]
    outputs = json.loads(terraform.run("output", "-json").stdout)
    environment = Applied(
        terraform, aws_server, variables, {name: output["value"] for name, output in outputs.items()}
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
    assert environment.outputs["table_name"] not in tables
    buckets = environment.client("s3").list_buckets()["Buckets"]
    assert bucket not in [entry["Name"] for entry in buckets]
