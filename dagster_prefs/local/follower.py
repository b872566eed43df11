"""The followers as children of the supervisor, with the settings that `prefs up` passes on; restarted when they end.

Settings may hold secrets, so they travel over a socket in the data folder, which only its owner may open, into the
environment of the process. They are written to no file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dagster_prefs.files import keep_log_small, open_private_log
from dagster_prefs.local.state import LocalServicesError, folder_error
from dagster_prefs.pauses import Pauses

log = logging.getLogger("dagster_prefs.local")

SOCKET = "follower.sock"
# The variable that tells followers apart, and the key with which one is ended; it is the name of no variable.
ENVIRONMENT = "PREFS_ENVIRONMENT"
STOP = "=stop"
STOP_SECONDS = 20.0
# A process that ends this soon has a problem that an immediate restart does not solve.
SHORT_SECONDS = 10.0
PAUSE_SECONDS = (1.0, 30.0)
REQUEST_BYTES = 4_000_000


class FollowerControl:
    """Runs a follower for each environment of the supervisor's data folder, with the most recent settings of each."""

    def __init__(self, data_dir: Path, command: list[str] | None = None) -> None:
        self._data_dir = data_dir
        self._command = command or [sys.executable, "-m", "dagster_prefs", "follow"]
        self._lock = threading.Lock()
        # By the value of PREFS_ENVIRONMENT, empty without one.
        self._followers: dict[str, _Follower] = {}
        self._listener = listen(data_dir)
        self._thread = threading.Thread(target=self._accept, name="follower", daemon=True)
        self._thread.start()

    def watch(self) -> None:
        """Restart followers that have ended. The supervisor calls this periodically."""
        with self._lock:
            for follower in self._followers.values():
                follower.watch()

    def close(self) -> None:
        """End the followers and stop listening."""
        with suppress(OSError):
            self._listener.close()
        (self._data_dir / SOCKET).unlink(missing_ok=True)
        with self._lock:
            for follower in self._followers.values():
                follower.end()
            self._followers.clear()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError, ValueError):
                connection.settimeout(5)
                self._take(json.loads(_read(connection)))
                connection.sendall(b"ok\n")

    def _take(self, told: dict[str, Any]) -> None:
        with self._lock:
            if STOP in told:
                if (found := self._followers.pop(told[STOP], None)) is not None:
                    found.end()
                return
            name = told.get(ENVIRONMENT, "")
            if name not in self._followers:
                self._followers[name] = _Follower(self._data_dir, name, self._command)
            self._followers[name].take(told)


class _Follower:
    """The process that follows one environment, and what restarts it."""

    def __init__(self, data_dir: Path, name: str, command: list[str]) -> None:
        self._data_dir = data_dir
        self._name = f"follower of {name}" if name else "follower"
        self._log = data_dir / "logs" / (f"follower-{name}.log" if name else "follower.log")
        self._command = command
        self._environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pauses = Pauses(*PAUSE_SECONDS)
        self._again_at = 0.0

    def take(self, environment: dict[str, str]) -> None:
        """Run with this environment; a process that has another one is replaced."""
        if environment != self._environment:
            self._environment = environment
            self.end()
            self._start()

    def watch(self) -> None:
        """Restart the process if it has ended."""
        if self._process is not None and self._process.poll() is None:
            with suppress(OSError):
                keep_log_small(self._log)
            return
        now = time.monotonic()
        if self._process is not None:
            if now - self._started >= SHORT_SECONDS:
                self._pauses.reset()
            pause = self._pauses.next()
            log.warning(
                "the %s ended (exit code %s); it is started again in %g s",
                self._name,
                self._process.returncode,
                pause,
            )
            self._process, self._again_at = None, now + pause
        if now >= self._again_at:
            self._start()

    def end(self) -> None:
        """End the process."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def _start(self) -> None:
        with open_private_log(self._log) as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._data_dir,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._started = time.monotonic()
        log.info("the %s runs (pid %d)", self._name, self._process.pid)


def hand_over(data_dir: Path, environment: Mapping[str, str]) -> None:
    """Make the supervisor of a data folder run a follower with these variables, instead of one of the same environment.

    Raises LocalServicesError if no supervisor answers.
    """
    _tell(data_dir, environment)


def stop_following(data_dir: Path, name: str) -> None:
    """End the follower of one environment, if the supervisor of a data folder runs one.

    Raises LocalServicesError if no supervisor answers.
    """
    _tell(data_dir, {STOP: name})


def _tell(data_dir: Path, told: Mapping[str, str]) -> None:
    with _near(data_dir) as address, socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.settimeout(STOP_SECONDS + 5)
            connection.connect(address)
            connection.sendall(json.dumps(dict(told)).encode())
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(16)
        except OSError as error:
            raise LocalServicesError(
                f"the supervisor of {data_dir} did not accept the follower's settings ({error.strerror or error}): run "
                "`prefs down`, then `prefs up`"
            ) from None
    if answer != b"ok\n":
        raise LocalServicesError(
            f"the follower of {data_dir} could not be started: see {data_dir / 'logs' / 'services.log'}"
        )


def listen(data_dir: Path) -> socket.socket:
    """Open the socket that receives settings; only its owner may open it. Raises LocalServicesError."""
    listener = socket.socket(socket.AF_UNIX)
    (data_dir / SOCKET).unlink(missing_ok=True)
    try:
        with _near(data_dir) as address:
            listener.bind(address)
        os.chmod(data_dir / SOCKET, 0o600)
        listener.listen(4)
    except OSError as error:
        listener.close()
        raise folder_error(data_dir, error) from None
    return listener


@contextmanager
def _near(data_dir: Path) -> Iterator[str]:
    """Yield a short address of the socket, because a socket's path is limited to 107 bytes."""
    folder = os.open(data_dir, os.O_RDONLY)
    try:
        short = Path(f"/proc/self/fd/{folder}")
        yield str((short if short.exists() else data_dir) / SOCKET)
    finally:
        os.close(folder)


def _read(connection: socket.socket) -> bytes:
    content = b""
    while len(content) < REQUEST_BYTES and (part := connection.recv(65536)):
        content += part
    return content
