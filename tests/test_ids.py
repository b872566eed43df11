"""One id is one id at every door: a message, a cell, a request, a command, an erasure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipped import REGISTRY

from dagster_prefs import ids
from dagster_prefs.cli.serving import id_of
from dagster_prefs.declarations.registry import FieldDeclaration, Key, KeyType
from dagster_prefs.declarations.reserved import canary_of, is_reserved, people_only
from dagster_prefs.erasure.events import Subject, SubjectRefused
from dagster_prefs.events.fields import cell_text, field_text
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.serving.preferences import PreferenceError, checked_user
from dagster_prefs.serving.wire import RequestError, wire_id

VIEWER = REGISTRY.entity("viewer")
NOW = datetime(2026, 3, 15, tzinfo=UTC)
USER = FieldDeclaration("user_id")


class Foreign:
    """A whole number of another library, as numpy's."""

    def __index__(self) -> int:
        return 5


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("12345", "12345"),
        ("12345.0", "12345"),
        ("1.2345e4", "12345"),
        ("-0.0", "0"),
        ("0.50", "0.5"),
        ("1e-7", "0.0000001"),
        ("18446744073709551615", "18446744073709551615"),
        ("18446744073709551616", None),
        ("1e131071", None),
        ('"12345.0"', "12345.0"),
        ('"1e3"', "1e3"),
        ('" 007\\n"', "007"),
        ('"\\u00a0x"', "\u00a0x"),
        ('" "', None),
        ("true", None),
        ("null", None),
        ('["a"]', None),
        ('{"a": 1}', None),
    ],
)
def test_a_json_value_is_an_id(written: str, text: str | None) -> None:
    value = json.loads(written, parse_int=Decimal, parse_float=Decimal)
    assert ids.id_text(value) == field_text(USER, value) == text


@pytest.mark.parametrize(
    ("given", "viewer"),
    [
        (5, 5), ("5", 5), (" 5\t", 5), ("5.0", 5), (5.0, 5), ("007", 7), (Decimal("5E+1"), 50), (-(2**63), -(2**63)),
        (str(2**63 - 1), 2**63 - 1), (Foreign(), 5),
        ("1e3", None), ("5.5", None), (5.5, None), (2**63, None), ("0x5", None), ("+5", None), (True, None),
        ("\u0665", None),
        (None, None), ([5], None), ("", None), ("5 6", None), (float("nan"), None), (float("inf"), None),
        # As a float this is 2^53 and 2^53 + 1: who was meant?
        (float(2**53), None),
    ],
)  # fmt: skip
def test_a_viewer_is_the_same_at_every_door(
    topics: Mapping[str, Topic], given: Any, viewer: int | None
) -> None:
    if viewer is None:
        with pytest.raises(ids.BadId, match="viewer_id must be a 64-bit integer, not "):
            ids.read_key(VIEWER.key, given)
        with pytest.raises(RequestError):
            wire_id(VIEWER.keys, given)
    else:
        assert ids.read_key(VIEWER.key, given) == wire_id(VIEWER.keys, given) == viewer
    if isinstance(given, str):
        event = {
            "event_id": "e",
            "viewer_id": given,
            "event_type": "like",
            "event_ts": "2026-03-14T00:00:00Z",
        }
        reason = rejection_reason(json.dumps(event).encode(), topics["content_interactions"], NOW)
        assert (reason is None) == (viewer is not None)
        if viewer is None:
            with pytest.raises(click.BadParameter):
                id_of(VIEWER, given)
            with pytest.raises(SubjectRefused):
                Subject.named(REGISTRY, "viewer", given)
        else:
            assert id_of(VIEWER, given) == viewer
            assert viewer < 0 or Subject.named(REGISTRY, "viewer", given).value == viewer


@given(st.text(max_size=20) | st.decimals(allow_nan=False, allow_infinity=False).map(str))
def test_a_user_is_the_same_at_every_door(topics: Mapping[str, Topic], given: str) -> None:
    expected = given.strip(" \t\r\n")
    event = {"event_id": "e", "user_id": given, "event_type": "view", "event_time": "2026-03-14T00:00:00Z"}
    reason = rejection_reason(json.dumps(event).encode(), topics["user.events"], NOW)
    if not expected or "\x00" in expected:
        assert reason in ("bad user_id", "missing user_id", "not valid JSON")
        with pytest.raises(PreferenceError):
            checked_user(given)
        with pytest.raises(SubjectRefused):
            Subject.named(REGISTRY, "shop_user", given)
    elif not expected.startswith("canary:"):
        assert reason is None
        assert (
            checked_user(given)
            == Subject.named(REGISTRY, "shop_user", given).id
            == field_text(USER, given)
            == expected
        )


@given(st.decimals(min_value=-(2**63), max_value=2**63, allow_nan=False, allow_infinity=False))
def test_every_spelling_of_a_number_is_one_id(number: Decimal) -> None:
    plain = format(number, "f")
    spelled = {plain, f"{number:e}", f"{plain}.0" if "." not in plain else f"{plain}00"}
    texts = {ids.id_text(json.loads(text, parse_int=Decimal, parse_float=Decimal)) for text in spelled}
    assert len(texts) == 1
    (text,) = texts
    assert text is not None
    assert Decimal(text) == number
    assert cell_text(plain) == text


def test_what_is_shown_of_an_id_is_short() -> None:
    for long in ("x" * 1_000_000, ["x"] * 100_000, {"a": "x" * 1_000_000}, 10**4_000):
        with pytest.raises(ids.BadId) as caught:
            ids.read_key(VIEWER.key, long)
        assert len(str(caught.value)) < 200


UUID = "0190163d-8694-739b-aea5-966c26f8ad91"


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        ("bigint", " 5.0", 5), ("bigint", 5.0, 5), ("bigint", "1e3", None), ("bigint", 2**63, None),
        ("bigint", UUID, None),
        ("text", " a b ", "a b"), ("text", 12345.0, "12345"), ("text", "007", "007"), ("text", "ä" * 1024, "ä" * 1024),
        ("text", "", None), ("text", "a\x00", None), ("text", "\ud800", None), ("text", "ä" * 1025, None),
        ("text", None, None),
        ("uuid", UUID, UUID), ("uuid", f" {UUID.upper()}\n", UUID), ("uuid", uuid.UUID(UUID), UUID),
        ("uuid", UUID.replace("-", ""), None), ("uuid", f"{{{UUID}}}", None), ("uuid", f"{UUID}0", None),
        ("uuid", 5, None),
        ("uuid", "0190163g-8694-739b-aea5-966c26f8ad91", None), ("uuid", None, None),
    ],
)  # fmt: skip
def test_a_key_is_read_by_its_type(kind: KeyType, given: Any, value: int | str | None) -> None:
    key = Key("learner_id", kind)
    if value is None:
        with pytest.raises(ids.BadId, match=r"^learner_id must be ") as caught:
            ids.read_key(key, given)
        assert len(str(caught.value)) < 300
        return
    assert ids.read_key(key, given) == value
    assert type(ids.read_key(key, given)) is type(value)
    assert ids.key_text(key, value) == str(value)
    assert ids.read_key(key, ids.key_text(key, value)) == value


@pytest.mark.parametrize(
    ("kind", "canary", "reserved", "people", "condition"),
    [
        ("bigint", -1, -7, 0, '"k" >= 0'),
        ("text", "canary:prefs", "canary:", "canary", "not starts_with(\"k\", 'canary:')"),
        (
            "uuid",
            "00000000-0000-0000-0000-000000000000",
            "00000000-0000-0000-0000-0000000000ff",
            UUID,
            "not starts_with(\"k\", '00000000-0000-0000-0000-')",
        ),
    ],
)
def test_reserved_ids_follow_the_type_of_the_key(
    kind: KeyType, canary: int | str, reserved: int | str, people: int | str, condition: str
) -> None:
    key = Key("k", kind)
    assert canary_of(key) == canary == ids.read_key(key, canary)
    assert is_reserved(key, canary)
    assert is_reserved(key, reserved)
    assert not is_reserved(key, people)
    assert people_only(key).as_string(None) == condition
