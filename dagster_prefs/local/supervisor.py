"""The one background process of a data folder: it starts, hosts, watches and stops the services.

`LocalServices.up` starts it as `python -m dagster_prefs.local.supervisor`. It reports on the pipe `--report`
in JSON lines ({"progress": …}, {"error": …}, {"ready": true}), and logs to its output.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import psutil

from dagster_prefs.errors import PrefsError
from dagster_prefs.local.aws import listen_aws, serve_aws
from dagster_prefs.local.follower import FollowerControl
from dagster_prefs.local.postgres import Cluster
from dagster_prefs.local.state import LocalServicesError, State, ended, folder_error
from dagster_prefs.logs import LOG_FORMAT, log_format, start_logging

log = logging.getLogger("dagster_prefs.local")
WATCH_SECONDS = 0.25


class Reporter:
    """Sends reports to the process that waits for the start, which may already have ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, **message: Any) -> None:
        """Send one message. Does nothing if no process listens."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, (json.dumps(message) + "\n").encode())

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._descriptor)


def supervise(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Run the services until a signal, the owner's end, or PostgreSQL's end. Returns the exit code."""
    data_dir: Path = arguments.data_dir
    stop = threading.Event()
    for order in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(order, lambda *_: stop.set())
    owner = None
    if arguments.owner_pid is not None:
        try:
            # A process object instead of the pid, which may be given to another program.
            owner = psutil.Process(arguments.owner_pid)
        except psutil.NoSuchProcess:
            raise LocalServicesError(
                f"the owner of the services (pid {arguments.owner_pid}) has ended"
            ) from None

    state = State(
        phase="starting",
        supervisor_pid=os.getpid(),
        postgres_port=arguments.postgres_port,
        aws_port=arguments.aws_port,
        with_aws=arguments.with_aws,
    )
    state.write(data_dir)
    cluster = Cluster(data_dir, durable=not arguments.disposable)
    server: subprocess.Popen[bytes] | None = None
    listener: socket.socket | None = None
    stop_aws: Callable[[], None] | None = None
    follower: FollowerControl | None = None
    background: list[subprocess.Popen[bytes]] = []
    crashed = False

    def progress(step: str) -> None:
        log.info(step)
        reporter.send(progress=step)

    try:
        new = not cluster.path.exists()
        server = cluster.start(arguments.postgres_port, arguments.user, arguments.database, progress)
        state = replace(state, postgres_pid=server.pid, cluster=str(cluster.path))
        state.write(data_dir)
        if arguments.with_aws:
            progress("starting the local AWS server")
            listener = listen_aws(arguments.aws_port)
        cluster.wait_ready(server)
        follower = FollowerControl(data_dir)
        state = replace(state, phase="ready")
        state.write(data_dir)
        log.info("ready: PostgreSQL on port %d", arguments.postgres_port)
        reporter.send(ready=True)
        reporter.close()
        if new and cluster.durable:
            background.append(cluster.sync())
        if listener is not None:
            stop_aws = serve_aws(listener, test_hooks=arguments.disposable)
        while not stop.wait(WATCH_SECONDS):
            background = [process for process in background if process.poll() is None]
            if server.poll() is not None:
                crashed = True
                log.error("PostgreSQL ended by itself (exit code %s): see %s", server.returncode, cluster.log)
                return 1
            follower.watch()
            if owner is not None and ended(owner):
                log.info("the owner (pid %d) has ended", owner.pid)
                break
    finally:
        if follower is not None:
            follower.close()
        if stop_aws is not None:
            stop_aws()
        if server is not None and server.poll() is None:
            cluster.stop(server)
        if not crashed:
            # If PostgreSQL ended by itself, the state file stays, so that the status can report it.
            State.path(data_dir).unlink(missing_ok=True)
        log.info("stopped")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the background process."""
    parser = argparse.ArgumentParser(prog="dagster_prefs.local.supervisor")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--postgres-port", type=int, required=True)
    parser.add_argument("--aws-port", type=int, required=True)
    parser.add_argument("--user", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--with-aws", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--disposable", action="store_true")
    parser.add_argument("--owner-pid", type=int)
    parser.add_argument("--report", type=int, required=True)
    arguments = parser.parse_args(argv)

    # moto keeps an item as hundreds of objects. With Python's defaults all of them are searched for garbage after every
    # thousand or so writes, and no request is answered during those seconds.
    gc.set_threshold(10_000, 50, 1000)
    # Logs, state and PostgreSQL's output contain events, so only this user may read them.
    os.umask(0o077)
    start_logging(log_format(os.environ.get(LOG_FORMAT)))
    reporter = Reporter(arguments.report)
    # Held until the process ends; the system releases it in every case.
    single = filelock.FileLock(arguments.data_dir / "supervisor.lock", timeout=0)
    try:
        with single:
            return supervise(arguments, reporter)
    except filelock.Timeout:
        reporter.send(
            error=f"the embedded services of {arguments.data_dir} are being started by someone else: "
            "run `prefs up` again in a moment"
        )
    except PrefsError as error:
        log.error("%s", error)
        reporter.send(error=str(error))
    except OSError as error:
        log.exception("the operating system refused")
        reporter.send(error=str(folder_error(arguments.data_dir, error)))
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
