"""The embedded services of one data folder: the engine (PostgreSQL) and the local AWS server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import filelock
import psutil

import dagster_prefs
from dagster_prefs.files import LOG_LIMIT_BYTES, make_private_folder, open_private_log
from dagster_prefs.local.follower import hand_over, stop_following
from dagster_prefs.local.postgres import Cluster, passfile_of
from dagster_prefs.local.state import (
    LOOPBACK,
    LocalServicesError,
    State,
    answers,
    ended,
    folder_error,
    require_free_port,
    wait_until,
)
from dagster_prefs.logs import LOG_FORMAT

START_SECONDS = 320
STOP_SECONDS = 60

# Kept so that a supervisor that ends is reaped and does not stay a zombie while its starter lives.
_started: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Service:
    """One embedded service. `address` is host:port or a URL; `detail` gives the reason if it does not run."""

    name: str
    running: bool
    address: str
    pid: int | None
    detail: str = ""


@dataclass(frozen=True)
class ServiceStatus:
    """All embedded services of a data folder; `started` tells whether this call started them."""

    services: tuple[Service, ...]
    started: bool = False

    @property
    def running(self) -> bool:
        """Whether every service runs."""
        return all(service.running for service in self.services)


class LocalServices:
    """Starts, stops and inspects the services that share `data_dir`.

    One detached supervisor process per folder runs them, so that commands, the UI and tests share them and
    none of these stops them by ending. Ports are on loopback only. With `disposable` the server never waits
    for the disk and the local AWS server may be emptied, for disposable state such as a test's.
    """

    def __init__(
        self,
        data_dir: Path,
        postgres_port: int,
        aws_port: int,
        *,
        user: str = "prefs",
        database: str = "prefs",
        with_aws: bool = True,
        disposable: bool = False,
    ) -> None:
        # One spelling per folder, because the supervisor is recognised by it.
        self.data_dir = data_dir.expanduser().resolve()
        self.postgres_port = postgres_port
        self.aws_port = aws_port
        self.user = user
        self.database = database
        self.with_aws = with_aws
        self.disposable = disposable

    @property
    def log(self) -> Path:
        """The supervisor's log file; PostgreSQL's own log is in the same folder."""
        return self.data_dir / "logs" / "services.log"

    @property
    def passfile(self) -> Path:
        """libpq's password file for the engine."""
        return passfile_of(self.data_dir)

    def up(
        self, owner_pid: int | None = None, progress: Callable[[str], None] | None = None
    ) -> ServiceStatus:
        """Start the services that do not run yet and wait until they are ready; quick if all run.

        With `owner_pid` the services stop by themselves once that process has ended, in whatever way.
        `progress` is called with each step as a short text.

        Raises LocalServicesError if a port is taken, the folder cannot be used, the disk is full, another
        version created the database, or the services already run with other settings.
        """
        tell = progress or (lambda step: None)
        self._make_folders()
        with self._exclusive():
            running = self._running()
            if running is not None:
                self._require_same(running[0])
                if self._is_ready():
                    tell("the embedded services already run")
                    return self.status()
                tell("the embedded services are incomplete: restarting them")
                self._stop()
            if self.with_aws and self.aws_port == self.postgres_port:
                raise LocalServicesError(
                    f"PREFS_ENGINE_PORT and PREFS_LOCAL_AWS_PORT are both {self.aws_port}: "
                    "set one to another port"
                )
            # A server without its supervisor still holds the port that is needed here.
            Cluster(self.data_dir).stop_survivor()
            require_free_port(self.postgres_port, "PREFS_ENGINE_PORT")
            if self.with_aws:
                require_free_port(self.aws_port, "PREFS_LOCAL_AWS_PORT")
            self._start(owner_pid, tell)
            return replace(self.status(), started=True)

    def follow(self, environment: Mapping[str, str]) -> None:
        """Make the running services keep the engine's views current, by a `prefs follow` with this environment.

        Does nothing if a follower with the same variables runs; one with others of the same PREFS_ENVIRONMENT is
        replaced. Raises LocalServicesError.
        """
        hand_over(self.data_dir, environment)

    def unfollow(self, environment: str) -> None:
        """End the follower of an environment, if these services run one. Raises LocalServicesError."""
        if self.data_dir.is_dir() and self._running() is not None:
            stop_following(self.data_dir, environment)

    def down(self) -> bool:
        """Stop all services cleanly. Returns True if any ran. The data stays.

        Raises LocalServicesError if the services belong to another user.
        """
        if not self.data_dir.is_dir():
            return False
        with self._exclusive():
            return self._stop()

    def status(self) -> ServiceStatus:
        """Return the services' state; reads only, within about a second.

        If services run on other ports than those of the settings, the status shows their actual ports.
        """
        state = State.read(self.data_dir)
        supervisor = state.supervisor(self.data_dir) if state else None
        detail = "not started"
        if state is not None:
            if supervisor is None:
                detail = f"ended unexpectedly: see {self.log}"
            elif state.phase == "starting":
                detail = "starting"
            else:
                detail = f"does not answer: see {self.log}"
        alive = supervisor is not None and state is not None and state.phase == "ready"
        postgres_port = state.postgres_port if state else self.postgres_port
        aws_port = state.aws_port if state else self.aws_port

        def service(name: str, port: int, address: str, pid: int | None) -> Service:
            if alive and answers(port):
                return Service(name, True, address, pid)
            return Service(name, False, address, None, detail)

        found = [
            service(
                "postgres",
                postgres_port,
                f"{LOOPBACK}:{postgres_port}",
                state.postgres_pid if state else None,
            )
        ]
        if state.with_aws if state and alive else self.with_aws:
            found.append(
                service(
                    "aws", aws_port, f"http://{LOOPBACK}:{aws_port}", supervisor.pid if supervisor else None
                )
            )
        return ServiceStatus(tuple(found))

    def delete_state(self) -> None:
        """Delete the database and all other state of these services; other files stay.

        Raises LocalServicesError while the services run.
        """
        if not self.data_dir.is_dir():
            return
        with self._exclusive():
            cluster = Cluster(self.data_dir)
            if self._running() is not None or cluster.survivor() is not None:
                raise LocalServicesError(
                    f"the embedded services of {self.data_dir} run: stop them with `prefs down` first"
                )
            cluster.delete()
            try:
                State.path(self.data_dir).unlink(missing_ok=True)
                (self.data_dir / "supervisor.lock").unlink(missing_ok=True)
                for log in (self.log, cluster.log):
                    log.unlink(missing_ok=True)
                    log.with_suffix(".log.1").unlink(missing_ok=True)
                if self.log.parent.is_dir() and not any(self.log.parent.iterdir()):
                    self.log.parent.rmdir()
            except OSError as error:
                raise folder_error(self.data_dir, error) from None

    def _make_folders(self) -> None:
        try:
            make_private_folder(self.data_dir)
            make_private_folder(self.log.parent)
            for log in (self.log, self.log.with_name("postgres.log")):
                if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
                    log.replace(log.with_suffix(".log.1"))
        except OSError as error:
            raise folder_error(self.data_dir, error) from None

    def _exclusive(self) -> filelock.BaseFileLock:
        lock = filelock.FileLock(self.data_dir / "services.lock", timeout=START_SECONDS, mode=0o600)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise LocalServicesError(
                f"another process has been starting or stopping the services of {self.data_dir} for "
                f"{START_SECONDS} s: end it, then run `prefs up` again"
            ) from None
        except OSError as error:
            raise folder_error(self.data_dir, error) from None
        return lock

    def _running(self) -> tuple[State, psutil.Process] | None:
        state = State.read(self.data_dir)
        supervisor = state.supervisor(self.data_dir) if state else None
        return (state, supervisor) if state and supervisor else None

    def _is_ready(self) -> bool:
        """Wait for a start in progress (its starter may have been killed), then check the services."""

        def decided() -> bool:
            running = self._running()
            return running is None or running[0].phase == "ready"

        wait_until(decided, START_SECONDS)
        return self.status().running

    def _require_same(self, state: State) -> None:
        wanted = [("PREFS_ENGINE_PORT", self.postgres_port, state.postgres_port)]
        if self.with_aws and state.with_aws:
            wanted.append(("PREFS_LOCAL_AWS_PORT", self.aws_port, state.aws_port))
        for setting, ours, theirs in wanted:
            if ours != theirs:
                raise LocalServicesError(
                    f"the embedded services of {self.data_dir} already run with {setting}={theirs}, "
                    f"not {ours}: run `prefs down` first, or set {setting}={theirs}"
                )
        if self.with_aws and not state.with_aws:
            raise LocalServicesError(
                f"the embedded services of {self.data_dir} run without the local AWS server, because "
                "AWS_ENDPOINT_URL was set when they started: run `prefs down`, then `prefs up`"
            )

    def _start(self, owner_pid: int | None, tell: Callable[[str], None]) -> None:
        read_end, write_end = os.pipe()
        command = [
            sys.executable, "-m", "dagster_prefs.local.supervisor", "--data-dir", str(self.data_dir),
            "--postgres-port", str(self.postgres_port), "--aws-port", str(self.aws_port),
            "--user", self.user, "--database", self.database, "--report", str(write_end),
            "--with-aws" if self.with_aws else "--no-with-aws",
        ]  # fmt: skip
        if self.disposable:
            command.append("--disposable")
        if owner_pid is not None:
            command += ["--owner-pid", str(owner_pid)]
        try:
            with open_private_log(self.log) as log:
                supervisor = subprocess.Popen(
                    command,
                    cwd=self.data_dir,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write_end,),
                    start_new_session=True,
                )
        except OSError as error:
            os.close(read_end)
            if error.filename == sys.executable:
                raise LocalServicesError(
                    f"{sys.executable} cannot be started ({error.strerror}): create the environment again "
                    "with a Python that this user may run"
                ) from None
            raise folder_error(self.data_dir, error) from None
        finally:
            os.close(write_end)
        _started.append(supervisor)
        try:
            with os.fdopen(read_end, "rb") as report:
                self._follow(report, tell)
        except BaseException:
            # Interrupted or failed: stop whatever was started.
            supervisor.terminate()
            try:
                supervisor.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.wait()
            raise

    def _follow(self, report: BinaryIO, tell: Callable[[str], None]) -> None:
        for line in report:
            message = json.loads(line)
            if "error" in message:
                raise LocalServicesError(message["error"])
            if "ready" in message:
                return
            tell(message["progress"])
        raise LocalServicesError(f"the embedded services ended while starting: see {self.log}")

    @staticmethod
    def _environment() -> dict[str, str]:
        """Return the supervisor's environment, without variables that point to real AWS or to Docker."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name == LOG_FORMAT
            or not name.startswith(("AWS_", "MOTO_", "DOCKER_", "PG", "PREFS_", "PYTEST_", "COV_"))
        }
        package_root = str(Path(dagster_prefs.__file__).parents[1])
        path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(path),
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _stop(self) -> bool:
        stopped = False
        running = self._running()
        if running is not None:
            supervisor = running[1]
            try:
                supervisor.terminate()
                if not wait_until(lambda: ended(supervisor), STOP_SECONDS):
                    supervisor.kill()
                    wait_until(lambda: ended(supervisor), STOP_SECONDS)
                stopped = True
            except psutil.NoSuchProcess:
                pass
            except psutil.AccessDenied:
                raise LocalServicesError(
                    f"the embedded services of {self.data_dir} (pid {supervisor.pid}) belong to user "
                    f"{supervisor.username()}: stop them as that user"
                ) from None
        for process in list(_started):
            if process.poll() is not None:
                _started.remove(process)
        stopped = Cluster(self.data_dir).stop_survivor() or stopped
        try:
            State.path(self.data_dir).unlink(missing_ok=True)
        except OSError as error:
            raise folder_error(self.data_dir, error) from None
        return stopped
