"""Kafka's consumer groups of environments: which the brokers know, and their removal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.contact import BROKER_TIMEOUT_SECONDS, Contact, KafkaUnavailable


def consumer_groups(kafka: KafkaSource, *, timeout_seconds: float = BROKER_TIMEOUT_SECONDS) -> list[str]:
    """Return the names of all consumer groups that the brokers show this client; none without brokers.

    The platform's own readers commit to no group; RisingWave's sources report their offsets to one. Raises
    KafkaUnavailable.
    """
    if kafka.bootstrap is None:
        return []
    contact = Contact(AdminClient, kafka.bootstrap, kafka.client, timeout_seconds=timeout_seconds)
    found: Any = contact.wait(
        lambda seconds: contact.client.list_consumer_groups(request_timeout=max(1.0, seconds)).result(),
        "does not list its consumer groups",
    )
    if found.errors:
        raise contact.unavailable("does not list its consumer groups", found.errors[0].args[0])
    return sorted(group.group_id for group in found.valid)


def delete_groups(
    kafka: KafkaSource, owns: Callable[[str], bool], *, timeout_seconds: float = BROKER_TIMEOUT_SECONDS
) -> list[str]:
    """Delete the consumer groups for which `owns` is true, and return their names. Safe to repeat.

    Raises KafkaUnavailable, also for a group that still has a member.
    """
    if kafka.bootstrap is None:
        return []
    names = [name for name in consumer_groups(kafka, timeout_seconds=timeout_seconds) if owns(name)]
    if not names:
        return []
    contact = Contact(AdminClient, kafka.bootstrap, kafka.client, timeout_seconds=timeout_seconds)
    for name, done in contact.client.delete_consumer_groups(names, request_timeout=timeout_seconds).items():
        try:
            done.result()
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.GROUP_ID_NOT_FOUND:
                continue
            if code == KafkaError.NON_EMPTY_GROUP:
                raise KafkaUnavailable(
                    f"consumer group {name} still has a reader: stop it, then run it again"
                ) from None
            raise contact.unavailable(f"did not delete consumer group {name}", error.args[0]) from None
    return names
