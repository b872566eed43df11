"""The local AWS server: the moto services that the platform uses, for programs of this user only.

moto serves all of AWS to every client: a website could start a Batch job in the owner's Docker, or delete every profile
through `/moto-api/reset`. This server offers only the services that the platform and its Terraform module use.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from dagster_prefs.local.state import LOOPBACK, LocalServicesError
from dagster_prefs.loopback import foreign_request, is_stranger, loopback_hosts

log = logging.getLogger("dagster_prefs.local")

# moto's names of the services for the profiles, for the lake and its catalog, and for the other resources of
# the Terraform module.
SERVICES = frozenset(
    {
        "dynamodb",
        "s3",
        "s3control",
        "glue",
        "kms",
        "iam",
        "sts",
        "cloudwatch",
        "logs",
        "resourcegroupstaggingapi",
    }
)
# moto's own pages, which can reset everything. Only test suites enable them.
TEST_HOOKS = "moto_api"

# Items from this size in bytes are measured, because the limit of 400 KB could be exceeded.
MEASURED_BYTES = 390_000
# The types of DynamoDB's values that JSON has too.
PLAIN_TYPES = frozenset({"S", "N", "BOOL", "NULL"})

StartResponse = Callable[..., Any]
WsgiApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


def listen_aws(port: int) -> socket.socket:
    """Open the port of the local AWS server. Connections queue in it until `serve_aws` accepts them."""
    if importlib.util.find_spec("flask") is None or importlib.util.find_spec("moto") is None:
        raise LocalServicesError(
            "the local AWS server is not installed: install dagster-prefs[platform], or set AWS_ENDPOINT_URL"
        )
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as error:
        listener.close()
        raise LocalServicesError(
            f"port {port} (PREFS_LOCAL_AWS_PORT) cannot be opened ({error.strerror}): "
            "set PREFS_LOCAL_AWS_PORT to a free port"
        ) from None
    listener.listen(128)
    return listener


def serve_aws(listener: socket.socket, *, test_hooks: bool = False) -> Callable[[], None]:
    """Serve the local AWS server from a thread of this process. Returns a function that stops it.

    `test_hooks` also serves moto's own pages, which test suites need to empty the server.
    """
    # Imported here, because the import takes more than a second, which most callers need not wait for.
    from moto import settings
    from moto.core.parse import PROTOCOL_PARSERS, JSONParser
    from moto.core.serialize import SERVICE_SPECIFIC_SERIALIZERS, JSONSerializer
    from moto.dynamodb.models import table as dynamodb_table
    from moto.dynamodb.models.dynamo_type import DynamoType, Item

    # moto's server module copies this setting when it is imported. Without it, every answer allows every website to
    # read it.
    settings.DISABLE_GLOBAL_CORS = True
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import ThreadedWSGIServer

    class OwnUserServer(ThreadedWSGIServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            if is_stranger(client_address, listener.getsockname()):
                log.warning("the local AWS server refused a connection of another user of this machine")
                return False
            return True

    class ItemSerializer(JSONSerializer):
        """Serializes DynamoDB's answers, whose values have the API's own names.

        moto looks up each of the ten types of a value under half a dozen spellings, which is most of its work.
        """

        def _serialize_type_structure(self, serialized: Any, value: Any, shape: Any, key: str) -> None:
            if shape.name != "AttributeValue" or not isinstance(value, dict):
                super()._serialize_type_structure(serialized, value, shape, key)
                return
            found: dict[str, Any] = {}
            for name, content in value.items():
                self._serialize(found, content, shape.members[name], name)
            self._default_serialize(serialized, found, shape, key)

    class ItemParser(JSONParser):
        """Parses requests; moto looks for each of the ten types in every value of DynamoDB, and in their elements."""

        def _parse_structure(self, shape: Any, value: Any) -> Any:
            if shape.name == "AttributeValue" and isinstance(value, dict) and _is_plain(value):
                return value
            return super()._parse_structure(shape, value)  # type: ignore[no-untyped-call]

    class MeasuredItem(Item):
        """An item that may be as large as in moto, which measures all attributes again at each of them."""

        def __init__(self, hash_key: DynamoType, range_key: DynamoType | None, attrs: dict[str, Any]) -> None:
            # JSON is never shorter than what moto measures.
            if len(json.dumps(attrs, default=str)) > MEASURED_BYTES:
                super().__init__(hash_key, range_key, attrs)
                return
            super().__init__(hash_key, range_key, {})
            self.attrs.update((name, DynamoType(value)) for name, value in attrs.items())

    class Dispatcher(DomainDispatcherApplication):
        """Caches moto's choice of the service, for which moto lists its own folder at each request."""

        @lru_cache(maxsize=256)  # noqa: B019 (there is one for the whole process)
        def get_backend_for_host(self, host: str | None) -> Any:
            return super().get_backend_for_host(host)

    SERVICE_SPECIFIC_SERIALIZERS["dynamodb"] = {"json": ItemSerializer}
    PROTOCOL_PARSERS["json"] = ItemParser
    setattr(dynamodb_table, "Item", MeasuredItem)  # noqa: B010 (moto does not export the name)
    served = SERVICES | ({TEST_HOOKS} if test_hooks else set())

    def application(service: Any) -> Any:
        return create_backend_app(service) if service in served else _refusing(service)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = listener.getsockname()
    server = OwnUserServer(
        host,
        port,
        guarded(Dispatcher(application), loopback_hosts(port)),
        MotoRequestHandler,
        fd=listener.fileno(),
    )
    threading.Thread(target=server.serve_forever, name="aws", daemon=True).start()
    return server.shutdown


def _is_plain(value: dict[str, Any]) -> bool:
    """Return whether a value of DynamoDB, or all elements of a list, are as JSON has them."""
    if "L" not in value:
        return value.keys() <= PLAIN_TYPES
    return len(value) == 1 and all(
        isinstance(element, dict) and element.keys() <= PLAIN_TYPES for element in value["L"]
    )


def guarded(app: WsgiApp, hosts: frozenset[str]) -> WsgiApp:
    """Wrap the application to answer requests from the pages of foreign websites with 403."""

    def guard(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): str(value)
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        reason = foreign_request(headers, hosts, method=environ["REQUEST_METHOD"])
        if reason is None:
            return app(environ, start_response)
        log.warning("the local AWS server refused a request: %s", reason)
        return _refuse(start_response, reason)

    return guard


def _refusing(service: str) -> WsgiApp:
    def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        return _refuse(start_response, f"the local AWS server does not serve {service}")

    return application


def _refuse(start_response: StartResponse, reason: str) -> list[bytes]:
    body = f"refused: {reason}\n".encode()
    start_response(
        "403 Forbidden",
        [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))],
    )
    return [body]
