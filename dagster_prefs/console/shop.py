"""The shop of a project that ranks items: the events that a click sends, and the reason for an item's place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dagster_prefs.declarations.registry import Entity, FieldDeclaration, Registry, TopicDeclaration
from dagster_prefs.errors import PrefsError
from dagster_prefs.serving.preferences import ITEMS, RankedItem, Ranking, ranked_entity

# The parts of a score, in the order in which they are shown.
PARTS = ("category", "brand", "tier", "session")


class NoShop(PrefsError):
    """The project declares no events that a click on an item could send."""


@dataclass(frozen=True)
class Shop:
    """A project's shop: the entity that items are ranked for, and the topic of its actions on items.

    `kind` is the field of the action; its accepted values are the actions. `shared` are the fields that an event
    copies from its item.
    """

    entity: Entity
    topic: TopicDeclaration
    kind: FieldDeclaration
    shared: tuple[str, ...]

    @property
    def actions(self) -> tuple[str, ...]:
        """The declared actions of a user on an item."""
        return self.kind.accepted

    def values(self, action: str, item: RankedItem, session: str) -> dict[str, Any]:
        """Return the values of an event's fields, but for those that `compose_event` knows."""
        about = item.as_dict()
        found: dict[str, Any] = {name: about[name] for name in self.shared}
        found[self.kind.name] = action
        known = {*found, self.topic.identity, self.topic.time, self.entity.key.name}
        # Any other field can only describe the visit.
        texts = [field for field in self.topic.fields if field.name not in known and field.type == "text"]
        return {**found, **{field.name: session for field in texts}}


def shop_of(registry: Registry) -> Shop | None:
    """Return the shop of a project, None if it ranks nothing, or has no topic of actions on items."""
    entity = ranked_entity(registry)
    items = next((topic for topic in registry.topics.values() if topic.relation == ITEMS), None)
    if entity is None or items is None:
        return None
    of_items = set(items.by_name) & set(RankedItem.__dataclass_fields__)
    for topic in registry.topics.values():
        kinds = [field for field in topic.fields if field.accepted]
        if topic.entity == entity.name and items.identity in topic.by_name and len(kinds) == 1:
            shared = tuple(field.name for field in topic.fields if field.name in of_items)
            return Shop(entity, topic, kinds[0], shared)
    return None


def has_shop(registry: Registry) -> bool:
    """Return whether a project ranks items for somebody."""
    return ranked_entity(registry) is not None


def score_parts(item: RankedItem, ranking: Ranking) -> dict[str, Decimal]:
    """Return what each part adds to an item's score; their sum is the score. The ranking must be explained."""
    if item.components is None:
        raise ValueError("the ranking was not asked to explain")
    weights, parts = ranking.parameters, item.components
    lifetime = weights.lifetime if ranking.session_active else Decimal(1)
    return {
        "category": lifetime * weights.category * parts.category_affinity,
        "brand": lifetime * weights.brand * parts.brand_affinity,
        "tier": lifetime * weights.price_tier * 100 * parts.conversion_rate,
        "session": weights.session * parts.session_interactions if ranking.session_active else Decimal(0),
    }


def reason(item: RankedItem, parts: Mapping[str, Decimal]) -> str:
    """Explain the score of an item: its parts, largest first, and what each is based on."""
    about = {
        "category": item.category,
        "brand": item.brand,
        "tier": item.price_tier,
        "session": item.category,
    }
    told = [
        f"{name} {about[name]} {value:.2f}".replace(" None", "")
        for name, value in sorted(parts.items(), key=lambda part: -part[1])
        if value
    ]
    return " · ".join(told) if told else "nothing is known of this user yet: by item"


def moves(before: Ranking | None, after: Ranking) -> dict[str, int]:
    """Return by how many places each item rose since an earlier ranking; those that were not in it are absent."""
    places = {} if before is None else {item.item_id: place for place, item in enumerate(before)}
    return {
        item.item_id: places[item.item_id] - place
        for place, item in enumerate(after)
        if item.item_id in places
    }
