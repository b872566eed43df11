"""What every relation must hold, computed from the raw messages in plain Python.

It shares the days of the long window with the models, and nothing else: not their weights, not their bounds, not
their formulas. Times are integers, microseconds since 1970 UTC, because a message may name a year that `datetime`
cannot hold.
Money, minutes and ratios are Fraction until they are rounded, half away from zero, to 6 places.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

from shipped import LONG, SHORT

TOPICS = ("user.events", "view_events", "content_interactions", "items")
SECOND = 1_000_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR
WEIGHTS = {"purchase": 10, "wishlist": 7, "add_to_cart": 5, "view": 1}
TIERS = ("budget", "mid-range", "premium", "luxury")
EPOCH_2026 = 1_767_225_600 * SECOND
# The keys of the engine's canaries: deployment → secret.
CANARY_KEYS = {"00c0ffee00c0ffee": "5e" * 32}

Row = dict[str, Any]


def micros(moment: datetime) -> int:
    """A moment as microseconds since 1970 UTC."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@dataclass(frozen=True)
class Message:
    """One row of a raw table; times in microseconds."""

    topic: str
    source: str
    partition: int
    offset: int
    data: bytes
    kafka_timestamp: int | None
    arrived_at: int

    @property
    def position(self) -> tuple[str, int, int]:
        return (self.source, self.partition, self.offset)

    @property
    def is_from_kafka(self) -> bool:
        """Whether a broker delivered it, or it corrects such a message."""
        parts = self.source.split(":")
        return len(parts) > 1 and next(part for part in parts if part != "replay") == "kafka"


@dataclass(frozen=True)
class Erasure:
    """A row of erased_subjects: `kind` is viewer or shop_user, `at` is in microseconds."""

    kind: str
    subject: str
    at: int


@dataclass(frozen=True)
class Parsed:
    """A message after reading: its fields when it is valid, else the reason."""

    message: Message
    reason: str | None
    fields: Row


# --- reading one message ---------------------------------------------------------------------------

_NOTHING = object()


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _number(text: str) -> int | Decimal:
    """A number of JSON, as far as a database holds it."""
    value = Decimal(text)
    exponent = value.as_tuple().exponent
    if value.adjusted() >= 131_072 or (isinstance(exponent, int) and exponent < -16_383):
        raise ValueError(text)
    return int(text) if re.fullmatch("-?[0-9]{1,4000}", text) else value


def _has_impossible_text(value: Any) -> bool:
    """Whether a string in it cannot be stored: U+0000, or half of a surrogate pair."""
    if isinstance(value, str):
        return any(ch == "\x00" or "\ud800" <= ch <= "\udfff" for ch in value)
    if isinstance(value, dict):
        return any(_has_impossible_text(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(_has_impossible_text(part) for part in value)


def read_json(data: bytes) -> Any:
    """The JSON value, or `_NOTHING` where the bytes are not UTF-8 or not JSON."""
    try:
        value = json.loads(
            data.decode("utf-8"), parse_float=_number, parse_int=_number, parse_constant=_refuse_constant
        )
    except (ValueError, ArithmeticError, RecursionError):
        return _NOTHING
    return _NOTHING if _has_impossible_text(value) else value


def shown_number(value: int | Decimal) -> str:
    """A number as digits: no exponent, no zeros at the end of a fraction, no sign of zero."""
    whole, _, fraction = format(Decimal(value), "f").partition(".")
    fraction = fraction.rstrip("0")
    text = f"{whole}.{fraction}" if fraction else whole
    return "0" if text == "-0" else text


def text(document: Mapping[str, Any], name: str) -> str | None:
    """A text trimmed, or a number that names something, as digits; None where absent, empty or of another type."""
    value = document.get(name)
    if isinstance(value, str):
        return value.strip(" \t\r\n") or None
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        return None
    return shown_number(value) if -(2**63) <= value < 2**64 else None


def measure(document: Mapping[str, Any], name: str) -> str | None:
    """A text trimmed, or a number that measures something, as digits."""
    value = document.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        return text(document, name)
    return shown_number(value) if abs(value) < 10**28 else None


def given(document: Mapping[str, Any], name: str) -> bool:
    """Whether a field has any content, good or bad."""
    return document.get(name) is not None and document[name] != ""


def decimal(value: str | None, places: int) -> Decimal | None:
    """A number in at most 28 digits, rounded half up."""
    if value is None:
        return None
    digits = r"-?[0-9]{1,28}"
    if not re.fullmatch(rf"{digits}(\.[0-9]+)?|{digits}(\.[0-9]{{1,255}})?[eE][+-]?[0-9]{{1,3}}", value):
        return None
    exact = Fraction(Decimal(value))
    if abs(exact) >= 10 ** (28 - places):
        return None
    scaled = (abs(exact) * 10**places * 2 + 1) // 2
    return Decimal(-scaled if exact < 0 else scaled).scaleb(-places, Context(prec=60))


def integer(value: str | None, bits: int) -> int | None:
    if value is None or not re.fullmatch(r"-?[0-9]{1,19}(\.0+)?", value):
        return None
    number = int(value.split(".")[0])
    return number if -(2 ** (bits - 1)) <= number < 2 ** (bits - 1) else None


_ISO = re.compile(
    r"([0-9]{4})-([01][0-9])-([0-3][0-9])[Tt ]([01][0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9])(?:\.([0-9]+))?)?"
    r"(?: ?([Zz]|[Uu][Tt][Cc]|([+-])([0-9]{2})(?::?([0-5][0-9]))?))?"
)
YEAR_2000, YEAR_2101 = 946_684_800, 4_133_980_800
IMPLAUSIBLE = -1


def moment(value: str | None) -> int | None:
    """A time as microseconds; None for what is none, IMPLAUSIBLE for one outside the years 2000 to 2100."""
    if value is None:
        return None
    if re.fullmatch(r"-?[0-9]{1,28}(\.[0-9]+)?", value):
        for per_second in (1, 1_000, 1_000_000, 1_000_000_000):
            seconds = Fraction(Decimal(value)) / per_second
            if YEAR_2000 <= seconds < YEAR_2101:
                return int(seconds * SECOND)
        return IMPLAUSIBLE
    found = _ISO.fullmatch(value)
    if not found:
        return None
    year, month, day, hour, minute, second, fraction, _, sign, off_hours, off_minutes = found.groups()
    if off_hours and int(off_hours) > 15:
        return None
    if not 1999 <= int(year) <= 2101:
        return IMPLAUSIBLE
    try:
        base = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second or 0), tzinfo=UTC)
    except ValueError:
        return None
    offset = (int(off_hours or 0) * 60 + int(off_minutes or 0)) * 60 * SECOND
    at = micros(base) + int((fraction or "0")[:6].ljust(6, "0")) - (-offset if sign == "-" else offset)
    return at if YEAR_2000 * SECOND <= at < YEAR_2101 * SECOND else IMPLAUSIBLE


def shown(data: bytes) -> str:
    """A payload for people: the text, or the bytes with everything unprintable as octal."""
    try:
        decoded = data.decode("utf-8")
        if "\x00" not in decoded:
            return decoded
    except UnicodeDecodeError:
        pass
    return "".join(
        f"\\{byte:03o}" if byte == 0 or byte > 127 else "\\\\" if byte == 0x5C else chr(byte) for byte in data
    )


def _common(document: Any, fields: Row, keys: Sequence[str]) -> str | None:
    for name in keys:
        if fields[name] is None:
            return f"bad {name}" if given(document, name) else f"missing {name}"
        if reason := _too_long(fields, name):
            return reason
    return None


def _too_long(fields: Row, name: str) -> str | None:
    limit = 256 if name.endswith("_id") else 1024
    size = len(fields[name].encode()) if isinstance(fields[name], str) else 0
    return f"{name} has {size} bytes, at most {limit}" if size > limit else None


def _wrong_text(document: Row, fields: Row, names: Sequence[str]) -> str | None:
    for name in names:
        if fields[name] is None and document.get(name) is not None and not isinstance(document[name], str):
            return f"bad {name}"
        if reason := _too_long(fields, name):
            return reason
    return None


def parse(message: Message) -> Parsed:
    """Read one message of any topic and judge it."""
    size = len(message.data)
    if size > 1_048_576:
        return Parsed(message, f"message has {size} bytes, at most 1048576", {})
    value = read_json(message.data)
    if value is _NOTHING:
        return Parsed(message, "not valid JSON", {})
    if not isinstance(value, dict):
        return Parsed(message, "not a JSON object", {})
    identity = "item_id" if message.topic == "items" else "event_id"
    if (value.get("erased") is True or value.get("erased") == "true") and text(value, identity) is None:
        return Parsed(message, "erased", {})
    fields, reason = _READERS[message.topic](value, message)
    return Parsed(message, reason, {} if reason else fields)


def canary_id(deployment: str, secret: str, milliseconds: int) -> str:
    """The event id of a canary: a digest of the secret, and of a digest of the secret and the time."""
    inner = hashlib.sha256((secret + str(milliseconds)).encode()).hexdigest()
    outer = hashlib.sha256((secret + inner).encode()).hexdigest()
    return f"canary:{deployment}:{milliseconds}:{outer[:32]}"


def _reserved(subject: str, fields: Row, time: str) -> str | None:
    """Why an event with an id of canaries is rejected."""
    who, identity = fields[subject], fields["event_id"]
    if subject == "viewer_id":
        mine, probe = who < 0, who == -1
    else:
        mine, probe = who[:7] == "canary:", who == "canary:prefs"
    named = re.fullmatch(r"canary:([0-9a-f]{16}):[0-9]{1,19}:[0-9a-f]{32}", identity)
    if probe and named:
        secret = CANARY_KEYS.get(named[1])
        if secret is None:
            return "canary of another deployment"
        proven = identity == canary_id(named[1], secret, millis(fields[time]))
        return None if proven else f"reserved {subject}"
    if mine:
        return f"reserved {subject}"
    return "reserved event_id" if identity[:7] == "canary:" else None


def _wrong_time(message: Message, at: int) -> str | None:
    if at == IMPLAUSIBLE:
        return "implausible time"
    base = message.arrived_at if message.kafka_timestamp is None else message.kafka_timestamp
    return "event time in the future" if at > base + DAY else None


def _user_event(doc: Row, message: Message) -> tuple[Row, str | None]:
    names = ("event_id", "user_id", "item_id", "brand", "category", "event_type", "session_id")
    fields: Row = {name: text(doc, name) for name in names}
    fields["price"] = decimal(measure(doc, "price"), 6)
    fields["event_time"] = moment(measure(doc, "event_time"))
    reason = _common(doc, fields, ("event_id", "user_id", "event_time"))
    if reason is None:
        reason = _wrong_time(message, fields["event_time"])
    if reason is None and not given(doc, "event_type"):
        reason = "missing event_type"
    if reason is None and fields["event_type"] not in WEIGHTS:
        reason = "unknown event_type"
    reason = reason or _wrong_text(doc, fields, ("item_id", "category", "brand"))
    reason = reason or _wrong_price(doc, fields) or _wrong_text(doc, fields, ("session_id",))
    reason = reason or _reserved("user_id", fields, "event_time")
    return fields, reason


def _wrong_price(doc: Row, fields: Row) -> str | None:
    price = fields["price"]
    if price is None:
        return "bad price" if given(doc, "price") else None
    return "negative price" if price < 0 else None


def _view_event(doc: Row, message: Message) -> tuple[Row, str | None]:
    fields: Row = {
        "event_id": text(doc, "event_id"),
        "viewer_id": integer(text(doc, "viewer_id"), 64),
        "content_id": text(doc, "content_id"),
        "genre": text(doc, "genre"),
        "watch_duration_sec": integer(text(doc, "watch_duration_sec"), 32),
        "completion_pct": decimal(measure(doc, "completion_pct"), 9),
        "watched_at": moment(measure(doc, "watched_at")),
    }
    reason = _common(doc, fields, ("event_id", "viewer_id", "watched_at"))
    if reason is None:
        reason = _wrong_time(message, fields["watched_at"]) or _wrong_text(
            doc, fields, ("content_id", "genre")
        )
    if reason is None:
        seconds, completion = fields["watch_duration_sec"], fields["completion_pct"]
        if seconds is None and given(doc, "watch_duration_sec"):
            reason = "bad watch_duration_sec"
        elif seconds is not None and seconds < 0:
            reason = "negative watch_duration_sec"
        elif completion is None and given(doc, "completion_pct"):
            reason = "bad completion_pct"
        elif completion is not None and not 0 <= completion <= 1:
            reason = "completion_pct outside 0..1"
        else:
            reason = _reserved("viewer_id", fields, "watched_at")
    return fields, reason


def _interaction(doc: Row, message: Message) -> tuple[Row, str | None]:
    fields: Row = {
        "event_id": text(doc, "event_id"),
        "viewer_id": integer(text(doc, "viewer_id"), 64),
        "event_type": text(doc, "event_type"),
        "event_ts": moment(measure(doc, "event_ts")),
    }
    reason = _common(doc, fields, ("event_id", "viewer_id", "event_ts"))
    if reason is None:
        reason = _wrong_time(message, fields["event_ts"])
    if reason is None:
        if not given(doc, "event_type"):
            reason = "missing event_type"
        elif fields["event_type"] not in ("like", "share", "search"):
            reason = "unknown event_type"
        else:
            reason = _reserved("viewer_id", fields, "event_ts")
    return fields, reason


def _item(doc: Row, message: Message) -> tuple[Row, str | None]:
    fields: Row = {name: text(doc, name) for name in ("item_id", "title", "category", "brand")}
    fields["price"] = decimal(measure(doc, "price"), 6)
    stock = {"true": True, "1": True, "false": False, "0": False}
    said = doc.get("in_stock")
    spelled = str(said).lower() if isinstance(said, bool) else (text(doc, "in_stock") or "").lower()
    fields["in_stock"] = stock.get(spelled, True)
    reason = _common(doc, fields, ("item_id",)) or _wrong_text(doc, fields, ("title", "category", "brand"))
    reason = reason or _wrong_price(doc, fields)
    if reason is None and given(doc, "in_stock") and spelled not in stock:
        reason = "bad in_stock"
    return fields, reason


_READERS = {
    "user.events": _user_event,
    "view_events": _view_event,
    "content_interactions": _interaction,
    "items": _item,
}


# --- arithmetic ------------------------------------------------------------------------------------


def six_places(value: Fraction) -> Decimal:
    """Rounded to 6 places, half away from zero."""
    scaled = abs(value) * 1_000_000
    whole = (scaled.numerator * 2 + scaled.denominator) // (2 * scaled.denominator)
    return Decimal(-whole if value < 0 else whole).scaleb(-6, Context(prec=60))


def ratio(numerator: int, denominator: int) -> Decimal | None:
    return six_places(Fraction(numerator, denominator)) if denominator else None


def day_of(at: int) -> date:
    return date(1970, 1, 1) + timedelta(days=at // DAY)


def level_of(price: Decimal) -> int:
    return 0 if price < 25 else 1 if price < 100 else 2 if price < 500 else 3


def two_to(half_lives: Fraction) -> Decimal:
    with localcontext(Context(prec=50)):
        return Decimal(2) ** (Decimal(half_lives.numerator) / Decimal(half_lives.denominator))


def half_lives_since_2026(at: int) -> Fraction:
    # A float holds 2^±1000 safely; what is 80 years off weighs nothing and must not break the view.
    return max(Fraction(-1000), min(Fraction(1000), Fraction(at - EPOCH_2026, 30 * DAY)))


def millis(at: int) -> int:
    """Milliseconds, half away from zero."""
    return at // 1000 + (1 if at % 1000 >= 500 else 0) if at >= 0 else -millis(-at)


# --- all relations ---------------------------------------------------------------------------------


class Oracle:
    """Every relation over the given messages at the given clock (microseconds)."""

    def __init__(
        self, messages: Iterable[Message], clock: int, spread: int = 0, erased: Sequence[Erasure] = ()
    ) -> None:
        self.messages = list(messages)
        self.clock = clock
        self.spread = spread
        self.erased = {(erasure.kind, erasure.subject): erasure.at for erasure in erased}
        self.parsed = [parse(message) for message in self.messages]
        self.duplicates: Counter[str] = Counter()
        self.suppressed: Counter[str] = Counter()
        self.shop = self._typed("user.events", "shop_user", "user_id", "event_time")
        self.watch = self._typed("view_events", "viewer", "viewer_id", "watched_at")
        self.touch = self._typed("content_interactions", "viewer", "viewer_id", "event_ts")

    def _typed(self, topic: str, kind: str, key: str, time: str) -> list[Row]:
        valid = [p for p in self.parsed if p.message.topic == topic and p.reason is None]
        valid.sort(key=lambda p: (p.message.arrived_at, p.message.position))
        seen: dict[str, Row] = {}
        for p in valid:
            at = self.erased.get((kind, str(p.fields[key])))
            if at is not None and p.fields[time] <= at:
                self.suppressed[topic] += 1
            elif p.fields["event_id"] in seen:
                self.duplicates[topic] += 1
            else:
                seen[p.fields["event_id"]] = p.fields
        return list(seen.values())

    def relations(self) -> dict[str, list[Row]]:
        """Relation name → its rows."""
        return {
            "user_events": self.shop,
            "view_events": self.watch,
            "content_interactions": self.touch,
            "items": self.items(),
            "rejected_events": self.rejected(),
            "user_category_profile": self.category_profile(),
            "user_brand_profile": self.brand_profile(),
            "user_price_sensitivity": self.price_sensitivity(),
            "user_recent_activity": self.recent_activity(),
            "user_category_affinity_decayed": self.decayed(),
            "user_category_affinity_now": self.affinity_now(),
            "category_cross_affinity": self.cross_affinity(),
            "category_cross_affinity_lift": self.lift(),
            "user_price_tier_drift": self.drift(),
            "user_recent_sequence": self.user_sequence(),
            "viewer_watch_metrics_1d": self.watch_tiles(),
            "viewer_genre_metrics_1d": self.genre_tiles(),
            "viewer_interactions_1d": self.interaction_tiles(),
            "viewer_engagement_rolling": self.engagement(),
            "content_interactions_rolling": self.interactions(),
            "viewer_preferences_rolling": self.preferences(),
            "viewer_recent_sequence": self.viewer_sequence(),
            "ingest_progress": self.progress(),
            "tile_fingerprints": self.fingerprints(),
        }

    def items(self) -> list[Row]:
        valid = [p for p in self.parsed if p.message.topic == "items" and p.reason is None]
        valid.sort(key=lambda p: (p.message.is_from_kafka, p.message.arrived_at, p.message.position))
        return list({p.fields["item_id"]: p.fields for p in valid}.values())

    def rejected(self) -> list[Row]:
        return [
            {
                "topic": p.message.topic,
                "source": p.message.source,
                "partition": p.message.partition,
                "offset": p.message.offset,
                "reason": p.reason,
                "payload": shown(p.message.data[:1_048_576]),
            }
            for p in self.parsed
            if p.reason is not None
        ]

    # preferences

    def _by(self, *names: str) -> dict[tuple[Any, ...], list[Row]]:
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for event in self.shop:
            if all(event[name] is not None for name in names):
                groups[tuple(event[name] for name in names)].append(event)
        return groups

    def category_profile(self) -> list[Row]:
        return [
            {
                "user_id": user,
                "category": category,
                "affinity_score": sum(WEIGHTS[e["event_type"]] for e in events),
                "unique_items_interacted": len({e["item_id"] for e in events} - {None}),
                "last_engaged_at": max(e["event_time"] for e in events),
            }
            for (user, category), events in self._by("user_id", "category").items()
        ]

    def brand_profile(self) -> list[Row]:
        return [
            {
                "user_id": user,
                "brand": brand,
                "brand_affinity": sum(WEIGHTS[e["event_type"]] for e in events),
                "purchase_count": sum(e["event_type"] == "purchase" for e in events),
                "last_brand_interaction": max(e["event_time"] for e in events),
            }
            for (user, brand), events in self._by("user_id", "brand").items()
        ]

    def price_sensitivity(self) -> list[Row]:
        groups: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for event in self.shop:
            if event["price"] is not None:
                groups[event["user_id"], TIERS[level_of(event["price"])]][event["event_type"]] += 1
        return [
            {
                "user_id": user,
                "price_tier": tier,
                "views": kinds["view"],
                "purchases": kinds["purchase"],
                "conversion_rate": ratio(kinds["purchase"], kinds["view"]),
            }
            for (user, tier), kinds in groups.items()
        ]

    def recent_activity(self) -> list[Row]:
        groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
        for event in self.shop:
            if event["category"] is not None:
                start = event["event_time"] // HOUR * HOUR
                groups[event["user_id"], event["category"], start].append(event["event_time"])
        return [
            {
                "user_id": user,
                "category": category,
                "recent_interactions": len(times),
                "window_start": start,
                "window_end": start + HOUR,
                "first_event_at": min(times),
                "last_event_at": max(times),
            }
            for (user, category, start), times in groups.items()
        ]

    def _decayed_sums(self) -> dict[tuple[Any, ...], Decimal]:
        with localcontext(Context(prec=50)):
            return {
                key: sum(
                    (
                        WEIGHTS[e["event_type"]] * two_to(half_lives_since_2026(e["event_time"]))
                        for e in events
                    ),
                    Decimal(0),
                )
                for key, events in self._by("user_id", "category").items()
            }

    def decayed(self) -> list[Row]:
        latest = {
            key: max(e["event_time"] for e in rows) for key, rows in self._by("user_id", "category").items()
        }
        return [
            {
                "user_id": key[0],
                "category": key[1],
                "decayed_weight": float(value),
                "last_engaged_at": latest[key],
            }
            for key, value in self._decayed_sums().items()
        ]

    def affinity_now(self) -> list[Row]:
        latest = {row["user_id"] + "\n" + row["category"]: row["last_engaged_at"] for row in self.decayed()}
        with localcontext(Context(prec=50)):
            now = two_to(half_lives_since_2026(self.clock))
            return [
                {
                    "user_id": user,
                    "category": category,
                    "affinity_score": float(value / now),
                    "last_engaged_at": latest[user + "\n" + category],
                }
                for (user, category), value in self._decayed_sums().items()
            ]

    def _purchases(self) -> list[Row]:
        return [e for e in self.shop if e["event_type"] == "purchase" and e["user_id"][:7] != "canary:"]

    def _buyers(self) -> dict[str, set[str]]:
        buyers: dict[str, set[str]] = defaultdict(set)
        for event in self._purchases():
            if event["category"] is not None:
                buyers[event["category"]].add(event["user_id"])
        return buyers

    def cross_affinity(self) -> list[Row]:
        buyers = self._buyers()
        return [
            {
                "category": a,
                "related_category": b,
                "pair_buyers": len(buyers[a] & buyers[b]),
                "buyers": len(buyers[a]),
                "related_buyers": len(buyers[b]),
                "confidence": ratio(len(buyers[a] & buyers[b]), len(buyers[a])),
            }
            for a in buyers
            for b in buyers
            if a != b and buyers[a] & buyers[b]
        ]

    def lift(self) -> list[Row]:
        everybody = len({event["user_id"] for event in self._purchases()})
        return [
            {
                **row,
                "support": ratio(row["pair_buyers"], everybody),
                "lift": ratio(row["pair_buyers"] * everybody, row["buyers"] * row["related_buyers"]),
            }
            for row in self.cross_affinity()
        ]

    def drift(self) -> list[Row]:
        recent_from, baseline_from = self.clock - 14 * DAY, self.clock - 104 * DAY
        sides: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for event in self.shop:
            if event["event_type"] == "view" and event["price"] is not None:
                if event["event_time"] >= recent_from:
                    sides[event["user_id"]][1].append(level_of(event["price"]))
                elif event["event_time"] >= baseline_from:
                    sides[event["user_id"]][0].append(level_of(event["price"]))
        rows = []
        for user, (baseline, recent) in sides.items():
            before, after = ratio(sum(baseline), len(baseline)), ratio(sum(recent), len(recent))
            change = None if before is None or after is None else after - before
            enough = len(baseline) >= 5 and len(recent) >= 5 and change is not None
            rows.append(
                {
                    "user_id": user,
                    "baseline_tier": _nearest_tier(before),
                    "recent_tier": _nearest_tier(after),
                    "baseline_level": before,
                    "recent_level": after,
                    "drift": change,
                    "direction": "none"
                    if not enough or change is None or abs(change) < Decimal("0.5")
                    else ("up" if change > 0 else "down"),
                }
            )
        return rows

    def user_sequence(self) -> list[Row]:
        return [
            {
                "user_id": user,
                "recent_item_ids": [event["item_id"] for event in last],
                "recent_event_types": [event["event_type"] for event in last],
                "recent_event_times": [millis(event["event_time"]) for event in last],
                "last_event_at": max(event["event_time"] for event in last),
            }
            for user, last in self._last_events(self.shop, "user_id", "event_time").items()
        ]

    def _last_events(self, events: list[Row], key: str, time: str) -> dict[Any, list[Row]]:
        """The last 50 events of each key in the long window, newest first, ties by event_id."""
        inside: dict[Any, list[Row]] = defaultdict(list)
        for event in events:
            if day_of(event[time]) >= self._today(event[key]) - timedelta(days=LONG):
                inside[event[key]].append(event)
        return {
            one: sorted(found, key=lambda event: (-event[time], event["event_id"]))[:50]
            for one, found in inside.items()
        }

    def _today(self, key: Any) -> date:
        """The day on which the window of a key ends at the clock."""
        late = 0
        if self.spread:
            hashed = int(hashlib.md5(str(key).encode(), usedforsecurity=False).hexdigest()[:15], 16)
            late = (abs(key) if isinstance(key, int) else hashed) % self.spread * SECOND
        return day_of(self.clock - late)

    # engagement

    def viewer_sequence(self) -> list[Row]:
        return [
            {
                "viewer_id": viewer,
                "domain_key": "engagement#sequence",
                "recent_content_ids": [event["content_id"] for event in last],
                "recent_watched_at": [millis(event["watched_at"]) for event in last],
                "recent_completions": [event["completion_pct"] for event in last],
                "last_event_at": millis(max(event["watched_at"] for event in last)),
            }
            for viewer, last in self._last_events(self.watch, "viewer_id", "watched_at").items()
        ]

    def _tiles(self) -> dict[tuple[int, date], list[Row]]:
        tiles: dict[tuple[int, date], list[Row]] = defaultdict(list)
        for event in self.watch:
            tiles[event["viewer_id"], day_of(event["watched_at"])].append(event)
        return tiles

    def watch_tiles(self) -> list[Row]:
        rows = []
        for (viewer, day), events in self._tiles().items():
            seconds = sum(e["watch_duration_sec"] or 0 for e in events)
            rows.append(
                {
                    "viewer_id": viewer,
                    "watch_date": day,
                    "watch_seconds": seconds,
                    "watch_time_minutes": six_places(Fraction(seconds, 60)),
                    "views": len(events),
                    "content_started": len({e["content_id"] for e in events} - {None}),
                    "completions": _completions(events),
                    "genres_watched": len({e["genre"] for e in events} - {None}),
                    "last_event_at": max(e["watched_at"] for e in events),
                }
            )
        return rows

    def genre_tiles(self) -> list[Row]:
        groups: dict[tuple[int, date, str], list[Row]] = defaultdict(list)
        for (viewer, day), events in self._tiles().items():
            for event in events:
                if event["genre"] is not None:
                    groups[viewer, day, event["genre"]].append(event)
        return [
            {
                "viewer_id": viewer,
                "watch_date": day,
                "genre": genre,
                "watch_seconds": sum(e["watch_duration_sec"] or 0 for e in events),
                "views": len(events),
                "completions": _completions(events),
                "last_event_at": max(e["watched_at"] for e in events),
            }
            for (viewer, day, genre), events in groups.items()
        ]

    def interaction_tiles(self) -> list[Row]:
        groups: dict[tuple[int, date], list[Row]] = defaultdict(list)
        for event in self.touch:
            groups[event["viewer_id"], day_of(event["event_ts"])].append(event)
        return [
            {
                "viewer_id": viewer,
                "interaction_date": day,
                "likes": sum(e["event_type"] == "like" for e in events),
                "shares": sum(e["event_type"] == "share" for e in events),
                "searches": sum(e["event_type"] == "search" for e in events),
                "last_event_at": max(e["event_ts"] for e in events),
            }
            for (viewer, day), events in groups.items()
        ]

    def _window(self, tiles: list[Row], day: str, days: int) -> dict[int, list[Row]]:
        inside: dict[int, list[Row]] = defaultdict(list)
        for tile in tiles:
            if tile[day] >= self._today(tile["viewer_id"]) - timedelta(days=days):
                inside[tile["viewer_id"]].append(tile)
        return inside

    def engagement(self) -> list[Row]:
        tiles = self.watch_tiles()
        short = self._window(tiles, "watch_date", SHORT)
        return [
            {
                "viewer_id": viewer,
                "domain_key": "engagement#watch",
                f"watch_minutes_{SHORT}d": six_places(
                    Fraction(_total(short.get(viewer, []), "watch_seconds"), 60)
                ),
                f"watch_minutes_{LONG}d": six_places(Fraction(_total(days, "watch_seconds"), 60)),
                f"titles_{SHORT}d": _total(short.get(viewer, []), "content_started"),
                f"completions_{LONG}d": _total(days, "completions"),
                f"genres_watched_{LONG}d": _total(days, "genres_watched"),
                "last_event_at": millis(max(t["last_event_at"] for t in days)),
            }
            for viewer, days in self._window(tiles, "watch_date", LONG).items()
        ]

    def interactions(self) -> list[Row]:
        return [
            {
                "viewer_id": viewer,
                "domain_key": "engagement#interactions",
                f"likes_{LONG}d": _total(days, "likes"),
                f"shares_{LONG}d": _total(days, "shares"),
                f"searches_{LONG}d": _total(days, "searches"),
                "last_event_at": millis(max(t["last_event_at"] for t in days)),
            }
            for viewer, days in self._window(self.interaction_tiles(), "interaction_date", LONG).items()
        ]

    def preferences(self) -> list[Row]:
        rows = []
        for viewer, tiles in self._window(self.genre_tiles(), "watch_date", LONG).items():
            seconds: Counter[str] = Counter()
            for tile in tiles:
                seconds[tile["genre"]] += tile["watch_seconds"]
            total, views = sum(seconds.values()), _total(tiles, "views")
            top = sorted(seconds, key=lambda genre: (-seconds[genre], genre))[:5]
            rows.append(
                {
                    "viewer_id": viewer,
                    "domain_key": "engagement#preferences",
                    "favorite_genre": top[0],
                    "favorite_genres": top,
                    "favorite_genre_shares": [ratio(seconds[g], total) or Decimal(0) for g in top],
                    f"completion_rate_{LONG}d": ratio(_total(tiles, "completions"), views),
                    f"minutes_per_view_{LONG}d": ratio(total, 60 * views),
                    "last_event_at": millis(max(t["last_event_at"] for t in tiles)),
                }
            )
        return rows

    # operations

    def progress(self) -> list[Row]:
        groups: dict[tuple[str, str, int], list[Message]] = defaultdict(list)
        for message in self.messages:
            groups[message.topic, message.source, message.partition].append(message)
        return [
            {
                "topic": topic,
                "source": source,
                "source_partition": partition,
                "last_offset": max(m.offset for m in messages),
                "messages": len(messages),
                "last_kafka_timestamp": max(
                    (m.kafka_timestamp for m in messages if m.kafka_timestamp is not None), default=None
                ),
                "last_arrived_at": max(m.arrived_at for m in messages),
            }
            for (topic, source, partition), messages in groups.items()
        ]

    def fingerprints(self) -> list[Row]:
        """Without content_hash, whose value is the implementation's own."""
        rows = []
        for name, day, metrics, tiles in (
            ("viewer_watch_metrics_1d", "watch_date", ("watch_seconds",), self.watch_tiles()),
            ("viewer_genre_metrics_1d", "watch_date", ("watch_seconds",), self.genre_tiles()),
            (
                "viewer_interactions_1d",
                "interaction_date",
                ("likes", "shares", "searches"),
                self.interaction_tiles(),
            ),
        ):
            groups: dict[date, list[Row]] = defaultdict(list)
            for tile in tiles:
                if tile["viewer_id"] >= 0:
                    groups[tile[day]].append(tile)
            rows += [
                {
                    "tile": name,
                    "tile_date": tile_date,
                    "row_count": len(members),
                    "metric_total": sum(member[metric] for member in members for metric in metrics),
                    "last_event_at": max(member["last_event_at"] for member in members),
                }
                for tile_date, members in groups.items()
            ]
        return rows


def _nearest_tier(level: Decimal | None) -> str | None:
    return None if level is None else TIERS[int(level.quantize(Decimal(1), ROUND_HALF_UP))]


def _completions(events: list[Row]) -> int:
    return sum(e["completion_pct"] is not None and e["completion_pct"] >= Decimal("0.9") for e in events)


def _total(rows: list[Row], name: str) -> int:
    return sum(row[name] for row in rows)
