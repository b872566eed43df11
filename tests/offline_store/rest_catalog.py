"""A REST catalog at the edge: the protocol over HTTP, kept by a SQLite catalog behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchNamespaceError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.table import CommitTableRequest

from dagster_prefs.iceberg.catalog import conflicts_named

STATUS = {
    NoSuchNamespaceError: 404,
    NoSuchTableError: 404,
    NamespaceAlreadyExistsError: 409,
    TableAlreadyExistsError: 409,
    CommitFailedException: 409,
}


@dataclass
class RestServer:
    """Where it listens, and what it was asked: (method, path, query, headers) in order."""

    uri: str
    asked: list[tuple[str, str, dict[str, list[str]], dict[str, str]]] = field(default_factory=list)


@contextmanager
def rest_server(catalog: Catalog, credential: str) -> Iterator[RestServer]:
    """Serve `catalog`; whoever does not show `credential` (`client:secret`) for a token is refused."""
    served = RestServer("")
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def _answer(self, status: int, content: Any = None) -> None:
            body = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _table(self, identifier: tuple[str, str]) -> dict[str, Any]:
            table = catalog.load_table(identifier)
            return {
                "metadata-location": table.metadata_location,
                "metadata": json.loads(table.metadata.model_dump_json()),
                "config": {},
            }

        def _handle(self) -> None:
            parsed = urlparse(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.asked.append((self.command, parsed.path, parse_qs(parsed.query), dict(self.headers)))
            if parsed.path == "/v1/oauth/tokens":
                form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
                if f"{form.get('client_id')}:{form.get('client_secret')}" != credential:
                    return self._answer(
                        401, {"error": "invalid_client", "error_description": "unknown client"}
                    )
                return self._answer(
                    200, {"access_token": "let-in", "token_type": "bearer", "expires_in": 3600}
                )
            if self.headers.get("Authorization") != "Bearer let-in":
                error = {"message": "no token", "type": "NotAuthorizedException", "code": 401}
                return self._answer(401, {"error": error})
            try:
                with one_at_a_time:
                    return self._answer(*self._route(parsed.path.removeprefix("/v1/"), body))
            except tuple(STATUS) as error:
                status = STATUS[type(error)]
                found = {"message": str(error), "type": type(error).__name__, "code": status}
                return self._answer(status, {"error": found})

        def _route(self, path: str, body: bytes) -> tuple[int, Any]:
            parts = [unquote(part) for part in path.split("/")]
            match (self.command, *parts):
                case ("GET", "config"):
                    return 200, {"defaults": {}, "overrides": {}}
                case ("GET", "namespaces"):
                    return 200, {"namespaces": [list(name) for name in catalog.list_namespaces()]}
                case ("POST", "namespaces"):
                    asked = json.loads(body)
                    catalog.create_namespace(tuple(asked["namespace"]))
                    return 200, {"namespace": asked["namespace"], "properties": {}}
                case ("GET" | "HEAD", "namespaces", name):
                    catalog.load_namespace_properties(name)
                    return (
                        (204, None)
                        if self.command == "HEAD"
                        else (200, {"namespace": [name], "properties": {}})
                    )
                case ("POST", "namespaces", namespace, "tables"):
                    from pyiceberg.catalog.rest import CreateTableRequest

                    asked_table = CreateTableRequest.model_validate({"location": None, **json.loads(body)})
                    identifier = (namespace, asked_table.name)
                    options: dict[str, Any] = {}
                    if asked_table.partition_spec is not None:
                        options["partition_spec"] = asked_table.partition_spec
                    if asked_table.write_order is not None:
                        options["sort_order"] = asked_table.write_order
                    catalog.create_table(
                        identifier,
                        asked_table.table_schema,
                        location=asked_table.location,
                        properties=asked_table.properties,
                        **options,
                    )
                    return 200, self._table(identifier)
                case ("GET" | "HEAD", "namespaces", namespace, "tables", name):
                    found = self._table((namespace, name))
                    return (204, None) if self.command == "HEAD" else (200, found)
                case ("POST", "namespaces", namespace, "tables", name):
                    commit = CommitTableRequest.model_validate_json(body)
                    table = catalog.load_table((namespace, name))
                    # Iceberg's own server tells who was overtaken by another branch to try again.
                    with conflicts_named():
                        catalog.commit_table(table, commit.requirements, commit.updates)
                    return 200, self._table((namespace, name))
            return 400, {"error": {"message": f"{self.command} {path}", "type": "BadRequest", "code": 400}}

        do_GET = do_POST = do_HEAD = _handle

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.uri = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
