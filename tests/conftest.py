"""Fixtures of the whole suite: the embedded services, one database per test, an empty AWS server.

The suite never sees the developer's settings, credentials or state: whatever the shell had is
taken out of the environment before any module of ours is imported.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

# Looking for garbage after every 700 objects takes a fourth of the time of importing Dagster and dbt.
gc.set_threshold(20_000, 10, 10)

SHELL_ENVIRONMENT: Mapping[str, str] = dict(os.environ)
"""The environment as the developer's shell had it, for tests of real servers."""

_FOREIGN = ("PREFS_", "AWS_", "PG", "DBT_", "DAGSTER_", "MOTO_", "BOTO_", "OPENLINEAGE_")
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
    # Some tests start programs in other folders.
    PREFS_PROJECT_DIR=str(Path(__file__).resolve().parents[1] / "dbt_project"),
    DBT_SEND_ANONYMOUS_USAGE_STATS="false",
    DAGSTER_DISABLE_TELEMETRY="yes",
)

from built_state import (  # noqa: E402 (after the environment is clean)
    SESSION_FOLDER,
    TEMPLATE,
    BuiltState,
    built_state,
    free_port,
    make_session_folder,
)
from declared import COURSES, PROJECT  # noqa: E402
from longest import UNTIL, left_out, longest_first, out_of_time  # noqa: E402
from revisions import read_revisions_once  # noqa: E402
from unsynced import never_sync_sqlite  # noqa: E402
from warm import Warm  # noqa: E402

from dagster_prefs.declarations.registry import Registry, load_registry  # noqa: E402
from dagster_prefs.engine import dbt as engine_dbt  # noqa: E402
from dagster_prefs.engine.connection import EngineConfiguration  # noqa: E402
from dagster_prefs.events.messages import Topic, topics_of  # noqa: E402
from dagster_prefs.local.services import LocalServices  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, marked slow; the others in their order."""
    longest_first(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A run that has only so much time says which tests it leaves out."""
    if out_of_time(item.path, time.time()):
        pytest.skip(f"left out: the time that {UNTIL} gives this run is over")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` does not even read the long files, and only `make test-docs` those of the documentation."""
    return left_out(collection_path, config.option.markexpr, config.args) or None


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end, so nobody looks for garbage in it again."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """One folder for the whole run: the first process makes it and removes it, xdist's workers are told of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in a shell's background. Dagster gives SIGTERM the handler of SIGINT, and what is started afterwards would
        # ignore it too, so that it ends only by the SIGKILL after a time-out.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    told: dict[str, Any] | None = getattr(config, "workerinput", None)
    config.stash[SESSION_FOLDER] = Path(told["session_folder"]) if told else make_session_folder()
    if told or not config.getoption("numprocesses", None):
        # Not above: xdist's first process runs no test.
        from hypothesis import HealthCheck, settings

        # How busy this machine is decides no test. What hypothesis itself sets in CI is kept.
        settings.register_profile(
            "any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist's hook: tell a new worker where the run's folder is."""
    node.workerinput["session_folder"] = str(node.config.stash[SESSION_FOLDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the run's folder once every process of it has ended."""
    # At its end Python frees what can be freed, or libraries complain of a leak.
    gc.unfreeze()
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[SESSION_FOLDER], ignore_errors=True)


@pytest.fixture(scope="session", name="free_port")
def _free_port() -> Callable[[], int]:
    """A function that returns a loopback port nobody listens on."""
    return free_port


@pytest.fixture(scope="session")
def shell_environment() -> Mapping[str, str]:
    """The environment as the developer's shell had it (PREFS_KAFKA_BOOTSTRAP, AWS_ENDPOINT_URL, …)."""
    return SHELL_ENVIRONMENT


@pytest.fixture(scope="session")
def registry() -> Registry:
    """What the shipped example declares."""
    return load_registry(PROJECT)


@pytest.fixture(scope="session")
def courses() -> Registry:
    """What the foreign project declares: other topics, a text key, no shop and no viewers."""
    return load_registry(COURSES)


@pytest.fixture(scope="session")
def topics(registry: Registry) -> Mapping[str, Topic]:
    """The example's topics, as their messages are read."""
    return topics_of(registry)


@pytest.fixture(autouse=True, scope="session")
def _no_developer_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFS_DATA_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Nothing that SQLite of this process keeps outlives the run."""
    undo = never_sync_sqlite()
    yield
    undo()


@pytest.fixture(autouse=True, scope="session")
def _revisions_are_read_once() -> Iterator[None]:
    """Dagster's databases are made and opened many times in a process."""
    undo = read_revisions_once()
    yield
    undo()


@pytest.fixture(scope="session")
def session_folder(request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of this run share; every user can enter it."""
    return request.config.stash[SESSION_FOLDER]


@pytest.fixture(scope="session")
def warm(request: pytest.FixtureRequest, session_folder: Path) -> Warm:
    """Starts commands in processes that need not import anything, forks of one server of the whole run."""
    first = os.getppid() if hasattr(request.config, "workerinput") else os.getpid()
    return Warm(session_folder, first)


@pytest.fixture(autouse=True, scope="session")
def _warm_dbt(request: pytest.FixtureRequest) -> Iterator[None]:
    """What runs dbt in this process asks a fork that has imported it, and has parsed the macros.

    Only where tests start commands so: the server's own start costs more than a few runs of dbt.
    """
    if not any("warm" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        process = request.getfixturevalue("warm").dbt()
        patch.setattr(engine_dbt, "_SHARED", process)
        yield
        process.end()


@pytest.fixture(scope="session")
def deployed_state(session_folder: Path) -> BuiltState:
    """A stopped cluster with the dbt project deployed, built once a run; `copy_to` gives a test its own."""
    return built_state(session_folder)


@pytest.fixture(scope="session")
def services(request: pytest.FixtureRequest) -> Iterator[LocalServices]:
    """The embedded services on free ports, shared by the whole session.

    They stop with this process, even when it is killed. Take `engine` or `aws_endpoint` for an
    empty database or AWS server, `deployed_template` for the deployed project; take this one for ports
    and folders only. Nothing here outlives the run, so the server never waits for the disk.
    """
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as folder:
        # Not below pytest's own folder, which is closed to the user that PostgreSQL runs as under root.
        Path(folder).chmod(0o755)
        local = LocalServices(Path(folder) / "data", free_port(), free_port(), disposable=True)
        if any("deployed_state" in getattr(item, "fixturenames", ()) for item in request.session.items):
            request.getfixturevalue("deployed_state").copy_to(local.data_dir)
        local.up(owner_pid=os.getpid())
        with pytest.MonkeyPatch.context() as patch:
            # libpq's own default for whatever connects, the processes that tests start included.
            patch.setenv("PGPASSFILE", str(local.passfile))
            yield local
        local.down()
        local.delete_state()


@pytest.fixture(scope="session")
def embedded_server(services: LocalServices) -> EngineConfiguration:
    """The embedded engine's own database, from which others are made and dropped."""
    return EngineConfiguration("127.0.0.1", services.postgres_port, "postgres", "prefs")


@pytest.fixture(scope="session")
def deployed_template(
    deployed_state: BuiltState, embedded_server: EngineConfiguration
) -> EngineConfiguration:
    """The database in which `dbt run` has made every relation, empty of events: to be copied, never changed."""
    return embedded_server.with_database(TEMPLATE)


@pytest.fixture(scope="session")
def copied_database(embedded_server: EngineConfiguration) -> Callable[..., Any]:
    """`with copied_database(name, template, clock=None) as engine`: a copy, dropped afterwards with its sessions.

    With `clock` the copy's clock stands there.
    """

    @contextmanager
    def copied(
        name: str, template: EngineConfiguration, clock: datetime | None = None
    ) -> Iterator[EngineConfiguration]:
        with embedded_server.connect() as connection:
            _drop_database(connection, name)
            # Nothing waits for the disk here, so that files are copied several times faster than rows are logged.
            connection.execute(
                sql.SQL("create database {} template {} strategy file_copy").format(
                    sql.Identifier(name), sql.Identifier(template.database)
                )
            )
            if clock is not None:
                connection.execute(
                    sql.SQL("alter database {} set prefs.clock = {}").format(
                        sql.Identifier(name), sql.Literal(clock.isoformat())
                    )
                )
        yield embedded_server.with_database(name)
        with embedded_server.connect() as connection:
            _drop_database(connection, name)

    return copied


def _drop_database(connection: psycopg.Connection[Any], name: str) -> None:
    """Drop a database with its sessions, if it is there.

    `with (force)` would refuse while autovacuum works in it, since the platform's role is no superuser; a plain
    drop asks autovacuum to leave and waits.
    """
    if not connection.execute("select from pg_database where datname = %s", [name]).fetchall():
        return
    connection.execute(sql.SQL("alter database {} allow_connections false").format(sql.Identifier(name)))
    connection.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
        "where datname = %s and backend_type = 'client backend'",
        [name],
    )
    connection.execute(sql.SQL("drop database {}").format(sql.Identifier(name)))


@contextmanager
def _new_database(embedded_server: EngineConfiguration, kind: str) -> Iterator[EngineConfiguration]:
    name = f"{kind}_{uuid.uuid4().hex}"
    with embedded_server.connect() as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    yield embedded_server.with_database(name)
    with embedded_server.connect() as connection:
        _drop_database(connection, name)


@pytest.fixture
def engine(embedded_server: EngineConfiguration) -> Iterator[EngineConfiguration]:
    """A fresh, empty database of the embedded engine, dropped afterwards with all its sessions."""
    with _new_database(embedded_server, "test") as found:
        yield found


@pytest.fixture(scope="session")
def database(embedded_server: EngineConfiguration) -> Iterator[EngineConfiguration]:
    """One database for all tests that make a schema of their own in it, which is far quicker than a database."""
    with _new_database(embedded_server, "shared") as found:
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
