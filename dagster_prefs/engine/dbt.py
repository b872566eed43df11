"""Run dbt in a child process: parse the manifest when it is out of date, and return the results of runs as data."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

from filelock import FileLock

import dagster_prefs
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.explain import failed_statement
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import make_private_folder
from dagster_prefs.redaction import redact_options

_END_SECONDS = 10.0
# The tests of the selected models would be compiled too, which takes twice as long as the models.
_OFFLINE = ("--no-introspect", "--no-populate-cache", "--indirect-selection", "empty")


class DbtError(PrefsError):
    """dbt failed; the message names the model or test and the reason."""


@dataclass(frozen=True)
class NodeResult:
    """The result of one model or test.

    `status` is dbt's own: success, error, skipped, pass, fail, warn. `seconds` is wall-clock time.
    """

    unique_id: str
    status: str
    message: str
    seconds: float
    failures: int | None

    @property
    def name(self) -> str:
        """Name of the model or test."""
        return self.unique_id.split(".")[2]

    @property
    def ok(self) -> bool:
        """Whether the node succeeded; a warning counts as success."""
        return self.status in ("success", "pass", "warn", "no-op", "reused")


class Dbt:
    """The dbt project against one engine.

    dbt reads the connection from `PREFS_ENGINE_*` (see `profiles.yml`): each invocation runs in the child process,
    whose environment is this process's with these variables set from `connection`, and with those of `given`, which
    holds what this process was given instead of its environment. dbt writes only to `target_dir`.
    `process` defaults to one that all instances in this process share.
    """

    def __init__(
        self,
        connection: EngineConfiguration,
        project_dir: Path,
        target_dir: Path,
        environment: Mapping[str, str] | None = None,
        *,
        given: Mapping[str, str] | None = None,
        process: DbtProcess | None = None,
    ) -> None:
        self.connection = connection
        self._process = process or _SHARED
        self.project_dir = project_dir
        self.target_dir = target_dir
        self._given = dict(given or {})
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
        """The path of dbt's manifest."""
        return self.target_dir / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """Return dbt's manifest, parsed again only if the project or its settings have changed.

        Raises DbtError if the project does not parse.
        """
        stamp = self.target_dir / "manifest.sha256"
        make_private_folder(self.target_dir)
        with FileLock(self.target_dir / "manifest.lock"):
            fingerprint = self.fingerprint()
            current = stamp.read_text() if stamp.is_file() and self.manifest_path.is_file() else ""
            if current != fingerprint:
                self._invoke(["parse"], self.manifest_path)
                stamp.write_text(fingerprint)
            loaded: dict[str, Any] = json.loads(self.manifest_path.read_bytes())
        return loaded

    def compiled_manifest(self) -> dict[str, Any]:
        """Return dbt's manifest with every model's `compiled_code`. Needs no running engine.

        Raises DbtError if the project does not parse or a model does not compile.
        """
        make_private_folder(self.target_dir)
        with FileLock(self.target_dir / "manifest.lock"):
            fingerprint = self.fingerprint()
            self._invoke(["compile", *_OFFLINE, "--select", "resource_type:model"], self.manifest_path)
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
        """Run `dbt <command>`, e.g. `build`, over the selected nodes, by default all.

        `aliases` (model → relation) creates models under other names, which dependent models then read. `arguments` are
        options of the command; the project is parsed without them, except `--vars`.

        Returns one result per node, failed ones included; `on_result` receives each as soon as the node finishes.
        Raises DbtError only if dbt could not run at all: no engine, no such model, a parse error.
        """
        args = [command, *arguments]
        if select:
            args += ["--select", " ".join(select)]
        if exclude:
            args += ["--exclude", " ".join(exclude)]

        described = _Described(self)

        def node_result(told: Mapping[str, Any]) -> NodeResult:
            fields = {name: told[name] for name in ("unique_id", "status", "seconds", "failures")}
            return NodeResult(message=described.message(told["unique_id"], told["message"]), **fields)

        def heard(told: Mapping[str, Any]) -> None:
            if on_result:
                on_result(node_result(told))

        # Aliases apply to this run only: other runs read the manifest on disk.
        kept = None if aliases else self.manifest_path
        return [node_result(told) for told in self._invoke(args, kept, heard, aliases)]

    def operate(self, macro: str, arguments: Mapping[str, str]) -> None:
        """Run a macro of the project with these arguments. Raises DbtError with the reason if it fails."""
        args = ["run-operation", macro, "--args", json.dumps(arguments)]
        for result in self._invoke(args):
            if result["status"] != "success":
                # The engine may repeat the statement, with the credentials that were inserted into it.
                raise DbtError(f"dbt {macro} failed: {redact_options(one_line(result['message']))}")

    def compiled(self, models: Sequence[str]) -> dict[str, str]:
        """Map each model to its SQL as the engine would get it. Needs no running engine.

        Raises DbtError if a model does not compile.
        """
        results = self._invoke(["compile", *_OFFLINE, "--select", " ".join(models)])
        names = [(result["unique_id"].split(".")[2], result["compiled"]) for result in results]
        return {name: compiled.strip() for name, compiled in names if name in models}

    def _invoke(
        self,
        args: list[str],
        manifest: Path | None = None,
        heard: Callable[[Mapping[str, Any]], None] = lambda told: None,
        aliases: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        common = [
            "--project-dir", str(self.project_dir.absolute()),
            "--profiles-dir", str(self.project_dir.absolute()),
            "--target", self.connection.kind,
            "--target-path", str(self.target_dir.absolute()),
            "--log-path", str(self.target_dir.absolute() / "logs"),
        ]  # fmt: skip
        quiet = ["--log-level", "none", "--log-level-file", "info", "--no-use-colors-file"]
        # Authentication is not part of the parsed project, and so not of its fingerprint. dbt's profiles have no option
        # for the methods, and setting this process's own variable would affect Dagster's storage.
        proof = {"PGPASSFILE": self.connection.password_file, "PGREQUIREAUTH": self.connection.require_auth}
        request = {
            "before": quiet,
            "arguments": args,
            "after": common,
            "aliases": dict(aliases or {}),
            "manifest": None if manifest is None else str(manifest.absolute()),
            "environment": {
                **os.environ,
                **self._given,
                **self._environment,
                **{name: value for name, value in proof.items() if value is not None},
            },
        }
        answer = self._process.ask(request, heard)
        if (error := answer.get("error")) is not None:
            if re.search("connection to server at|could not translate host name", error):
                raise self.connection.refusal(error)
            raise DbtError(f"dbt {args[0]} failed: {one_line(error)}")
        results: list[dict[str, Any]] = answer["results"]
        return results

    def fingerprint(self) -> str:
        """Return a hash of the inputs of a parse: the project's files, dbt's version and the settings."""
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


class DbtProcess:
    """The child process that runs dbt; it serves every `Dbt` of this process, one invocation at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any], heard: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        """Send a request, pass on each node's result, and return the last answer.

        Raises DbtError if the process ends without an answer. If the wait is interrupted, by Ctrl-C too, the invocation
        is ended.
        """
        with self._lock:
            process = self._running()
            requests, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
            try:
                requests.write(json.dumps(request).encode() + b"\n")
                requests.flush()
                for line in answers:
                    answer: dict[str, Any] = json.loads(line)
                    if "node" not in answer:
                        return answer
                    heard(answer["node"])
            except BrokenPipeError:
                pass
            except BaseException:
                # dbt answers an interrupt by ending its sessions in the engine.
                process.send_signal(signal.SIGINT)
                self._reap(process)
                raise
            raise DbtError(
                f"the process that runs dbt ended in the middle of `dbt {request['arguments'][0]}` (exit code "
                f"{process.wait()}): run it again; if it was killed, this machine may be short of memory"
            )

    def end(self) -> None:
        """End the process if it runs; the next request starts another one."""
        if (process := self._process) is not None:
            with suppress(BrokenPipeError):
                cast(IO[bytes], process.stdin).close()
            self._reap(process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            package_root = str(Path(dagster_prefs.__file__).parents[1])
            path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                # The working folder is not on its path, because its files may be named like modules.
                [sys.executable, "-P", "-m", "dagster_prefs.engine.dbt_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                # The terminal's Ctrl-C reaches this process only, which then ends the invocation in order.
                start_new_session=True,
            )
        return self._process

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()


_SHARED = DbtProcess()
atexit.register(_SHARED.end)


class _Described:
    """The messages of one run, each explained with its node."""

    def __init__(self, dbt: Dbt) -> None:
        self._dbt = dbt

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        # The manifest as this run, or the compilation before it, left it; read only to explain failures.
        found: dict[str, Any] = json.loads(self._dbt.manifest_path.read_bytes())
        return found

    def message(self, unique_id: str, said: str) -> str:
        meant = _meaning(said)
        if meant is None and "Error in" in said and self._dbt.manifest_path.is_file():
            meant = failed_statement(said, unique_id, self._manifest, self._dbt.connection)
        return meant or one_line(said)


# RisingWave's errors about statements that cannot work, and their explanation for the user.
_MEANINGS = (
    (
        r"topic (\S+) not found",
        r"Kafka has no topic \1: create it, or set its name in Kafka with PREFS_KAFKA_TOPIC_…",
    ),
    (
        r"failed to fetch metadata from kafka \(([^)]*)\)",
        r"RisingWave got no answer from Kafka at \1: check that PREFS_KAFKA_BOOTSTRAP resolves on its machines, and "
        "PREFS_KAFKA_SECURITY_PROTOCOL with what belongs to it",
    ),
    (
        r"ResourceNotFoundException|DynamoDB error\s[^\n]*table \S+ not found",
        "the DynamoDB table of the sink does not exist: materialize its asset dynamodb/… or create it with Terraform "
        "first, and check PREFS_TABLE_PREFIX, AWS_REGION and AWS_ENDPOINT_URL",
    ),
    (
        # The wording of 3.0.2 and later, and of older servers.
        r"DynamoDB table \S+ primary key .* must match RisingWave primary key|table \S+ key schema is empty"
        r"|key field (\S+) not found in schema or not primary key|primary key.*not.*key schema",
        "the DynamoDB table has another key than the contract, so it was created by somebody else or for another "
        "version: choose another PREFS_TABLE_PREFIX, or migrate it",
    ),
    (
        r"DynamoDB error\s[^\n]*table (\S+) is not active",
        r"the DynamoDB table \1 is not ACTIVE yet: wait until it is, then run again",
    ),
    (
        r"[Ff]eature \"?(\w+)\"? is not available|exceeds the maximum allowed by the license key",
        "RisingWave's licence does not include this feature: set a key with `alter system set "
        "license_key = '…'`, keep the "
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
    """Return dbt's message on one line, without its position and call stack.

    Known chains of causes from RisingWave are replaced by the remedy.
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


def compile_queries(project_dir: Path, relations: Sequence[str]) -> dict[str, str]:
    """Map each relation to its SQL in the form of `Registry.queries`: compiled for RisingWave in a fixed environment.

    Needs no running engine. Raises DbtError if the project does not parse or a model does not compile.
    """
    if not relations:
        return {}
    nowhere = EngineConfiguration("127.0.0.1", 1, "any", "any", schema="any", kind="risingwave")
    with tempfile.TemporaryDirectory() as target:
        # The spread shifts a key's day; code that evaluates the SQL for other days applies it itself.
        dbt = Dbt(nowhere, project_dir, Path(target), {"PREFS_EXPIRY_SPREAD_SECONDS": "0"})
        compiled = dbt.compiled(relations)
    return {relation: text.replace('"any"."any".', "") for relation, text in sorted(compiled.items())}
