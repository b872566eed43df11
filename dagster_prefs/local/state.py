"""The state of the embedded services that processes share: files, processes, ports."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from dagster_prefs.errors import PrefsError
from dagster_prefs.files import write_private

LOOPBACK = "127.0.0.1"


class LocalServicesError(PrefsError):
    """The embedded services cannot be started, stopped or inspected."""


@dataclass(frozen=True)
class State:
    """Content of `services.json`, written by the supervisor and read by all other processes.

    `cluster` is the folder that holds the database, which under root may lie outside the data folder.
    `started_at` is in seconds since 1970 UTC.
    """

    phase: Literal["starting", "ready"]
    supervisor_pid: int
    postgres_port: int
    aws_port: int
    with_aws: bool
    postgres_pid: int | None = None
    cluster: str = ""
    started_at: float = field(default_factory=time.time)

    @staticmethod
    def path(data_dir: Path) -> Path:
        """Return the path of the state file of this data folder."""
        return data_dir / "services.json"

    @classmethod
    def read(cls, data_dir: Path) -> State | None:
        """Return the last state written, None if there is none or it is unreadable."""
        try:
            return cls(**json.loads(cls.path(data_dir).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None
        except OSError as error:
            raise folder_error(data_dir, error) from None

    def write(self, data_dir: Path) -> None:
        """Replace the state file atomically, so that readers never see half of it."""
        write_private(self.path(data_dir), json.dumps(asdict(self), indent=1))

    def supervisor(self, data_dir: Path) -> psutil.Process | None:
        """Return the live supervisor of this folder; None if it ended or its pid was reused."""
        return find_process(
            self.supervisor_pid,
            lambda process: is_supervisor(process.cmdline(), data_dir),
        )


def is_supervisor(command: list[str], data_dir: Path) -> bool:
    """Return whether a command line is that of the supervisor of this data folder."""
    return "dagster_prefs.local.supervisor" in command and str(data_dir) in command


def find_process(pid: int, is_it: Callable[[psutil.Process], bool]) -> psutil.Process | None:
    """Return the live process with this pid if `is_it` recognises it.

    A pid alone is no proof, because it may have been given to another program. A zombie counts as ended,
    because in a container no process may ever reap it.
    """
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE and is_it(process):
            return process
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        pass
    return None


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds. Returns False if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def ended(process: psutil.Process) -> bool:
    """Return whether the process has ended or is a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def answers(port: int) -> bool:
    """Return whether a process accepts connections on this loopback port."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=0.5):
            return True
    except OSError:
        return False


def require_free_port(port: int, setting: str) -> None:
    """Raise LocalServicesError, naming port, setting and the program that has the port, if it is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do, so that an earlier server's connections that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
            return
        except PermissionError:
            raise LocalServicesError(
                f"port {port} ({setting}) needs privileges this user lacks: set {setting} above 1023"
            ) from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise LocalServicesError(
                    f"port {port} ({setting}) cannot be opened on {LOOPBACK}: {error.strerror}"
                ) from None
    raise LocalServicesError(
        f"port {port} ({setting}) is used by {_listener(port)}: stop it or set {setting} to a free port"
    )


def _listener(port: int) -> str:
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        connections = []
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        if listens and connection.pid is not None:
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.Error:
                return f"pid {connection.pid}"
    return "another program"


def folder_error(folder: Path, error: OSError) -> LocalServicesError:
    """Translate an operating system error about a data folder into one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LocalServicesError(
            f"no space left on the disk of {folder}: free some, or set PREFS_DATA_DIR to another disk"
        )
    return LocalServicesError(
        f"the data folder {folder} cannot be used ({error.strerror or error}): "
        "make it writable or set PREFS_DATA_DIR to another folder"
    )


def last_line(log: Path, offset: int, markers: Iterable[str]) -> str:
    """Return the last line after `offset` bytes that contains one of the markers, else the last line."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    wanted = [line for line in lines if any(marker in line for marker in markers)]
    return (wanted or lines or ["no output"])[-1].strip()
