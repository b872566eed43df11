"""The terraform command in a clean environment, and an applied environment as the tests see it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "infra" / "terraform"
REGISTRY = Path("dbt_project") / "registry.json"

# Of nobody; a local AWS server takes any. None of them may end up in the state.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATERRAFORMTEST",
    "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-terraform-tests",
}
STEERING = {
    "CHECKPOINT_DISABLE": "1",
    "TF_IN_AUTOMATION": "1",
    "TF_INPUT": "0",
    # Without collections below that size Terraform and its provider take a third less of the processors' time.
    "GOGC": "off",
    "GOMEMLIMIT": "1500MiB",
}
PROVIDER_SECONDS = 120


def clean_environment() -> dict[str, str]:
    """This process's environment without what would steer Terraform, the provider or the settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TF_", "AWS_", "PREFS_")) or name == "AWS_CA_BUNDLE"
    }
    config = os.environ.get("TF_CLI_CONFIG_FILE")
    # An ordinary user may have inherited root's.
    if config and os.access(config, os.R_OK):
        kept["TF_CLI_CONFIG_FILE"] = config
    return kept


@dataclass
class Terraform:
    """The terraform command in one working folder; `provider` is what attaches it to a provider that runs.

    `workspace` is the default one if it is empty.
    """

    binary: str
    folder: Path
    provider: str = ""
    workspace: str = ""

    def run(
        self, *arguments: str, check: bool = True, timeout_seconds: int = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run one command; with `check` a failure fails the test with Terraform's own words."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except BaseException:
            process.kill()
            raise
        if check and process.returncode != 0:
            pytest.fail(f"terraform {' '.join(arguments)}:\n{out[-4000:]}\n{err[-4000:]}")
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start one command and leave it running."""
        attach = {"TF_REATTACH_PROVIDERS": self.provider} if self.provider else {}
        if self.workspace:
            attach["TF_WORKSPACE"] = self.workspace
        return subprocess.Popen(
            [self.binary, *arguments],
            cwd=self.folder,
            env=clean_environment() | CREDENTIALS | STEERING | attach,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextmanager
def running_provider(terraform: Terraform, log: Path) -> Iterator[Terraform]:
    """Run the provider of an initialised folder in a process of its own, to which every command attaches.

    Terraform would start it several times for each command, and a start takes a second of a processor. One command
    at a time may use it, because each configures it anew. What it writes goes to `log`.

    Raises RuntimeError with what it wrote if it does not start.
    """
    (binary,) = terraform.folder.glob(".terraform/providers/*/hashicorp/aws/*/*/terraform-provider-aws*")
    with log.open("w") as output:
        provider = subprocess.Popen(
            [binary, "-debug"],
            env=clean_environment() | CREDENTIALS | STEERING,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + PROVIDER_SECONDS
        while not (found := re.search(r"TF_REATTACH_PROVIDERS='(.*)'", log.read_text())):
            if provider.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the AWS provider did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield replace(terraform, provider=found[1])
    finally:
        provider.terminate()
        provider.wait(timeout=30)


def find_plugins() -> Path | None:
    """The folder of provider plugins on disk: TF_PLUGIN_DIR, or where a system usually keeps them."""
    named = os.environ.get("TF_PLUGIN_DIR")
    if named:
        return Path(named)
    usual = [
        Path.home() / ".terraform.d" / "plugins",
        Path.home() / ".local/share/terraform/plugins",
        Path("/usr/local/share/terraform/plugins"),
        Path("/usr/share/terraform/plugins"),
        *sorted(Path("/opt").glob("*")),
    ]
    for folder in usual:
        if any(folder.glob("*/hashicorp/aws/*/*/terraform-provider-aws*")):
            return folder
    return None


@dataclass
class Applied:
    """One applied environment: its outputs, and clients that see it."""

    terraform: Terraform
    endpoint: str
    variables: list[str]
    outputs: dict[str, Any]

    def client(self, service: str) -> Any:
        """A boto3 client of the local AWS server."""
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="eu-central-1",
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )


@contextmanager
def recorded_requests(endpoint: str) -> Iterator[list[dict[str, Any]]]:
    """Every request that the local AWS server receives in the block; the list is filled at its end."""
    requests: list[dict[str, Any]] = []

    def recorder(step: str, method: str = "POST") -> bytes:
        with urlopen(Request(f"{endpoint}/moto-api/recorder/{step}", method=method), timeout=30) as answer:
            return bytes(answer.read())

    recorder("reset-recording")
    recorder("start-recording")
    try:
        yield requests
    finally:
        recorder("stop-recording")
    requests += [json.loads(line) for line in recorder("download-recording", "GET").splitlines()]
