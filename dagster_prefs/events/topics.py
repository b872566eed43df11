"""Which generation of a Kafka topic is read: a recreated topic is another one of the same name.

Its offsets start at 0 again. Under the old source name, its first messages would be taken for those that are
already stored, and a reader that continues at its old offset would skip them silently. The brokers give each
topic an id on creation; the engine stores the last one it saw in `kafka_topics`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import psycopg
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from psycopg import sql

from dagster_prefs.engine.catalog import NotDeployed, missing_relation
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.contact import BROKER_TIMEOUT_SECONDS, PAUSE_SECONDS, Contact

# The id that brokers older than topic ids (2.8) report.
_NO_ID = "AAAAAAAAAAAAAAAAAAAAAA"
_UNSUPPORTED = (KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE)

TopicState = Literal["noted", "unnoted", "recreated", "unknown"]


@dataclass(frozen=True)
class TopicGeneration:
    """A topic with the id that the engine stored, and the one that the brokers report now.

    `noted_id` is None before the first check, `broker_id` None if the brokers report no ids.
    """

    kafka_topic: str
    generation: int
    noted_id: str | None
    broker_id: str | None

    @property
    def state(self) -> TopicState:
        """`recreated` if the brokers' topic is not the one whose messages were read."""
        if self.broker_id is None:
            return "unknown"
        if self.noted_id is None:
            return "unnoted"
        return "noted" if self.noted_id == self.broker_id else "recreated"

    @property
    def source(self) -> str:
        """The source of its messages in the raw table."""
        return source_name(self.kafka_topic, self.generation)


def source_name(kafka_topic: str, generation: int) -> str:
    """Return the source of a topic's messages: its name and, from the second generation on, its number."""
    return f"kafka:{kafka_topic}" + (f"#{generation}" if generation > 1 else "")


def broker_ids(
    bootstrap: str,
    kafka_topics: Iterable[str],
    *,
    client: Mapping[str, Any] | None = None,
    timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
) -> dict[str, str | None]:
    """Return the brokers' id of each topic, None if they report no ids. Omits missing topics.

    Raises KafkaUnavailable, with Kafka's own reason, when the brokers reject this client, do not answer
    within `timeout_seconds`, or do not let it see a topic.
    """
    names = list(kafka_topics)
    contact = Contact(AdminClient, bootstrap, client, timeout_seconds=timeout_seconds)
    admin = contact.client
    found: dict[str, str | None] = {}
    if not names:
        return found
    asked = admin.describe_topics(TopicCollection(names), request_timeout=timeout_seconds)
    untold = "does not list its topics"
    deadline = time.monotonic() + timeout_seconds
    while not all(future.done() for future in asked.values()) and time.monotonic() < deadline:
        # librdkafka reports failures, and requests a token of MSK's, when it is polled.
        admin.poll(PAUSE_SECONDS)
        contact.check(untold, first=True)
    for name, future in asked.items():
        try:
            identity = str(future.result(1).topic_id)
        except TimeoutError:
            raise contact.unavailable(untold) from None
        except KafkaException as error:
            failed = error.args[0]
            if failed.code() in _UNSUPPORTED:
                found[name] = None
            elif failed.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise contact.unavailable(f"does not describe topic {name}", failed, name) from None
        else:
            found[name] = None if identity == _NO_ID else identity
    return found


def topic_generations(
    session: psycopg.Connection[Any], engine: EngineConfiguration, ids: Mapping[str, str | None]
) -> dict[str, TopicGeneration]:
    """Return the stored generation of each topic next to the brokers' `ids`.

    Raises NotDeployed if `kafka_topics` does not exist.
    """
    try:
        rows = session.execute(
            sql.SQL("select kafka_topic, generation, topic_id from {} where kafka_topic = any(%s)").format(
                _table(engine)
            ),
            (list(ids),),
        ).fetchall()
    except psycopg.errors.DatabaseError as error:
        if missing_relation(error) is None:
            raise
        raise NotDeployed(
            f"{engine.schema}.kafka_topics is not in database {engine.database}: run `dbt run` in dbt_project/"
        ) from None
    known = {str(name): (int(generation), str(noted)) for name, generation, noted in rows}
    generations = {}
    for name, identity in ids.items():
        generation, noted = known.get(name, (1, None))
        generations[name] = TopicGeneration(name, generation, noted, identity)
    return generations


def note_topics(
    session: psycopg.Connection[Any],
    engine: EngineConfiguration,
    ids: Mapping[str, str | None],
    *,
    now: datetime,
) -> dict[str, TopicGeneration]:
    """Store the brokers' ids; a topic whose id changed enters its next generation.

    Returns the generations as they were before. Raises NotDeployed. A repeated call changes nothing.
    """
    generations = topic_generations(session, engine, ids)
    for one in generations.values():
        if one.state not in ("unnoted", "recreated"):
            continue
        generation = one.generation + (one.state == "recreated")
        session.execute(
            sql.SQL("delete from {} where kafka_topic = %s").format(_table(engine)), (one.kafka_topic,)
        )
        session.execute(
            sql.SQL(
                "insert into {} (kafka_topic, topic_id, generation, noted_at) values (%s, %s, %s, %s)"
            ).format(_table(engine)),
            (one.kafka_topic, one.broker_id, generation, now),
        )
    return generations


def _table(engine: EngineConfiguration) -> sql.Identifier:
    return sql.Identifier(engine.schema, "kafka_topics")
