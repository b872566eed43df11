"""Four ways to keep viewer profiles in DynamoDB, on simulated events: what they write, read and weigh.

Run `python benchmarks/profile_models.py [view events]`; it needs no service. Every event is applied as it is
delivered, and each model is charged for the items that this changes. `docs/serving.md` shows the figures.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from dagster_prefs.tools.scenario import SimulationPlan

PLACES = Decimal("0.000001")
LONG, SHORT = timedelta(days=28), timedelta(days=7)
Profile = dict[str, dict[str, Any]]


class Day:
    """What one viewer did on one day."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.completions = 0
        self.contents: set[str] = set()
        self.interactions: Counter[str] = Counter()
        self.last_watched = self.last_interacted = 0


def ratio(part: int, whole: int) -> Decimal:
    return (Decimal(part) / whole).quantize(PLACES, ROUND_HALF_UP)


def profile(days: dict[date, Day], today: date) -> Profile:
    """The viewer's domains with their attributes; a domain without events in the window is absent."""
    window = {day: entry for day, entry in days.items() if day >= today - LONG}
    recent = [entry for day, entry in window.items() if day >= today - SHORT]
    result: Profile = {}
    watched = [entry for entry in window.values() if entry.last_watched]
    if watched:
        genres: Counter[str] = Counter()
        for entry in watched:
            genres.update(entry.seconds)
        views = sum(entry.views.total() for entry in watched)
        seconds = genres.total()
        last = max(entry.last_watched for entry in watched)
        completions = sum(entry.completions for entry in watched)
        result["watch"] = {
            "watch_minutes_7d": ratio(sum(entry.seconds.total() for entry in recent), 60),
            "watch_minutes_28d": ratio(seconds, 60),
            "titles_7d": sum(len(entry.contents) for entry in recent),
            "completions_28d": completions,
            "genres_watched_28d": sum(len(entry.views) for entry in watched),
            "last_event_at": last,
        }
        best = sorted(genres.items(), key=lambda entry: (-entry[1], entry[0]))[:5]
        result["preferences"] = {
            "favorite_genre": best[0][0],
            "favorite_genres": [genre for genre, _ in best],
            "favorite_genre_shares": [ratio(spent, seconds or 1) for _, spent in best],
            "completion_rate_28d": ratio(completions, views),
            "minutes_per_view_28d": ratio(seconds, 60 * views),
            "last_event_at": last,
        }
    interacted = [entry for entry in window.values() if entry.last_interacted]
    if interacted:
        counts: Counter[str] = Counter()
        for entry in interacted:
            counts.update(entry.interactions)
        result["interactions"] = {
            "likes_28d": counts["like"],
            "shares_28d": counts["share"],
            "searches_28d": counts["search"],
            "last_event_at": max(entry.last_interacted for entry in interacted),
        }
    return result


def size(value: Any) -> int:
    """Bytes of an attribute's value, as DynamoDB counts them."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list):
        return 3 + sum(1 + size(element) for element in value)
    if isinstance(value, dict):
        return 3 + sum(1 + len(name.encode()) + size(inner) for name, inner in value.items())
    digits = str(value).replace(".", "").strip("0")
    return (len(digits) + 1) // 2 + 1


def item_bytes(sort_key: str, attributes: dict[str, Any]) -> int:
    keys = len("viewer_id") + 4 + len("domain_key") + len(sort_key)
    return keys + sum(len(name) + size(value) for name, value in attributes.items())


def per_domain(entry: Profile) -> dict[str, dict[str, Any]]:
    return {f"engagement#{name}": attributes for name, attributes in entry.items()}


def wide(entry: Profile) -> dict[str, dict[str, Any]]:
    merged = {
        name if name != "last_event_at" else f"{domain}_last_event_at": value
        for domain, attributes in entry.items()
        for name, value in attributes.items()
    }
    return {"profile": merged} if merged else {}


def per_metric(entry: Profile) -> dict[str, dict[str, Any]]:
    return {
        f"engagement#{domain}#{name}": {"value": value}
        for domain, attributes in entry.items()
        for name, value in attributes.items()
    }


def per_day(days: dict[date, Day], today: date) -> dict[str, dict[str, Any]]:
    items = {}
    for day, entry in days.items():
        if day < today - LONG:
            continue  # its time to live removes it, which costs nothing
        if entry.last_watched:
            items[f"engagement#watch#{day}"] = {
                "seconds": dict(entry.seconds),
                "views": dict(entry.views),
                "completions": entry.completions,
                "titles": len(entry.contents),
                "last_event_at": entry.last_watched,
            }
        if entry.last_interacted:
            items[f"engagement#interactions#{day}"] = {
                **entry.interactions,
                "last_event_at": entry.last_interacted,
            }
    return items


MODELS = ("item per domain", "one wide item", "item per metric", "item per day")


def images(days: dict[date, Day], today: date) -> tuple[dict[str, dict[str, Any]], ...]:
    entry = profile(days, today)
    return per_domain(entry), wide(entry), per_metric(entry), per_day(days, today)


def events(plan: SimulationPlan) -> Iterator[tuple[str, dict[str, Any], datetime]]:
    seen = set()
    for topic, message, at in plan.events():
        if topic not in ("view_events", "content_interactions"):
            continue
        try:
            content = json.loads(message)
            identity = str(content["event_id"]), int(content["viewer_id"])
            if topic == "view_events":
                content["completion_pct"] = float(content["completion_pct"])
                content["watch_duration_sec"] = int(content["watch_duration_sec"])
                valid = content["watch_duration_sec"] >= 0 and 0 <= content["completion_pct"] <= 1
            else:
                valid = content["event_type"] in ("like", "share", "search")
        except (ValueError, KeyError, TypeError):
            continue
        if valid and identity not in seen:
            seen.add(identity)
            yield topic, content, at


def charge(before: dict[str, Any], after: dict[str, Any]) -> tuple[int, int]:
    """Items written or deleted, and write units (1 KiB each, of the larger image)."""
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    units = 0
    for key in changed:
        largest = max(item_bytes(key, image[key]) for image in (before, after) if key in image)
        units += -(-largest // 1024)
    return len(changed), units


def main(view_events: int) -> None:
    plan = SimulationPlan(
        datetime(2026, 3, 1, tzinfo=UTC),
        viewers=max(1, view_events // 40),
        view_events=view_events,
        interactions=view_events // 10,
        shop_events=0,
        items=1,
    )
    viewers: dict[int, dict[date, Day]] = defaultdict(lambda: defaultdict(Day))
    writes = dict.fromkeys(MODELS, 0)
    units = dict.fromkeys(MODELS, 0)
    rollover = dict.fromkeys(MODELS, 0)
    count = 0
    today = (plan.end - timedelta(days=plan.days)).date()
    for topic, content, at in events(plan):
        while at.date() > today:
            for days in viewers.values():
                before, after = images(days, today), images(days, today + timedelta(days=1))
                for model, old, new in zip(MODELS, before, after, strict=True):
                    if model != "item per day":
                        rollover[model] += charge(old, new)[0]
            today += timedelta(days=1)
        days = viewers[int(content["viewer_id"])]
        before = images(days, today)
        entry = days[at.date()]
        moment = int(at.timestamp() * 1000)
        if topic == "view_events":
            genre = content.get("genre") or "unknown"
            entry.seconds[genre] += content["watch_duration_sec"]
            entry.views[genre] += 1
            entry.completions += content["completion_pct"] >= 0.9
            entry.contents.add(content["content_id"])
            entry.last_watched = max(entry.last_watched, moment)
        else:
            entry.interactions[content["event_type"]] += 1
            entry.last_interacted = max(entry.last_interacted, moment)
        count += 1
        for model, old, new in zip(MODELS, before, images(days, today), strict=True):
            changed, charged = charge(old, new)
            writes[model] += changed
            units[model] += charged
    print(f"{count:,} valid events of {len(viewers):,} viewers over {plan.days} days")
    head = ("model", "items written/event", "write units/event", "rollover writes/viewer/day", "items read",
            "KiB read", "read units", "largest item, bytes")  # fmt: skip
    print("| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|")
    last = [images(days, today) for days in viewers.values()]
    for position, model in enumerate(MODELS):
        shown = [entry[position] for entry in last if entry[position]]
        items = sum(map(len, shown)) / len(shown)
        weights = [[item_bytes(key, value) for key, value in entry.items()] for entry in shown]
        read = sum(map(sum, weights)) / len(shown) / 1024
        if model == "item per day":
            # One Query: its items are charged together.
            charged = sum(-(-sum(sizes) // 4096) for sizes in weights) / len(shown) / 2
        else:
            charged = sum(sum(-(-one // 4096) for one in sizes) for sizes in weights) / len(shown) / 2
        per_day_viewer = rollover[model] / len(viewers) / plan.days
        print(
            f"| {model} | {writes[model] / count:.2f} | {units[model] / count:.2f} | {per_day_viewer:.2f} | "
            f"{items:.1f} | {read:.2f} | {charged:.2f} | {max(max(sizes) for sizes in weights):,} |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
