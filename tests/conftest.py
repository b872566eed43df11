"""Fixtures of the whole suite: the embedded services, one database per test, an empty AWS server.

The suite never sees the developer's settings, credentials or state: whatever the shell had is
taken out of the environment before any module of ours is imported.
"""

from __future__ import annotations

import os
import socket
import tempfile
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg import sql

SHELL_ENVIRONMENT: Mapping[str, str] = dict(os.environ)
"""The environment as the developer's shell had it, for tests of real servers."""

_FOREIGN = ("PREFS_", "AWS_", "PG", "DBT_", "DAGSTER_", "MOTO_", "BOTO_")
# Tests that reach a real RisingWave decide by this one, while they are collected, whether to run.
_KEPT = {"PREFS_RISINGWAVE_URL", "PREFS_BENCH_SCALE"}

for _name in list(os.environ):
    if _name.startswith(_FOREIGN) and _name not in _KEPT:
        del os.environ[_name]
os.environ.update(
    # A forgotten argument must end in an error, not in ~/.aws or the project's own state.
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_EC2_METADATA_DISABLED="true",
    PREFS_ENV_FILE=os.devnull,
    DBT_SEND_ANONYMOUS_USAGE_STATS="false",
    DAGSTER_DISABLE_TELEMETRY="yes",
)

from dagster_prefs.engine.connection import EngineConnection  # noqa: E402 (after the environment is clean)
from dagster_prefs.local.services import LocalServices  # noqa: E402


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that returns a loopback port nobody listens on."""
    return _free_port


@pytest.fixture(scope="session")
def shell_environment() -> Mapping[str, str]:
    """The environment as the developer's shell had it (PREFS_KAFKA_BOOTSTRAP, AWS_ENDPOINT_URL, …)."""
    return SHELL_ENVIRONMENT


@pytest.fixture(autouse=True, scope="session")
def _no_developer_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFS_DATA_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def services() -> Iterator[LocalServices]:
    """The embedded services on free ports, shared by the whole session.

    They stop with this process, even when it is killed. Take `engine` or `aws_endpoint` for an
    empty database or AWS server; take this one for ports and folders only.
    """
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as folder:
        # Not below pytest's own folder, which is closed to the user that PostgreSQL runs as under root.
        Path(folder).chmod(0o755)
        local = LocalServices(Path(folder) / "data", _free_port(), _free_port(), test_hooks=True)
        local.up(owner_pid=os.getpid())
        with pytest.MonkeyPatch.context() as patch:
            # libpq's own default for whatever connects, the processes that tests start included.
            patch.setenv("PGPASSFILE", str(local.passfile))
            yield local
        local.down()
        local.delete_state()


@contextmanager
def _new_database(services: LocalServices, kind: str) -> Iterator[EngineConnection]:
    server = EngineConnection(
        host="127.0.0.1", port=services.postgres_port, database="postgres", user="prefs", kind="local"
    )
    name = f"{kind}_{uuid.uuid4().hex}"
    with server.connect() as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    yield server.with_database(name)
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def engine(services: LocalServices) -> Iterator[EngineConnection]:
    """A fresh, empty database of the embedded engine, dropped afterwards with all its sessions."""
    with _new_database(services, "test") as found:
        yield found


@pytest.fixture(scope="session")
def database(services: LocalServices) -> Iterator[EngineConnection]:
    """One database for all tests that make a schema of their own in it, which is far quicker than a database."""
    with _new_database(services, "shared") as found:
        yield found


@pytest.fixture(scope="session")
def dynamodb_endpoint(services: LocalServices) -> str:
    """The local AWS server, whatever it holds; tables are told apart by prefix."""
    return f"http://127.0.0.1:{services.aws_port}"


@pytest.fixture
def aws_endpoint(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of the local AWS server, empty, with credentials and region in the environment."""
    endpoint = f"http://127.0.0.1:{services.aws_port}"
    reset = urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")
    with urllib.request.urlopen(reset, timeout=30) as answer:
        assert answer.status == 200
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)
    return endpoint
