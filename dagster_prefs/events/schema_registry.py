"""Messages in Confluent's wire format: a zero byte, the id of a schema in four bytes, and the message.

JSON after this header is read by the engine itself (`unframed` in macros/messages.sql). Avro is decoded while a topic
is consumed, on the embedded engine, with the schema that the registry has under the id.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from io import BytesIO
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.errors import PrefsError

MAGIC = b"\x00"
HEADER_BYTES = 5
# Of a message that is stored as it came, because its schema is unknown or it does not follow it.
UNDECODED = "unreadable Avro or unknown schema"
TIMEOUT_SECONDS = 10.0
# A producer may register a schema on another node of the registry than the one that is asked.
UNKNOWN_SECONDS = 30.0


class SchemaRegistryUnavailable(PrefsError):
    """The schema registry is not configured, does not answer, or does not let this client in."""


class UnreadableTopic(PrefsError):
    """The engine cannot read a topic's format."""


@dataclass(frozen=True)
class RegistryAddress:
    """The schema registry's URL and credentials; the password is left out of the repr."""

    url: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)


def refuse_avro(topics: Iterable[TopicDeclaration]) -> None:
    """Raise UnreadableTopic for a topic in Avro, which RisingWave's feeds cannot decode."""
    if named := [topic.name for topic in topics if topic.format == "avro"]:
        raise UnreadableTopic(
            f"topic {', '.join(named)} is Avro, which the embedded engine decodes and RisingWave does not, because raw "
            "messages are bytes there: have its producers write JSON Schema and declare format: json_schema"
        )


def unframed(message: bytes) -> bytes:
    """Return a message without the header of the wire format, if it has one: no JSON text begins with a zero byte."""
    return message[HEADER_BYTES:] if message.startswith(MAGIC) else message


class SchemaRegistry:
    """Reads schemas by their ids, each once: the schema of an id never changes.

    `clock` returns seconds.
    """

    def __init__(
        self,
        address: RegistryAddress,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._timeout = timeout_seconds
        self._clock = clock
        self._schemas: dict[int, Any] = {}
        self._unknown_since: dict[int, float] = {}

    def avro(self, number: int) -> Any:
        """Return the parsed Avro schema of an id; None if the registry has no such id, or it is no Avro schema.

        An unknown id is asked for again after UNKNOWN_SECONDS. Raises SchemaRegistryUnavailable.
        """
        if number in self._schemas:
            return self._schemas[number]
        if self._clock() - self._unknown_since.get(number, float("-inf")) < UNKNOWN_SECONDS:
            return None
        found = self._get(f"/schemas/ids/{number}")
        if found is None:
            self._unknown_since[number] = self._clock()
            return None
        self._schemas[number] = self._parsed(found)
        return self._schemas[number]

    def _parsed(self, found: Mapping[str, Any]) -> Any:
        from fastavro.schema import SchemaParseException, parse_schema

        if found.get("schemaType", "AVRO") != "AVRO":
            return None
        named: dict[str, Any] = {}
        try:
            for text in [*self._referenced(found), str(found["schema"])]:
                schema = parse_schema(json.loads(text), named_schemas=named)
        except (SchemaParseException, ValueError, KeyError, TypeError):
            return None
        return schema

    def _referenced(self, found: Mapping[str, Any]) -> list[str]:
        """Return the schemas that one refers to, each after those that itself refers to."""
        texts: list[str] = []
        for one in found.get("references") or ():
            subject, version = quote(str(one["subject"]), safe=""), int(one["version"])
            other = self._get(f"/subjects/{subject}/versions/{version}")
            if other is not None:
                texts += [
                    text for text in (*self._referenced(other), str(other["schema"])) if text not in texts
                ]
        return texts

    def _get(self, path: str) -> Mapping[str, Any] | None:
        """Return the registry's answer; None if it has nothing there. Raises SchemaRegistryUnavailable."""
        address = self._address
        host = urlsplit(address.url).netloc.rpartition("@")[2]
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if address.user is not None:
            given = f"{address.user}:{address.password or ''}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(given).decode()}"
        # The settings allow http and https only.
        request = urllib.request.Request(address.url.rstrip("/") + path, headers=headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:  # noqa: S310
                content = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            remedy = (
                "check PREFS_SCHEMA_REGISTRY_USER and PREFS_SCHEMA_REGISTRY_PASSWORD"
                if error.code in (401, 403)
                else "reading continues when it answers again"
            )
            raise SchemaRegistryUnavailable(
                f"the schema registry at {host} answered {error.code}: {remedy}"
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise SchemaRegistryUnavailable(
                f"the schema registry at {host} gave no answer ({reason}): check PREFS_SCHEMA_REGISTRY_URL; reading "
                "continues when it answers"
            ) from None
        if not isinstance(content, dict):
            raise SchemaRegistryUnavailable(
                f"the schema registry at {host} answered no JSON object: check PREFS_SCHEMA_REGISTRY_URL"
            )
        return content


def decode_avro(message: bytes, registry: SchemaRegistry) -> bytes:
    """Return the JSON of an Avro message in the wire format; the message itself if it cannot be decoded.

    A message without the header is returned too: it is JSON, or rejected. Raises SchemaRegistryUnavailable, and then
    nothing may be stored.
    """
    if not message.startswith(MAGIC) or len(message) < HEADER_BYTES:
        return message
    schema = registry.avro(int.from_bytes(message[1:HEADER_BYTES], "big"))
    if schema is None:
        return message
    from fastavro import schemaless_reader

    body = BytesIO(message[HEADER_BYTES:])
    try:
        document = schemaless_reader(body, schema, None)
        if body.read(1):
            return message
        return json.dumps(document, default=_plain, allow_nan=False, ensure_ascii=False).encode()
    except Exception:
        # The bytes are a stranger's: whatever they raise in the reader, the message is kept and rejected.
        return message


def _plain(value: Any) -> Any:
    """Return a value of a logical type as the text that the typed layer reads."""
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime | date | time_of_day):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"{type(value).__name__} is no value of a message")
