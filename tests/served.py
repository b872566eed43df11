"""The feature server in a thread, and requests to it over a real socket."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shipped import with_computed_attributes

from dagster_prefs.access import Entrance
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ShopClient
from dagster_prefs.serving.connections import ConnectionLimits
from dagster_prefs.serving.server import Load, make_app, make_server

REGION = "eu-central-1"
SERVED = with_computed_attributes()
NOWHERE = EngineConfiguration(host="127.0.0.1", port=1, database="none", user="none")


@dataclass
class Caller:
    """Requests to a running server."""

    port: int
    tls: ssl.SSLContext | None = None

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = (
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            if self.tls is None
            else http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)
        )
        try:
            sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, sent, headers or {})
            got = connection.getresponse()
            content = got.read().decode()
            found = {name.lower(): value for name, value in got.getheaders()}
            return got.status, json.loads(content) if "json" in found["content-type"] else content, found
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        return self.call("GET", path)[:2]

    def post(self, body: Any) -> tuple[int, Any]:
        return self.call("POST", "/v1/profiles", body)[:2]

    def ready(self) -> dict[str, Any]:
        """The readiness, once every part has had its first chance."""
        for _ in range(600):
            status, told = self.get("/readyz")
            if status == 200:
                return told  # type: ignore[no-any-return]
            threading.Event().wait(0.05)
        raise AssertionError(told)


@contextmanager
def running(
    profiles: AsyncProfileClient | None, preferences: ShopClient | None, **options: Any
) -> Iterator[Caller]:
    """The server in a thread of its own."""
    load = {name: options.pop(name) for name in ("budget_seconds", "max_in_flight") if name in options}
    limits = options.pop("limits", ConnectionLimits())
    entrance, tls = options.pop("entrance", Entrance()), options.pop("tls", None)
    served = [] if profiles is None else [profiles]
    app = make_app(served, preferences, load=Load(**{"budget_seconds": 30.0, **load}), **options)
    server = make_server(app, limits, entrance=entrance)
    server.config.port = 0
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield Caller(server.servers[0].sockets[0].getsockname()[1], tls)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def profile_client(
    endpoint: str, prefix: str = "", *, max_attempts: int = 4, **given: Any
) -> AsyncProfileClient:
    return AsyncProfileClient(
        SERVED,
        endpoint_url=endpoint,
        region=REGION,
        table_prefix=prefix,
        options=ClientOptions(30, read_timeout_seconds=30, max_attempts=max_attempts),
        **given,
    )
