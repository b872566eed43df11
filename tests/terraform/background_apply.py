"""Apply the module to a local AWS server, in a process beside the tests: an apply mostly waits.

Started by the first process of a run that will need the outcome: `python background_apply.py FOLDER OWNER_PID PORT`.
FOLDER gets `applied.json` once Terraform has ended; the AWS server and Terraform's provider run on until the process
OWNER_PID has ended.
PORT goes into the outputs as the engine's.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
from filelock import FileLock
from terraform_harness import (
    MODULE,
    REGISTRY,
    ROOT,
    Terraform,
    clean_environment,
    find_plugins,
    running_provider,
)

VARIABLES = "staging.tfvars.json"
SERVER_SECONDS = 120
APPLY_SECONDS = 600


@dataclass(frozen=True)
class Outcome:
    """What became of the apply: `skip` says why it could not be tried, `output` what Terraform said.

    `provider` attaches further commands to the provider, which runs on.
    """

    endpoint: str
    returncode: int
    output: str
    skip: str = ""
    provider: str = ""


def copy_module(root: Path) -> Path:
    """Copy the module to `root`, beside the registry as in the tree; returns its folder."""
    folder = root / "infra" / "terraform"
    shutil.copytree(MODULE, folder, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    (root / REGISTRY).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / REGISTRY, root / REGISTRY)
    return folder


def initialise(terraform: Terraform) -> str:
    """Run `terraform init`; returns why the provider is not to be had, or nothing. Raises AssertionError."""
    plugins = find_plugins()
    done = terraform.run("init", "-no-color", *([f"-plugin-dir={plugins}"] if plugins else []), check=False)
    if done.returncode != 0 and plugins is None:
        return (
            "the AWS provider is neither on disk nor to be downloaded: "
            "set TF_PLUGIN_DIR to a folder of provider plugins"
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return ""


def start_in_background(folder: Path, binary: str, owner_pid: int, port: int) -> None:
    """Start this program, unless another process of the run has done so."""
    with FileLock(folder / "terraform.lock"):
        work = folder / "terraform"
        if not work.exists():
            work.mkdir()
            with (work / "log").open("w") as log:
                subprocess.Popen(
                    [sys.executable, __file__, str(work), str(owner_pid), str(port), binary],
                    cwd=Path(__file__).parent,
                    env=clean_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )


def wait_for_outcome(folder: Path) -> Outcome:
    """Wait until Terraform has ended. Raises TimeoutError with what the program said."""
    work = folder / "terraform"
    end = time.monotonic() + SERVER_SECONDS + APPLY_SECONDS
    while not (work / "applied.json").exists():
        if time.monotonic() > end or (work / "failed").exists():
            raise TimeoutError(f"terraform was not applied: {(work / 'log').read_text()[-4000:]}")
        time.sleep(0.2)
    return Outcome(**json.loads((work / "applied.json").read_text()))


def _start_server(work: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A local AWS server in a process of its own, on a free loopback port, and its URL."""
    log = work / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            env=clean_environment()
            | {"PYTHONUNBUFFERED": "1", "MOTO_RECORDER_FILEPATH": str(work / "requests.jsonl")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end and server.poll() is None:
        found = re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())
        if found:
            with urlopen(f"{found[1]}/moto-api/data.json", timeout=30) as answer:
                json.load(answer)
            return server, found[1]
        time.sleep(0.05)
    server.kill()
    raise RuntimeError(f"the local AWS server did not start: {log.read_text()[-2000:]}")


def _variables(endpoint: str, port: int) -> dict[str, Any]:
    """The whole module, with a trust of every kind."""
    return {
        "environment": "staging",
        "region": "eu-central-1",
        "endpoint_url": endpoint,
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
        "platform_environment": {"PREFS_ENGINE_PORT": str(port)},
    }


def _apply(terraform: Terraform, endpoint: str, port: int) -> Outcome:
    (terraform.folder / VARIABLES).write_text(json.dumps(_variables(endpoint, port)))
    done = terraform.run(
        "apply", "-no-color", "-auto-approve", f"-var-file={VARIABLES}",
        check=False, timeout_seconds=APPLY_SECONDS,
    )  # fmt: skip
    return Outcome(endpoint, done.returncode, done.stdout + done.stderr, provider=terraform.provider)


def _tell(work: Path, outcome: Outcome) -> None:
    (work / "applied.new").write_text(json.dumps(outcome.__dict__))
    (work / "applied.new").rename(work / "applied.json")


def main(work: Path, owner_pid: int, port: int, binary: str) -> None:
    """Apply, say what came of it, and keep server and provider until the owner has ended."""
    try:
        owner = psutil.Process(owner_pid)
        server, endpoint = _start_server(work)
        try:
            terraform = Terraform(binary, copy_module(work / "root"))
            if skip := initialise(terraform):
                _tell(work, Outcome(endpoint, 1, "", skip))
                return
            with running_provider(terraform, work / "provider.log") as attached:
                _tell(work, _apply(attached, endpoint, port))
                while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE and work.exists():
                    time.sleep(0.5)
        finally:
            server.terminate()
            server.wait(timeout=30)
    except BaseException:
        if work.exists():
            (work / "failed").touch()
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
