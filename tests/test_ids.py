"""One id is one id at every door: a message, a cell, a request, a command, an erasure."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_prefs import ids
from dagster_prefs.cli.root import ViewerId
from dagster_prefs.events.fields import Field, cell_text
from dagster_prefs.events.formats import TOPICS
from dagster_prefs.events.redaction import Subject, SubjectRefused
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.serving.preferences import PreferenceError, checked_user
from dagster_prefs.serving.wire import RequestError
from dagster_prefs.serving.wire import viewer_id as requested_viewer

NOW = datetime(2026, 3, 15, tzinfo=UTC)
USER = Field("user_id")


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
    assert ids.id_text(value) == USER.text(value) == text


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
def test_a_viewer_is_the_same_at_every_door(given: Any, viewer: int | None) -> None:
    if viewer is None:
        with pytest.raises(ids.BadId, match="a viewer id is a 64-bit integer, not "):
            ids.viewer_id(given)
        with pytest.raises(RequestError):
            requested_viewer(given)
    else:
        assert ids.viewer_id(given) == requested_viewer(given) == viewer
    if isinstance(given, str):
        event = {
            "event_id": "e",
            "viewer_id": given,
            "event_type": "like",
            "event_ts": "2026-03-14T00:00:00Z",
        }
        reason = rejection_reason(json.dumps(event).encode(), TOPICS["content_interactions"], NOW)
        assert (reason is None) == (viewer is not None)
        if viewer is None:
            with pytest.raises(click.BadParameter):
                ViewerId().convert(given, None, None)
            with pytest.raises(SubjectRefused):
                Subject.named("viewer", given)
        else:
            assert ViewerId().convert(given, None, None) == viewer
            assert viewer < 0 or Subject.named("viewer", given).value == viewer


@given(st.text(max_size=20) | st.decimals(allow_nan=False, allow_infinity=False).map(str))
def test_a_user_is_the_same_at_every_door(given: str) -> None:
    expected = given.strip(" \t\r\n")
    event = {"event_id": "e", "user_id": given, "event_type": "view", "event_time": "2026-03-14T00:00:00Z"}
    reason = rejection_reason(json.dumps(event).encode(), TOPICS["user.events"], NOW)
    if not expected or "\x00" in expected:
        assert reason in ("bad user_id", "missing user_id", "not valid JSON")
        with pytest.raises(PreferenceError):
            checked_user(given)
        with pytest.raises(SubjectRefused):
            Subject.named("user", given)
    elif not expected.startswith("canary:"):
        assert reason is None
        assert checked_user(given) == Subject.named("user", given).id == USER.text(given) == expected


@given(st.decimals(min_value=-(2**63), max_value=2**63, allow_nan=False, allow_infinity=False))
def test_every_spelling_of_a_number_is_one_id(number: Decimal) -> None:
    plain = format(number, "f")
    spelled = {plain, f"{number:.40e}", f"{plain}.0" if "." not in plain else f"{plain}00"}
    texts = {ids.id_text(json.loads(text, parse_int=Decimal, parse_float=Decimal)) for text in spelled}
    assert len(texts) == 1
    (text,) = texts
    assert text is not None
    assert Decimal(text) == number
    assert cell_text(plain) == text


def test_what_is_shown_of_an_id_is_short() -> None:
    for long in ("x" * 1_000_000, ["x"] * 100_000, {"a": "x" * 1_000_000}, 10**4_000):
        with pytest.raises(ids.BadId) as caught:
            ids.viewer_id(long)
        assert len(str(caught.value)) < 200
