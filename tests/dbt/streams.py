"""Random streams of messages, good and nasty, around one fixed moment."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from oracle import CANARY_KEYS, DAY, HOUR, SECOND, TOPICS, Message, canary_id, micros
from relations import instant
from shipped import LONG, SHORT

NOW = micros(datetime(2026, 3, 15, 12, 30, tzinfo=UTC))
MIDNIGHT = NOW // DAY * DAY

# Moments where something changes: midnights, ends of windows, hours, the future, other centuries.
_edges = [
    *(
        MIDNIGHT - days * DAY + by
        for days in (0, 1, SHORT, SHORT + 1, 14, LONG, LONG + 1, 104)
        for by in (-1, 0, 1, 5 * HOUR)
    ),
    *(NOW - days * DAY + by for days in (0, 14, 104) for by in (-1, 0, 1)),
    NOW + DAY - SECOND,
    NOW + DAY,
    NOW + DAY + 1,
    micros(datetime(1970, 1, 1, tzinfo=UTC)),
    micros(datetime(1001, 2, 3, tzinfo=UTC)),
    micros(datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)),
]
moments = st.one_of(
    st.sampled_from(_edges), st.integers(NOW - 40 * DAY, NOW), st.integers(NOW - 120 * DAY, NOW)
)

# Hypothesis with a database behind it.
quick = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)


def raw(number: str) -> str:
    """A number of a message that Python's own numbers cannot spell."""
    return f"<<{number}>>"


# As JSON spells numbers that are long, large or small; the last are more than any field holds.
numbers = st.sampled_from([
    "12345.0", "1.2345e4", "1.2345E+4", "-0.0", "1e-7", "0.0012962962962962963", "1.5E+2", "1e18", "1e27", "1e-400",
    "18446744073709551615", "18446744073709551616", "-9223372036854775808", "0." + "3" * 300, "12." + "0" * 400,
    "1e28", "1e40", "1e131071", "-1e131071", "1e-16383", "9" * 400,
]).map(raw)  # fmt: skip
# Texts around the limits in bytes, and such as hurt indexes, terminals or formats.
_lengths = {"a": (256, 257), "é": (128, 129), "b": (1024, 1025), "日": (341, 342), "q": (8192,)}
texts = st.one_of(
    st.sampled_from([letter * times for letter, sizes in _lengths.items() for times in sizes]),
    st.sampled_from([
        "\x1b[31mred", "\u202eabc", "\ufeff", "=1+1", "a\nb", "\x7f", "😀", "ﬀ", "'; drop table x; --", "\u2028",
    ]),
)  # fmt: skip


@st.composite
def spelled(draw: st.DrawFn) -> Any:
    """A moment as producers write it."""
    at = draw(moments)
    style = draw(st.integers(0, 7))
    if style == 0 and at >= 0:
        unit = draw(st.sampled_from([10**6, 1000, 1000, 1]))
        whole = draw(st.sampled_from([at // unit, at * 1000 if unit == 1 else at // unit]))
        return draw(
            st.sampled_from(
                [whole, str(whole), f"{at // SECOND}.{at % SECOND:06d}", f"{whole}.0", raw(f"{whole}.0")]
            )
        )
    when = datetime.fromtimestamp(at // SECOND, UTC).replace(microsecond=at % SECOND)
    separator = draw(st.sampled_from(["T", " "]))
    if style == 1:
        return when.strftime(f"%Y-%m-%d{separator}%H:%M") + draw(st.sampled_from(["", "Z", "+00"]))
    text = when.isoformat(separator).removesuffix("+00:00")
    if style == 4 and at % SECOND:
        # As .NET, Go and Java write it.
        finer = draw(st.sampled_from(["1", "999", "1234567890"]))
        return (
            (text + finer + draw(st.sampled_from(["Z", "+02:00", ""]))).lower()
            if draw(st.booleans())
            else text + finer
        )
    if style == 2 and at % SECOND:
        text = text.rstrip("0")
    if style == 3:
        offset = draw(st.sampled_from(["+05:30", "-0800", "+15:59", "-03", " +01:00"]))
        return text + offset
    return text + draw(st.sampled_from(["", "Z", " UTC", "+00:00", " Z"]))


bad_moments = st.sampled_from([
    "2026-02-30T10:00:00Z", "2026-13-01 00:00:00", "2026-03-01T24:00:00Z", "2026-03-01T10:60:00", "yesterday", "now",
    "2026-03-01T10:00:00+16:00", "0000-01-01 00:00:00", "2026-03-01", "infinity", "-1", "1e12", "9" * 15, "9" * 20,
    "2026-03-01T10:00:00Z\n", "2026-03-01T10:00:00,5Z", "2026-03-01t10:00:00z", " ", "", None, True, [], {},
    "1999-12-31T23:59:59.999999Z", "2101-01-01T00:00:00Z", "2100-12-31T23:59:59Z", "2000-01-01T00:00:00+01:00",
    "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-03-01T10:00:00.Z", 0, 946684799, 946684800, 4133980800,
    946684800000, "4133980799999.999999", 10**15, 10**17, 10**18, raw("1.7735e9"), raw("1773500000.1234567"),
    "2026-03-01T10:00:00 Europe/Berlin", "٢٠٢٦-03-01T10:00:00Z", 1773500000000.5,
])  # fmt: skip
times = st.one_of(spelled(), spelled(), spelled(), spelled(), bad_moments)

_odd = [None, "", " ", True, False, [], {}, [1], {"a": 1}, "\t", "x y", " padded ", 0, -0.0]
odd = st.one_of(st.sampled_from(_odd), st.sampled_from([*_odd, [raw("1e131071")] * 3]), numbers, texts)
event_ids = st.one_of(st.integers(0, 25).map(lambda n: f"e{n}"), st.integers(0, 99), odd)
users = st.one_of(
    st.sampled_from(["u1", "u2", "u3", "ü4", "canary:1", "canary:prefs"]), st.integers(1, 2), odd
)
viewers = st.one_of(
    st.integers(-2, 3),
    st.integers(-2, 3),
    st.sampled_from([
        "1", "2.0", " 3", 2.0, 1.5, "1e3", 10**18, 2**63 - 1, -(2**63), 2**63, 10**25, "-0", "+1", "0x1", 86_400, 3_599,
    ]),
    odd,
)  # fmt: skip
seconds = st.one_of(
    st.sampled_from([0, 1, 7, 60, 61, 100]),
    st.integers(0, 7200),
    st.sampled_from([-1, 2**31 - 1, 2**31, "30", "30.0", "30.5", 1e2, "1e2"]),
    odd,
)
completions = st.one_of(
    st.sampled_from([0.9, "0.9", 0.899999999, "0.90", "9e-1", 0.9000001, 1, 1.0, 0, "1e0", 0.5]),
    st.sampled_from([-0.1, 1.0000001, "90%", "NaN", "1e-9", 2, "-0"]),
    odd,
)
prices = st.one_of(
    st.sampled_from([0, 24.99, 25, "25.00", 99.999, 100, "100", 499.99, 500, "2.5e1", 1234567.89]),
    st.sampled_from([-0.01, "-1", "free", "1,50", "1e99", "1" * 16, ".5", "5.", "-0.00", "1e-99"]),
    odd,
)
names = st.one_of(
    st.sampled_from(["A", "a", "B", "Ä", "drama", "Drama", "sci|fi", "a,b", "42"]), st.integers(1, 2), odd
)
stock = st.one_of(
    st.booleans(), st.sampled_from(["true", "FALSE", "1", 0, 1, "yes", 1.5, " true", None, "", [], "True"])
)

_fields = {
    "user.events": {
        "event_id": event_ids,
        "user_id": users,
        "item_id": st.one_of(st.integers(1, 4), names),
        "event_type": st.one_of(
            st.sampled_from(["view", "view", "wishlist", "add_to_cart", "purchase", "purchase"]),
            st.sampled_from(["cart", "View", " view "]),
            odd,
        ),
        "category": names,
        "brand": names,
        "price": prices,
        "session_id": names,
        "event_time": times,
    },
    "view_events": {
        "event_id": event_ids,
        "viewer_id": viewers,
        "content_id": names,
        "genre": names,
        "watch_duration_sec": seconds,
        "completion_pct": completions,
        "watched_at": times,
    },
    "content_interactions": {
        "event_id": event_ids,
        "viewer_id": viewers,
        "event_type": st.one_of(
            st.sampled_from(["like", "share", "search", "like"]), st.just("dislike"), odd
        ),
        "event_ts": times,
    },
    "items": {
        "item_id": st.one_of(st.integers(1, 4), names),
        "title": names,
        "category": names,
        "brand": names,
        "price": prices,
        "in_stock": stock,
    },
}

garbage = st.one_of(
    st.sampled_from([
        b"", b" ", b"{", b"null", b"true", b"42", b'"text"', b"[]", b"[{}]", b"{}", b"\xff\xfe",
        b'{"event_id":"\xc3("}',
        b'{"event_id":"a\\u0000b"}', b'{"event_id":"\\ud800"}', b"\x00", b"{\"a\":1}\x00", b"NaN", b'{"price":NaN}',
        b"{'event_id':1}", b'\xef\xbb\xbf{"event_id":"bom"}', b"a\\b\x00\xff", b'{"event_id":01}', b'{"a":1,}',
    ]),
    st.binary(max_size=12),
)  # fmt: skip


# What most producers send most of the time; with every field drawn freely hardly a message would be valid.
_mild_times = st.one_of(spelled(), spelled(), st.integers(NOW - 40 * DAY, NOW).map(lambda at: at // 1000))
_mild_ids = st.integers(0, 30).map(lambda n: f"e{n}")
_mild_names = st.sampled_from(["A", "a", "B", "Ä", "drama", "sci|fi", None, ""])
_mild_fields: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "user.events": {
        "event_id": _mild_ids,
        "user_id": st.sampled_from(["u1", "u2", "ü3"]),
        "item_id": st.integers(1, 4).map(str),
        "event_type": st.sampled_from(
            ["view", "view", "view", "wishlist", "add_to_cart", "purchase", "purchase"]
        ),
        "category": _mild_names,
        "brand": _mild_names,
        "price": st.sampled_from([None, 0, 24.99, 25, 99.99, "100.00", 499.99, 500]),
        "session_id": _mild_names,
        "event_time": _mild_times,
    },
    "view_events": {
        "event_id": _mild_ids,
        "viewer_id": st.integers(0, 3),
        "content_id": _mild_names,
        "genre": st.sampled_from(["A", "a", "B", "Ä", "drama", "Drama", "z", None]),
        "watch_duration_sec": st.sampled_from([0, 1, 7, 60, 61, 100, 3600, None]),
        "completion_pct": st.sampled_from([0, 0.5, 0.899999999, 0.9, "0.90", 1, None]),
        "watched_at": _mild_times,
    },
    "content_interactions": {
        "event_id": _mild_ids,
        "viewer_id": st.integers(0, 3),
        "event_type": st.sampled_from(["like", "share", "search"]),
        "event_ts": _mild_times,
    },
    "items": {
        "item_id": st.integers(1, 4),
        "title": _mild_names,
        "category": _mild_names,
        "brand": _mild_names,
        "price": st.sampled_from([None, 0, 25, "19.99"]),
        "in_stock": st.booleans(),
    },
}


_SUBJECTS = {
    "user.events": ("user_id", "event_time", "canary:prefs"),
    "view_events": ("viewer_id", "watched_at", -1),
    "content_interactions": ("viewer_id", "event_ts", -1),
}


@st.composite
def canary_fields(draw: st.DrawFn, topic: str) -> dict[str, Any]:
    """What makes an event a canary: proven, of another deployment, or forged in one of many ways."""
    subject, time, probe = _SUBJECTS[topic]
    at = draw(st.integers(NOW - 20 * DAY, NOW)) // 1000
    ((deployment, secret),) = CANARY_KEYS.items()
    identity = draw(st.sampled_from([
        canary_id(deployment, secret, at), canary_id(deployment, secret, at), canary_id(deployment, secret, at),
        canary_id("f" * 16, secret, at), canary_id(deployment, secret, at + 1), canary_id(deployment, "0" * 64, at),
        f"canary:{deployment}:{at}:{'0' * 32}", canary_id(deployment, secret, at).upper(),
        f" {canary_id(deployment, secret, at)} ", canary_id(deployment, secret, at) + "0", f"canary:{at}", "canary:",
        f"canary-{at}", "canary:\\x\\", "e1",
    ]))  # fmt: skip
    who = draw(st.sampled_from([probe, probe, probe, probe, 1, "1", -5, "canary:1", "-1", "-1.0"]))
    return {"event_id": identity, subject: who, time: at}


@st.composite
def bodies(draw: st.DrawFn, topic: str) -> bytes:
    """The bytes of one message: mostly valid, sometimes with one nasty field, seldom nonsense."""
    mood = draw(st.integers(0, 9))
    if mood == 9:
        return draw(garbage)
    document: dict[str, Any] = {name: draw(values) for name, values in _mild_fields[topic].items()}
    if mood >= 6:
        for name in draw(st.lists(st.sampled_from(sorted(_fields[topic])), min_size=1, max_size=2)):
            document[name] = draw(_fields[topic][name])
    if mood == 8:
        document.pop(draw(st.sampled_from(sorted(document))))
    elif topic in _SUBJECTS and draw(st.integers(0, 5)) == 0:
        document |= draw(canary_fields(topic))
    return re.sub(r'"<<([^>]*)>>"', r"\1", json.dumps(document, ensure_ascii=draw(st.booleans()))).encode()


@st.composite
def messages(draw: st.DrawFn, max_size: int = 50) -> list[Message]:
    """A stream over all topics: two sources, two partitions, arrivals with ties and out of order."""
    made: list[Message] = []
    for place in range(draw(st.integers(0, max_size))):
        topic = draw(st.sampled_from(TOPICS))
        repeated = [m.data for m in made if m.topic == topic]
        again = repeated and draw(st.integers(0, 5)) == 0
        made.append(
            Message(
                topic=topic,
                source=draw(st.sampled_from(["file:a#1", "kafka:B"])),
                partition=draw(st.integers(0, 1)),
                offset=place,
                data=draw(st.sampled_from(repeated)) if again else draw(bodies(topic)),
                kafka_timestamp=draw(st.sampled_from([None, NOW, NOW - DAY, NOW - 1])),
                arrived_at=NOW - draw(st.sampled_from([0, 1, SECOND, HOUR])),
            )
        )
    return made


def canary_at(at: int) -> str:
    """The event id of this engine's canary of that moment (microseconds)."""
    ((deployment, secret),) = CANARY_KEYS.items()
    return canary_id(deployment, secret, at // 1000)


def watch(number: int, viewer: int, at: int, seconds: int = 60) -> Message:
    """A valid view event; that of viewer -1 is a proven canary."""
    body = {
        "event_id": canary_at(at) if viewer == -1 else f"w{number}", "viewer_id": viewer,
        "content_id": f"c{number}", "genre": "drama",
        "watch_duration_sec": seconds, "completion_pct": 1, "watched_at": instant(at).isoformat(),
    }  # fmt: skip
    return Message("view_events", "test", 0, number, json.dumps(body).encode(), None, NOW)


def touch(number: int, viewer: int, at: int) -> Message:
    """A valid interaction; that of viewer -1 is a proven canary."""
    body = {
        "event_id": canary_at(at) if viewer == -1 else f"t{number}",
        "viewer_id": viewer,
        "event_type": "like",
        "event_ts": instant(at).isoformat(),
    }
    return Message("content_interactions", "test", 0, number, json.dumps(body).encode(), None, NOW)
