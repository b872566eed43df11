"""The stack of compose.yaml, judged without starting it: rules, each with a stack that breaks it."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
import yaml
from dagster._cli import cli as dagster_cli
from dagster._daemon.cli import cli as daemon_cli
from dagster_webserver.cli import create_dagster_webserver_cli

from dagster_prefs.access import EVERYTHING, digest, parse_tokens
from dagster_prefs.cli import cli
from dagster_prefs.settings import Settings, known_variables

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose.yaml"
NEEDED = yaml.safe_load((ROOT / "dbt_project/dbt_project.yml").read_text())["vars"]["requires_risingwave"][
    "version"
]

Stack = dict[str, Any]
Rule = Callable[[Stack], Iterator[str]]

# Read by botocore, and by Dagster through infra/dagster/dagster.yaml; all others are settings of this project.
OURS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} | {
    f"DAGSTER_PG_{name}" for name in ("HOST", "PORT", "DATABASE", "USER", "PASSWORD")
}
# What images that are not ours document.
THEIRS = re.compile(r"KAFKA_[A-Z_]+|POSTGRES_(DB|USER|PASSWORD)|(RW_)?ENABLE_TELEMETRY")
PROGRAMS: dict[str, click.Command] = {
    "prefs": cli,
    "dagster": dagster_cli,
    "dagster-daemon": daemon_cli,
    "dagster-webserver": create_dagster_webserver_cli(),
}
# Images whose digests could not be looked up where this was written; the README says how to pin them.
BY_TAG = {"risingwave", "dynamodb"}
# Modules with a command line → the program whose options they take.
MODULES = {"dagster_prefs": "prefs", "dagster_prefs.defs.webserver": "dagster-webserver"}
UNITS = {"k": 2**10, "m": 2**20, "g": 2**30}
SERVICE_KEYS = {
    "build", "command", "depends_on", "deploy", "entrypoint", "environment", "healthcheck", "image", "ports", "restart",
    "user", "volumes", "working_dir",
}  # fmt: skip
HEALTH_KEYS = {"disable", "interval", "retries", "start_period", "test", "timeout"}
TRIAL_CORES, TRIAL_BYTES = 4, 20 * 2**30


def load() -> Stack:
    stack: Stack = yaml.safe_load(COMPOSE.read_text())
    return stack


def runs_once(service: Stack) -> bool:
    return str(service.get("restart", "")).startswith("on-failure")


def ours(service: Stack) -> bool:
    return "build" in service


def size(text: str) -> int:
    return int(text[:-1]) * UNITS[text[-1]]


def limits(service: Stack) -> Stack:
    found: Stack = service.get("deploy", {}).get("resources", {}).get("limits", {})
    return found


def keys_are_those_of_compose(stack: Stack) -> Iterator[str]:
    if unknown := {key for key in stack if not key.startswith("x-")} - {"name", "services", "volumes"}:
        yield f"unknown keys {unknown}"
    for name, service in stack["services"].items():
        unknown = service.keys() - SERVICE_KEYS | service.get("healthcheck", {}).keys() - HEALTH_KEYS
        if unknown:
            yield f"{name}: unknown keys {unknown}"
        for key, value in service.get("healthcheck", {}).items():
            if key.startswith(("interval", "start", "timeout")) and not re.fullmatch(r"\d+s", str(value)):
                yield f"{name}: {key} is {value!r}, not seconds"


def images_are_pinned(stack: Stack) -> Iterator[str]:
    for name, service in stack["services"].items():
        image, _, digest = service.get("image", "").partition("@")
        repository, _, tag = image.partition(":")
        if not repository or "." in repository.split("/")[0]:
            yield f"{name}: {service.get('image')!r} is no image without a registry's host"
        if ours(service):
            if not (ROOT / service["build"]["dockerfile"]).is_file():
                yield f"{name}: there is no {service['build']['dockerfile']}"
        elif not re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-[a-z0-9]+)?", tag):
            yield f"{name}: the tag {tag!r} names no version"
        elif not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) and name not in BY_TAG:
            yield f"{name}: {image} has no digest, and a tag can be moved"


def ports_are_on_loopback(stack: Stack) -> Iterator[str]:
    taken: dict[str, str] = {}
    for name, service in stack["services"].items():
        for port in service.get("ports", []):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
                yield f"{name}: the port {port} is not on loopback"
            elif (other := taken.setdefault(str(port).split(":")[1], name)) != name:
                yield f"{name}: the port {port} is {other}'s"


def services_are_limited(stack: Stack) -> Iterator[str]:
    for name, service in stack["services"].items():
        found = limits(service)
        if not re.fullmatch(r"\d+(\.\d+)?", str(found.get("cpus"))) or not isinstance(found.get("cpus"), str):
            yield f"{name}: no limit of cores"
        if not re.fullmatch(r"\d+[kmg]", str(found.get("memory"))):
            yield f"{name}: no limit of memory"


def risingwave_keeps_the_trial_licence(stack: Stack) -> Iterator[str]:
    service = stack["services"]["risingwave"]
    options = dict(option.removeprefix("--").split("=") for option in service["command"][1:])
    cores, memory = float(limits(service)["cpus"]), size(limits(service)["memory"])
    if cores > TRIAL_CORES or memory >= TRIAL_BYTES:
        yield f"risingwave: {cores:g} cores and {memory} bytes are more than the trial licence grants"
    if int(options["parallelism"]) > cores:
        yield "risingwave: it computes on more cores than it has"
    if int(options["total-memory-bytes"]) >= memory:
        yield "risingwave: it plans with more memory than it has"
    version = tuple(int(part) for part in service["image"].partition("@")[0].rpartition(":v")[2].split("."))
    if version < tuple(map(int, NEEDED.split("."))):
        yield f"risingwave: the product needs {NEEDED}"


def servers_are_watched(stack: Stack) -> Iterator[str]:
    awaited = {
        dependency
        for service in stack["services"].values()
        for dependency, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    for name, service in stack["services"].items():
        check = service.get("healthcheck", {})
        if runs_once(service):
            if name not in awaited:
                yield f"{name}: it runs once, and nothing waits for its end"
        elif service.get("restart") != "unless-stopped":
            yield f"{name}: it is not started again"
        if not runs_once(service) and not check.get("test"):
            serves = service.get("ports") or not check.get("disable")
            if serves:
                yield f"{name}: no health check"
        if check.get("test") and check["test"][0] not in ("CMD", "CMD-SHELL"):
            yield f"{name}: a health check starts with CMD"
        if ours(service) and runs_once(service) and not check.get("disable"):
            yield f"{name}: it inherits a health check for a server"


def dependencies_can_be_met(stack: Stack) -> Iterator[str]:
    services = stack["services"]
    for name, service in services.items():
        for dependency, how in service.get("depends_on", {}).items():
            if dependency not in services:
                yield f"{name}: there is no service {dependency}"
                continue
            once = runs_once(services[dependency])
            wanted = "service_completed_successfully" if once else "service_healthy"
            if how["condition"] != wanted:
                yield f"{name}: waiting for {dependency} is {wanted}"
            elif not once and not services[dependency].get("healthcheck", {}).get("test"):
                yield f"{name}: {dependency} never becomes healthy"
    try:
        list(
            TopologicalSorter({name: s.get("depends_on", {}) for name, s in services.items()}).static_order()
        )
    except CycleError as error:
        yield f"dependencies form a circle: {error.args[1]}"


def variables_are_known(stack: Stack) -> Iterator[str]:
    for name, service in stack["services"].items():
        for variable, value in service.get("environment", {}).items():
            known = (
                variable in known_variables() or variable in OURS
                if ours(service)
                else THEIRS.fullmatch(variable)
            )
            if not known:
                yield f"{name}: nothing reads {variable}"
            if not isinstance(value, str):
                yield f"{name}: {variable} is {value!r}: quote it"


def volumes_are_declared(stack: Stack) -> Iterator[str]:
    used = {volume.partition(":")[0] for s in stack["services"].values() for volume in s.get("volumes", [])}
    if used != set(stack["volumes"]):
        yield f"volumes: declared and used differ by {used ^ set(stack['volumes'])}"


def commands_exist(stack: Stack) -> Iterator[str]:
    for name, service in stack["services"].items():
        if not ours(service):
            continue
        for words in (service.get("command", []), service.get("healthcheck", {}).get("test", [])[1:]):
            if words[:2] == ["python", "-m"] and words[2] in MODULES:
                words = [MODULES[words[2]], *words[3:]]
            if words[:2] == ["python", "-c"]:
                compile(words[2], name, "exec")
            elif words and (problem := refusal(words)):
                yield f"{name}: {problem}"


def refusal(words: list[str]) -> str | None:
    """Why a command line is none of its program's."""
    program, *rest = words
    command = PROGRAMS.get(program)
    if command is None:
        return f"no program {program}"
    context = click.Context(command, info_name=program)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            return f"{program} has no command {rest[0]}"
        command, rest = found, rest[1:]
        context = click.Context(command, parent=context)
    try:
        # Reads every value by its option's type, and runs nothing.
        command.make_context(command.name, list(rest), resilient_parsing=False)
    except click.ClickException as error:
        return error.format_message()
    return None


def checks_ask_the_right_port(stack: Stack) -> Iterator[str]:
    for name, service in stack["services"].items():
        inside = {str(port).split(":")[2] for port in service.get("ports", [])}
        for word in service.get("healthcheck", {}).get("test", []):
            for port in re.findall(r"(?:localhost|127\.0\.0\.1)[:/](\d+)", word):
                if inside and port not in inside and (name, port) != ("kafka", "9092"):
                    yield f"{name}: its check asks port {port}, it serves {sorted(inside)}"


def no_token_is_written_down(stack: Stack) -> Iterator[str]:
    for name, service in stack["services"].items():
        for variable, value in service.get("environment", {}).items():
            if "TOKEN" in variable and not re.fullmatch(r"\$\{[A-Z_]+:-\}", str(value)):
                yield f"{name}: everybody knows the value of {variable}"


RULES: list[Rule] = [
    no_token_is_written_down,
    keys_are_those_of_compose,
    images_are_pinned,
    ports_are_on_loopback,
    services_are_limited,
    risingwave_keeps_the_trial_licence,
    servers_are_watched,
    dependencies_can_be_met,
    variables_are_known,
    volumes_are_declared,
    commands_exist,
    checks_ask_the_right_port,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_stack_keeps_the_rules(rule: Rule) -> None:
    assert list(rule(load())) == []


@pytest.mark.parametrize(
    ("rule", "place", "value", "problem"),
    [
        (keys_are_those_of_compose, "kafka.healtcheck", {}, "unknown keys"),
        (keys_are_those_of_compose, "kafka.healthcheck.period", "5s", "unknown keys"),
        (keys_are_those_of_compose, "kafka.healthcheck.interval", 5, "not seconds"),
        (images_are_pinned, "kafka.image", "apache/kafka:latest", "names no version"),
        (images_are_pinned, "kafka.image", "apache/kafka", "names no version"),
        (images_are_pinned, "kafka.image", "quay.example/kafka:4.1.0", "registry"),
        (images_are_pinned, "setup.build.dockerfile", "Dockerfile", "there is no Dockerfile"),
        (ports_are_on_loopback, "webserver.ports", ["3000:3000"], "not on loopback"),
        (ports_are_on_loopback, "webserver.ports", ["127.0.0.1:8080:3000"], "feature-server: the port"),
        (services_are_limited, "events.deploy", {}, "events: no limit of memory"),
        (risingwave_keeps_the_trial_licence, "risingwave.deploy.resources.limits.cpus", "5", "trial licence"),
        (risingwave_keeps_the_trial_licence, "risingwave.deploy.resources.limits.memory", "20g", "trial licence"),
        (risingwave_keeps_the_trial_licence, "risingwave.deploy.resources.limits.memory", "4g", "more memory"),
        (risingwave_keeps_the_trial_licence, "risingwave.deploy.resources.limits.cpus", "1", "more cores"),
        (risingwave_keeps_the_trial_licence, "risingwave.image", "risingwavelabs/risingwave:v3.0.1", "3.0.2"),
        (servers_are_watched, "postgres.healthcheck", {}, "postgres: no health check"),
        (servers_are_watched, "webserver.healthcheck", {"disable": True}, "webserver: no health check"),
        (servers_are_watched, "setup.healthcheck", {}, "inherits"),
        (servers_are_watched, "events.depends_on", {}, "history: it runs once, and nothing waits"),
        (servers_are_watched, "daemon.restart", "no", "daemon: it is not started again"),
        (dependencies_can_be_met, "daemon.depends_on", {"ui": {"condition": "service_healthy"}}, "no service ui"),
        (dependencies_can_be_met, "setup.depends_on.topics.condition", "service_started", "waiting for topics"),
        (dependencies_can_be_met, "kafka.healthcheck", {}, "kafka never becomes healthy"),
        (
            dependencies_can_be_met, "kafka.depends_on", {"topics": {"condition": "service_completed_successfully"}},
            "circle",
        ),
        (variables_are_known, "setup.environment.PREFS_KAFKA", "kafka:9092", "nothing reads PREFS_KAFKA"),
        (variables_are_known, "postgres.environment.PG_PASSWORD", "x", "nothing reads PG_PASSWORD"),
        (variables_are_known, "code-location.environment.PREFS_SCHEDULES", True, "quote it"),
        (volumes_are_declared, "kafka.volumes", ["logs:/var/lib/kafka/data"], "logs"),
        (commands_exist, "events.command", ["python", "-m", "dagster_prefs", "simulat"], "no command simulat"),
        (commands_exist, "events.command", ["python", "-m", "dagster_prefs", "simulate", "--speed", "1"], "--speed"),
        (commands_exist, "events.command", ["python", "-m", "dagster_prefs", "simulate", "--rate", "x"], "--rate"),
        (commands_exist, "daemon.healthcheck.test", ["CMD", "dagster-daemon", "alive"], "no command alive"),
        (commands_exist, "webserver.command", ["dagit"], "no program dagit"),
        (
            no_token_is_written_down, "console.environment.PREFS_TOKENS", "${PREFS_TOKENS:-a:shop:b}",
            "console: everybody knows",
        ),
        (checks_ask_the_right_port, "webserver.ports", ["127.0.0.1:3000:3001"], "asks port 3000"),
    ],
)  # fmt: skip
def test_rule_can_fail(rule: Rule, place: str, value: Any, problem: str) -> None:
    # Anchors make services share parts in memory; here each has its own.
    stack = copy.deepcopy(load())
    stack["services"] = {name: copy.deepcopy(service) for name, service in stack["services"].items()}
    *path, last = ["services", *place.split(".")]
    inner = stack
    for step in path:
        inner = inner[step]
    inner[last] = value
    assert problem in " ".join(rule(stack))


@pytest.mark.parametrize("name", [name for name, service in load()["services"].items() if ours(service)])
def test_settings_are_valid_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [variable for variable in os.environ if variable.startswith(("PREFS_", "AWS_"))]:
        monkeypatch.delenv(variable)
    environment = load()["services"][name]["environment"]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    services = load()["services"]
    assert settings.engine_host in services
    assert f"127.0.0.1:{settings.port}:{settings.port}" in services["risingwave"]["ports"]
    assert urlsplit(settings.aws_endpoint or "").hostname in services
    if settings.kafka_bootstrap is not None:
        host, port = settings.kafka_bootstrap.split(":")
        assert f"INSIDE://{host}:{port}" in services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
        (script,) = services["topics"]["command"]
        made = re.search(r"for topic in (.*); do", script)
        assert made is not None
        assert set(made[1].split()) == set(settings.kafka_topics.values())


def test_make_stack_makes_a_token_once(tmp_path: Path) -> None:
    docker, seen = tmp_path / "bin" / "docker", tmp_path / "seen"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\n[ "$2" != up ] || echo "$PREFS_TOKENS" >> {seen}\n')
    docker.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFS_")}
    environment["PATH"] = f"{docker.parent}{os.pathsep}{environment['PATH']}"
    command = ["make", "--silent", "--file", str(ROOT / "Makefile"), "stack"]
    for own in ({}, {}, {"PREFS_TOKENS": "mine"}):
        subprocess.run(command, cwd=tmp_path, env=environment | own, check=True, capture_output=True)
    (tmp_path / ".env").write_text("PREFS_TOKENS=of-the-file\n")
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    first, again, mine, of_the_file = seen.read_text().splitlines()
    (token,) = parse_tokens(first)
    assert (token.grant, again, mine, of_the_file) == (replace(EVERYTHING, name="stack"), first, "mine", "")
    kept = tmp_path / ".prefs" / "stack-token"
    assert first.endswith(f":sha256:{digest(kept.read_text())}"), "the containers get the hash only"
    assert len(kept.read_text()) == 64
    assert kept.stat().st_mode & 0o777 == 0o600


def test_compose_itself_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker compose is not installed: the rules above are all that judges compose.yaml")
    done = subprocess.run(
        [docker, "compose", "--file", str(COMPOSE), "config", "--quiet"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
