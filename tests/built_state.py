"""State that one process of a test run builds and every other copies: a cluster with the dbt project deployed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock, Timeout
from psycopg import sql

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.local.services import LocalServices

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
SESSION_FOLDER = pytest.StashKey[Path]()
TEMPLATE = "deployed_template"


_PREFIX = "prefs-tests-"
_MEMORY = Path("/dev/shm")
# Several times what a run's tests leave until its end: 250 MB those in tests/dbt, 600 MB those of events and serving.
_ROOM_BYTES = 8 << 30
_held: list[FileLock] = []

# Below the ports that Linux gives to outgoing connections, one of which might take a port between its choice and its
# use; from a place of this process's own, so that processes and runs beside each other do not choose the same.
_PORTS = range(10_000, 32_768)
_ports = itertools.cycle(random.sample(_PORTS, len(_PORTS)))


def free_port() -> int:
    """A loopback port that nobody listens on, and another one at each call."""
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class BuiltState:
    """A data folder whose server is stopped: `TEMPLATE` in it holds every relation and no event.

    `dbt_target` is what dbt keeps of a parsed project, `views` the materialized views in order of refresh.
    """

    data_dir: Path
    dbt_target: Path
    views: tuple[str, ...]

    def copy_to(self, data_dir: Path) -> None:
        """Put a copy of the cluster into a data folder that does not have one."""
        data_dir.mkdir(parents=True, exist_ok=True)
        # Owner and modes stay: as root the server runs as another user, who has to find them so.
        for part in ("postgres", "pgpass"):
            subprocess.run(["cp", "-a", self.data_dir / part, data_dir / part], check=True)


def once(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name`, which `build` fills: in one process of the run, while the others wait for it."""
    made = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not made.exists():
            unfinished = folder / f"{name}.new"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(mode=0o755)
            build(unfinished)
            unfinished.rename(made)
    return made


def built_state(folder: Path) -> BuiltState:
    """The state of this run of the suite, built by whoever comes first."""

    def build(made: Path) -> None:
        # A folder that the server's user can enter keeps the cluster inside, where it is copied from.
        (made / "data").mkdir(mode=0o755)
        services = LocalServices(made / "data", free_port(), free_port(), with_aws=False, disposable=True)
        services.up(owner_pid=os.getpid())
        try:
            server = EngineConfiguration(
                "127.0.0.1", services.postgres_port, "postgres", "prefs", passfile=str(services.passfile)
            )
            with server.connect() as connection:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(TEMPLATE)))
            engine = server.with_database(TEMPLATE)
            results = Dbt(engine, PROJECT, made / "dbt").run("run")
            failed = [f"{result.name}: {result.message}" for result in results if not result.ok]
            assert results
            assert failed == []
            with engine.connect() as connection:
                views = {
                    row[0]
                    for row in connection.execute(
                        r"select left(viewname, -7) from pg_views where viewname like '%\_\_query'"
                    )
                }
            order = [result.name for result in results if result.name in views]
            (made / "views.json").write_text(json.dumps(order))
        finally:
            services.down()

    made = once(folder, "state", build)
    return BuiltState(made / "data", made / "dbt", tuple(json.loads((made / "views.json").read_text())))


def command_environment(engine: EngineConfiguration, data_dir: Path, aws_endpoint: str) -> dict[str, str]:
    """What a command has to be told to work on a database of this run."""
    return {
        **os.environ,
        "PREFS_ENGINE_PORT": str(engine.port),
        "PREFS_ENGINE_USER": engine.user,
        "PREFS_ENGINE_DATABASE": engine.database,
        "PREFS_DATA_DIR": str(data_dir),
        "AWS_ENDPOINT_URL": aws_endpoint,
    }


def make_session_folder() -> Path:
    """A new folder for what the processes of a run share, in memory where there is room.

    It does not lie below pytest's own, which the user that PostgreSQL runs as under root cannot enter. In memory
    everything temporary lies in it, pytest's own included, and goes with it: a run makes and deletes some 100,000
    files, and a disk may take milliseconds to delete each. Who wants to look at what a test left sets TMPDIR.
    """
    if "TMPDIR" in os.environ or not _has_room(_MEMORY):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        folder.chmod(0o755)
        return folder
    # One run after the other, so that none takes a folder that is not locked yet for an abandoned one.
    with FileLock(_MEMORY / f".{_PREFIX}{os.geteuid()}.lock"):
        _remove_abandoned(_MEMORY)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_MEMORY))
        # Held as long as this process lives, however it ends.
        _held.append(FileLock(folder / "run.lock"))
        _held[-1].acquire()
    folder.chmod(0o755)
    temporary = folder / "tmp"
    temporary.mkdir()
    # As any folder for temporary files, for every user.
    temporary.chmod(0o1777)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    return folder


def _has_room(folder: Path) -> bool:
    """Whether a folder in memory can take a run's files, and programs that are started there."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    free = min(found.f_bavail * found.f_frsize, psutil.virtual_memory().available)
    return free > _ROOM_BYTES and not found.f_flag & os.ST_NOEXEC and os.access(folder, os.W_OK)


def _remove_abandoned(folder: Path) -> None:
    """Remove what runs that were killed left, which would keep the memory until the machine restarts."""
    for lock in folder.glob(f"{_PREFIX}*/run.lock"):
        with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
            shutil.rmtree(lock.parent, ignore_errors=True)
