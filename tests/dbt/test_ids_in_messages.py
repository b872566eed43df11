"""A user is one user however a producer writes the id, in the views and for an erasure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from oracle import HOUR, Message
from relations import insert_events, instant, materialized_views, refresh
from streams import NOW

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.erasure.events import RawMessages, Subject, names
from dagster_prefs.events.messages import Topic

SPELLED = ["12345", "12345.0", "1.2345e4", '"12345"', '" 12345 "', "12345.000 "]
OTHERS = ['"12345.0"', '"1.2345e4"', "123450", "12345.5", '"012345"', "[12345]"]


def event(place: int, user: str, time: str = '"2026-03-15T10:00:00Z"') -> Message:
    body = f'{{"event_id":"e{place}","user_id":{user},"event_type":"purchase","category":"c","event_time":{time}}}'
    return Message("user.events", "file:a#1", 0, place, body.encode(), None, NOW - HOUR)


def test_spellings_of_one_number_are_one_user(
    registry: Registry, deployed: EngineConfiguration, dbt_on: Callable[..., Dbt]
) -> None:
    stream = [event(place, user) for place, user in enumerate([*SPELLED, *OTHERS])]
    # Rejected, but the user's all the same, as is the list among the others.
    stream.append(event(len(stream), "12345.0", '"yesterday"'))
    subject = Subject.named(registry, "shop_user", "12345")
    with deployed.connect() as session:
        insert_events(session, stream)
        refresh(session, materialized_views(dbt_on(deployed).manifest()))
        found = dict(session.execute("select user_id, affinity_score from user_category_profile").fetchall())
        others = dict.fromkeys(("012345", "12345.0", "12345.5", "123450", "1.2345e4"), 10)
        assert found == others | {"12345": 60}
        messages = RawMessages(session, deployed, registry.topics.values(), subject, instant(NOW))
        own = {position.offset for position in messages.find()["raw_user_events"]}
    assert own == {*range(len(SPELLED)), len(stream) - 2, len(stream) - 1}


def test_a_rejected_message_names_a_user_by_any_spelling(
    registry: Registry, topics: Mapping[str, Topic]
) -> None:
    subject = Subject.named(registry, "shop_user", "12345")
    topic = topics["user.events"]
    for user in SPELLED:
        assert names(subject, f'{{"user_id": {user}}}', topic)
    for user in ('"1.2345e4"', "123450", '"012345"', "12345.5"):
        assert not names(subject, f'{{"user_id": {user}}}', topic)
