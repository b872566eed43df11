"""The Dagster UI, for its own pages and this user's programs only: `python -m dagster_prefs.defs.webserver`.

Dagster checks neither the sender of a request nor the page it comes from, and accepts mutations over GET, so
any website that the owner of the machine visits could launch runs and start schedules. Options are those of
dagster-webserver.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs

import dagster_webserver.app
import dagster_webserver.cli
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware

from dagster_prefs.local.state import answers
from dagster_prefs.loopback import App, LoopbackGuard, Receive, Scope, Send, loopback_hosts, refuse
from dagster_prefs.settings import load_settings

log = logging.getLogger("dagster_prefs.webserver")
STOP_SECONDS = 30


class NoQueriesOverGet:
    """ASGI middleware that rejects GraphQL over GET: a foreign page's image can send it without Origin."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 405."""
        over_get = scope["type"] == "http" and scope["method"] == "GET" and scope["path"].endswith("/graphql")
        if not over_get or "query" not in parse_qs(scope["query_string"].decode("latin-1")):
            await self._app(scope, receive, send)
            return
        await refuse(send, 405, "send GraphQL queries with POST")


def main(arguments: Sequence[str]) -> None:
    """Serve the UI as dagster-webserver does, behind the guard."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-p", "--port", type=int, default=3000)
    port = parser.parse_known_args(arguments)[0].port
    settings = load_settings()
    guard = Middleware(
        LoopbackGuard,
        hosts=loopback_hosts(port) | frozenset(settings.ui_hosts),
        own_user_only=settings.local_users == "own",
        log=lambda reason: log.warning("the UI refused a request: %s", reason),
    )

    class GuardedWebserver(DagsterWebserver):  # type: ignore[type-arg]
        def build_middleware(self) -> list[Middleware]:
            return [guard, Middleware(NoQueriesOverGet), *super().build_middleware()]

    # dagster-webserver has no option for middleware, but its server class has a method to override.
    dagster_webserver.app.DagsterWebserver = GuardedWebserver  # type: ignore[attr-defined]
    sys.argv = ["dagster-webserver", *arguments]
    dagster_webserver.cli.main()  # type: ignore[no-untyped-call]


def serve_ui(
    workspace: Path, port: int, environment: Mapping[str, str], beside: Sequence[str] | None = None
) -> int:
    """Run the guarded UI on loopback and the daemon until one ends or a signal arrives.

    The command `beside` runs as long as they do. Returns the exit code. `dagster dev` would start its own webserver,
    without the guard.
    """
    options = ["-w", str(workspace)]
    webserver = [sys.executable, "-m", "dagster_prefs.defs.webserver", "-h", "127.0.0.1", "-p", str(port)]
    daemon = [str(Path(sys.executable).with_name("dagster-daemon")), "run"]
    stop = threading.Event()
    for order in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(order, lambda *_: stop.set())

    def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
        # In a session of its own, because a terminal's Ctrl-C would reach its code servers first.
        return subprocess.Popen(command, env=dict(environment), start_new_session=True)

    children = [start([*webserver, *options])]
    if beside is not None:
        children.append(start(beside))
    # Both create Dagster's tables if there are none. At the same moment, one of them would fail.
    while children[0].poll() is None and not answers(port) and not stop.wait(0.25):
        pass
    if children[0].poll() is None and not stop.is_set():
        children.append(start([*daemon, *options]))
    ended: list[int] = []
    while not ended and not stop.wait(0.25):
        ended = [child.returncode for child in children if child.poll() is not None]
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGINT)
    for child in children:
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return ended[0] if ended else 0


if __name__ == "__main__":
    main(sys.argv[1:])
