"""Authentication of canaries: how a message proves that it is a canary of this deployment.

Each deployment has a key in the engine's table `canary_keys`. The event id of a canary contains the
deployment's name and the event's time in milliseconds, and ends in a keyed digest of that time:

    canary:<deployment>:<milliseconds>:<digest>

A producer that does not know the key cannot compute the digest. One that copies the id of a canary that it
has read can only send it for the same entity and the same time, which makes it a duplicate. The models check
the same in SQL (`dbt_project/macros/reserved.sql`).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.declarations.reserved import PREFIX, canary_of, canary_parts, canary_value
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.raw import RawStoreError, translated

RELATION = "canary_keys"
# The reason with which the typed layer rejects canaries that other deployments send to the same topics.
OF_ANOTHER_DEPLOYMENT = "canary of another deployment"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_IDENTITY = re.compile(PREFIX + r"([0-9a-f]{16}):[0-9]{1,19}:[0-9a-f]{32}")


@dataclass(frozen=True)
class CanaryKey:
    """The name of a deployment (16 hex digits) and its secret (64 hex digits), which no repr shows."""

    deployment: str
    secret: str = field(repr=False)

    @classmethod
    def random(cls) -> CanaryKey:
        """Return a new key, for a deployment with a new random name."""
        return cls(secrets.token_hex(8), secrets.token_hex(32))

    def event_id(self, milliseconds: int) -> str:
        """Return the id of the deployment's canary with this event time (epoch milliseconds)."""
        # Hashed twice, because a plain digest of secret and time could be extended without the secret.
        digest = _sha256(self.secret + _sha256(f"{self.secret}{milliseconds}"))[:32]
        return f"{PREFIX}{self.deployment}:{milliseconds}:{digest}"


def deployment_of(event_id: str) -> str | None:
    """Return the deployment that a canary's event id names, proven or not; None for every other id."""
    found = _IDENTITY.fullmatch(event_id)
    return found[1] if found else None


def is_proven(event_id: str, milliseconds: int, keys: Collection[CanaryKey]) -> bool:
    """Return whether one of these keys produces this id for this event time (epoch milliseconds)."""
    return any(secrets.compare_digest(event_id, key.event_id(milliseconds)) for key in keys)


def canary_events(registry: Registry, key: CanaryKey, moment: datetime) -> dict[str, bytes]:
    """Build the canary's message for each topic at `moment` (UTC, in whole milliseconds), signed with `key`.

    Covers every topic whose events have an entity and a time. Each message has a value in every field.
    """
    milliseconds = (moment - _EPOCH) // timedelta(milliseconds=1)
    identity = key.event_id(milliseconds)
    at = (_EPOCH + timedelta(milliseconds=milliseconds)).isoformat(timespec="milliseconds")
    messages = {}
    for topic in registry.topics.values():
        if topic.entity is None or topic.time is None:
            continue
        subject = registry.entity(topic.entity).key
        # Every entity of this first key is probed by the same message.
        parts = [canary_parts(registry, entity) for entity in registry.family(topic.entity)]
        own = {name: value for one in parts for name, value in one.items()}
        own |= {topic.identity: identity, subject.name: canary_of(subject), topic.time: at}
        fields = {field.name: own.get(field.name, canary_value(field)) for field in topic.fields}
        messages[topic.name] = json.dumps(fields, separators=(",", ":")).encode()
    return messages


def canary_key(engine: EngineConfiguration) -> CanaryKey:
    """Return the key that signs this deployment's canaries; create it if there is none.

    Raises EngineUnavailable, or RawStoreError if `canary_keys` does not exist yet.
    """
    with engine.connect() as session:
        return key_of(session, engine)


def key_of(session: psycopg.Connection[Any], engine: EngineConfiguration) -> CanaryKey:
    """Return the key like `canary_key`, over a connection. Raises RawStoreError."""
    with translated(engine, RELATION):
        found = _newest(session, engine)
        if found is None:
            made = CanaryKey.random()
            session.execute(
                sql.SQL("insert into {} (deployment, secret_hex, made_at) values (%s, %s, %s)").format(
                    _table(engine)
                ),
                (made.deployment, made.secret, datetime.now(UTC)),
            )
            # Two probes that start at once each create a key, and both keys stay valid.
            found = _newest(session, engine)
    if found is None:
        raise RawStoreError(f"the engine did not store a key in {RELATION}: send the canary again")
    return found


def stored_keys(session: psycopg.Connection[Any], engine: EngineConfiguration) -> list[CanaryKey]:
    """Return every key of the engine, over a connection. Raises RawStoreError if `canary_keys` does not exist."""
    with translated(engine, RELATION):
        rows = session.execute(
            sql.SQL("select deployment, secret_hex from {}").format(_table(engine))
        ).fetchall()
    return [CanaryKey(*row) for row in rows]


def _newest(session: psycopg.Connection[Any], engine: EngineConfiguration) -> CanaryKey | None:
    row = session.execute(
        sql.SQL("select deployment, secret_hex from {} order by made_at desc, deployment limit 1").format(
            _table(engine)
        )
    ).fetchone()
    return CanaryKey(*row) if row else None


def _table(engine: EngineConfiguration) -> sql.Identifier:
    return sql.Identifier(engine.schema, RELATION)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
