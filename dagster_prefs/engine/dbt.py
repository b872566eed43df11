"""dbt in this process: the manifest when it is out of date, and runs whose results are data."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.explain import failed_statement
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import make_private_folder

# dbt keeps its configuration in process-wide state, so one invocation at a time.
_ONE_INVOCATION = threading.Lock()
_OFFLINE = ("--no-introspect", "--no-populate-cache")


class DbtError(PrefsError):
    """dbt failed; the message names the model or test and the reason."""


@dataclass(frozen=True)
class NodeResult:
    """What became of one model or test.

    `status` is dbt's own: success, error, skipped, pass, fail, warn. `seconds` is wall-clock time.
    """

    unique_id: str
    status: str
    message: str
    seconds: float
    failures: int | None

    @property
    def name(self) -> str:
        """Name of the model, or of the test."""
        return self.unique_id.split(".")[2]

    @property
    def ok(self) -> bool:
        """Whether the node did what it should; a warning did."""
        return self.status in ("success", "pass", "warn", "no-op", "reused")


class Dbt:
    """The dbt project against one engine.

    dbt reads the connection from `PREFS_ENGINE_*` (see `profiles.yml`), so each invocation runs with
    these variables set from `connection`; everything it writes goes to `target_dir`.
    """

    def __init__(
        self,
        connection: EngineConfiguration,
        project_dir: Path,
        target_dir: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.connection = connection
        self.project_dir = project_dir
        self.target_dir = target_dir
        self._environment = {
            "PREFS_ENGINE": connection.kind,
            "PREFS_ENGINE_HOST": connection.host,
            "PREFS_ENGINE_PORT": str(connection.port),
            "PREFS_ENGINE_DATABASE": connection.database,
            "PREFS_ENGINE_USER": connection.user,
            "PREFS_ENGINE_PASSWORD": connection.password,
            "PREFS_ENGINE_SSLMODE": connection.sslmode,
            "PREFS_ENGINE_SCHEMA": connection.schema,
            "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
            **(environment or {}),
        }

    @property
    def manifest_path(self) -> Path:
        """Where dbt writes its manifest."""
        return self.target_dir / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """dbt's manifest, parsed anew only when the project or its settings have changed.

        Raises DbtError when the project does not parse.
        """
        stamp = self.target_dir / "manifest.sha256"
        make_private_folder(self.target_dir)
        with FileLock(self.target_dir / "manifest.lock"):
            fingerprint = self._fingerprint()
            current = stamp.read_text() if stamp.is_file() and self.manifest_path.is_file() else ""
            if current != fingerprint:
                self._invoke(["parse"])
                stamp.write_text(fingerprint)
            loaded: dict[str, Any] = json.loads(self.manifest_path.read_bytes())
        return loaded

    def compiled_manifest(self) -> dict[str, Any]:
        """dbt's manifest with every model's `compiled_code`; asks no engine, so that none need run.

        Raises DbtError where the project does not parse or a model does not compile.
        """
        make_private_folder(self.target_dir)
        with FileLock(self.target_dir / "manifest.lock"):
            fingerprint = self._fingerprint()
            self._invoke(["compile", *_OFFLINE, "--select", "resource_type:model"])
            (self.target_dir / "manifest.sha256").write_text(fingerprint)
            loaded: dict[str, Any] = json.loads(self.manifest_path.read_bytes())
        return loaded

    def run(
        self,
        command: str,
        select: Sequence[str] = (),
        *,
        exclude: Sequence[str] = (),
        arguments: Sequence[str] = (),
        on_result: Callable[[NodeResult], None] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> list[NodeResult]:
        """`dbt <command>`, e.g. `build`, over the selected nodes; every node by default.

        `aliases` (model → relation) makes models under other names, which the others then read.
        Returns one result a node, failed ones included; `on_result` gets each as soon as it is there.
        Raises DbtError only when dbt could not run at all: no engine, no such model, a parse error.
        """
        args = [command, *arguments]
        if select:
            args += ["--select", " ".join(select)]
        if exclude:
            args += ["--exclude", " ".join(exclude)]

        described = _Described(self)

        def heard(event: Any) -> None:
            if on_result and event.info.name == "NodeFinished":
                info = event.data.node_info
                on_result(
                    NodeResult(
                        unique_id=info.unique_id,
                        status=str(event.data.run_result.status),
                        message=described.message(info.unique_id, event.data.run_result.message),
                        seconds=event.data.run_result.execution_time,
                        failures=None,
                    )
                )

        manifest = None
        if aliases:
            # What is on disk stays, with the compiled SQL of a compilation before this run.
            manifest = self._invoke(["parse", "--no-write-json"])
            for node in manifest.nodes.values():
                if node.resource_type == "model" and node.name in aliases:
                    node.relation_name = node.relation_name.replace(
                        f'"{node.alias}"', f'"{aliases[node.name]}"'
                    )
                    node.alias = aliases[node.name]
            # These names are this run's own: others read the manifest that is on disk.
            args.append("--no-write-json")
        outcome = self._invoke(args, heard, manifest)
        return [
            NodeResult(
                unique_id=result.node.unique_id,
                status=str(result.status),
                message=described.message(result.node.unique_id, result.message or ""),
                seconds=float(result.execution_time),
                failures=result.failures,
            )
            for result in getattr(outcome, "results", [])
        ]

    def compiled(self, models: Sequence[str]) -> dict[str, str]:
        """Model → its SQL as the engine would get it; asks no engine, so that none need run.

        Raises DbtError where a model does not compile.
        """
        outcome = self._invoke(["compile", *_OFFLINE, "--select", " ".join(models)])
        return {
            result.node.name: result.node.compiled_code.strip()
            for result in outcome.results
            if result.node.name in models
        }

    def _invoke(
        self, args: list[str], heard: Callable[[Any], None] | None = None, manifest: Any = None
    ) -> Any:
        from dbt.cli.main import dbtRunner

        common = [
            "--project-dir", str(self.project_dir),
            "--profiles-dir", str(self.project_dir),
            "--target", self.connection.kind,
            "--target-path", str(self.target_dir),
            "--log-path", str(self.target_dir / "logs"),
        ]  # fmt: skip
        quiet = ["--log-level", "none", "--log-level-file", "info", "--no-use-colors-file"]
        # Where the password lies is no part of the parsed project, and so not of its fingerprint.
        passfile = self.connection.password_file
        environment = self._environment | ({"PGPASSFILE": passfile} if passfile else {})
        with _ONE_INVOCATION, _environment(environment), _require_auth(self.connection.require_auth):
            runner = dbtRunner(manifest=manifest, callbacks=[heard] if heard else [])
            outcome = runner.invoke([*quiet, *args, *common])
        if outcome.exception is not None:
            if re.search("connection to server at|could not translate host name", str(outcome.exception)):
                raise self.connection.refusal(str(outcome.exception))
            raise DbtError(f"dbt {args[0]} failed: {one_line(str(outcome.exception))}")
        return outcome.result

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for package in ("dbt-core", "dbt-postgres", "dbt-risingwave"):
            digest.update(f"{package}={version(package)}\n".encode())
        for path in sorted(self.project_dir.rglob("*")):
            inside = path.relative_to(self.project_dir)
            if path.suffix in (".sql", ".yml") and inside.parts[0] not in ("target", "logs", "dbt_packages"):
                digest.update(f"{inside.as_posix()}\n".encode() + path.read_bytes())
        # Values of the environment are part of the parsed project; only their hash is kept.
        digest.update(json.dumps(self._environment, sort_keys=True).encode())
        return digest.hexdigest()


class _Described:
    """The messages of one run, each told with the node that it is about."""

    def __init__(self, dbt: Dbt) -> None:
        self._dbt = dbt

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        # As this run, or the compilation before it, has left it; only failures are looked up.
        found: dict[str, Any] = json.loads(self._dbt.manifest_path.read_bytes())
        return found

    def message(self, unique_id: str, said: str) -> str:
        meant = _meaning(said)
        if meant is None and "Error in" in said and self._dbt.manifest_path.is_file():
            meant = failed_statement(said, unique_id, self._manifest, self._dbt.connection)
        return meant or one_line(said)


# What RisingWave says of a statement that cannot work, and what it means to who runs it.
_MEANINGS = (
    (
        r"topic (\S+) not found",
        r"Kafka has no topic \1: create it, or set the name it has there with PREFS_KAFKA_TOPIC_…",
    ),
    (
        r"failed to fetch metadata from kafka \(([^)]*)\)",
        r"RisingWave gets no answer from Kafka at \1: check that PREFS_KAFKA_BOOTSTRAP resolves on its machines, and "
        "PREFS_KAFKA_SECURITY_PROTOCOL with what belongs to it",
    ),
    (
        r"ResourceNotFoundException|DynamoDB error\s[^\n]*table \S+ not found",
        "DynamoDB has no such table for the sink: materialize its asset dynamodb/… or make it with Terraform "
        "first, and check PREFS_TABLE_PREFIX, AWS_REGION and AWS_ENDPOINT_URL",
    ),
    (
        # In the words of 3.0.2 and later, and of older servers.
        r"DynamoDB table \S+ primary key .* must match RisingWave primary key|table \S+ key schema is empty"
        r"|key field (\S+) not found in schema or not primary key|primary key.*not.*key schema",
        "the DynamoDB table has another key than the contract's: it was made by somebody else or for another "
        "version; choose another PREFS_TABLE_PREFIX, or migrate it",
    ),
    (
        r"DynamoDB error\s[^\n]*table (\S+) is not active",
        r"DynamoDB's table \1 is not ACTIVE yet: wait until it is, then run again",
    ),
    (
        r"[Ff]eature \"?(\w+)\"? is not available|exceeds the maximum allowed by the license key",
        "RisingWave's licence does not grant this: set a key with `alter system set license_key = '…'`, keep the "
        "cluster at 4 CPU cores and below 20 GiB of memory, or set PREFS_PUBLISH=changefeed and "
        "PREFS_RISINGWAVE_SECRETS=off, which need none",
    ),
    (
        r"secret_store_private_key|secret store private key",
        "RisingWave has no secret_store_private_key, which PREFS_RISINGWAVE_SECRETS=on needs: set it in the "
        "server's configuration, or set PREFS_RISINGWAVE_SECRETS=off",
    ),
)


def _meaning(message: str) -> str | None:
    for said, meant in _MEANINGS:
        if found := re.search(said, message):
            return found.expand(meant) if "\\" in meant else meant
    return None


def one_line(message: str) -> str:
    """dbt's message without its position and call stack: what failed and why, on one line.

    What RisingWave says in a chain of causes is replaced by what to do, where that is known.
    """
    if meant := _meaning(message):
        return meant
    kept = []
    for line in message.strip().splitlines():
        text = line.strip()
        if text.startswith((">", "compiled code at")):
            continue
        if text:
            kept.append(text)
    return " ".join(kept)


class _Driver:
    """psycopg2 as dbt's adapters use it, with `require_auth` in every connection."""

    def __init__(self, driver: Any, require_auth: str) -> None:
        self._driver = driver
        self._require_auth = require_auth

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def connect(self, **parameters: Any) -> Any:
        return self._driver.connect(**parameters, require_auth=self._require_auth)


@contextmanager
def _require_auth(methods: str | None) -> Iterator[None]:
    """Let dbt's connections demand these methods. Its profiles have no such option, and libpq's variable
    PGREQUIREAUTH would reach Dagster's own storage, which this process connects to while dbt runs."""
    from dbt.adapters.postgres import connections as postgres
    from dbt.adapters.risingwave import connections as risingwave

    adapters: Sequence[Any] = (postgres, risingwave) if methods is not None else ()
    before = [adapter.psycopg2 for adapter in adapters]
    for adapter in adapters:
        adapter.psycopg2 = _Driver(adapter.psycopg2, str(methods))
    try:
        yield
    finally:
        for adapter, driver in zip(adapters, before, strict=True):
            adapter.psycopg2 = driver


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def compile_queries(project_dir: Path, relations: Sequence[str]) -> dict[str, str]:
    """Relation → its SQL as `Registry.queries` holds it: compiled for RisingWave in a fixed environment.

    Asks no engine. Raises DbtError where the project does not parse or a model does not compile.
    """
    if not relations:
        return {}
    nowhere = EngineConfiguration("127.0.0.1", 1, "any", "any", schema="any", kind="risingwave")
    with tempfile.TemporaryDirectory() as target:
        # A spread moves a key's day, which whoever asks about other days has done already.
        dbt = Dbt(nowhere, project_dir, Path(target), {"PREFS_EXPIRY_SPREAD_SECONDS": "0"})
        compiled = dbt.compiled(relations)
    return {relation: text.replace('"any"."any".', "") for relation, text in sorted(compiled.items())}
