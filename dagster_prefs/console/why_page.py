"""The page Why: one attribute of one id as served, side by side with the value recomputed from tiles and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from dagster_prefs.console.context import Console, Page, Visit
from dagster_prefs.console.frame import Notice, entity_links, row, text
from dagster_prefs.console.picker import Picker
from dagster_prefs.declarations.lineage import load_lineage
from dagster_prefs.declarations.registry import Entity, Registry
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import Id, id_label, read_id
from dagster_prefs.printable import printable
from dagster_prefs.serving.why import Explanation, ViewExplanation, explain_attribute, explain_view

# Rows of a table that are shown; a window has at most as many tiles.
MOST_ROWS = 100


class UnknownAttribute(PrefsError):
    """The address names an attribute that the project does not have."""


def attributes_of(registry: Registry, entity: Entity) -> list[str]:
    """Return the attributes of an entity: those of its items, and the columns of its preference views."""
    found = [
        f"{domain.name}.{name}"
        for domain in registry.contract.domains_of(entity.name)
        for name in domain.attributes
    ]
    return found + [
        f"{view.relation}.{name}"
        for view in registry.preferences.values()
        if view.entity == entity.name
        for name in view.reads
    ]


def shown_entities(registry: Registry) -> list[Entity]:
    """Return the entities that have attributes."""
    return [entity for entity in registry.entities.values() if attributes_of(registry, entity)]


async def build(visit: Visit) -> None:
    """Build the page. The parameter `attribute` names the attribute, the key columns or `entity` name the subject."""
    registry = visit.console.registry
    entities = shown_entities(registry)
    attribute = visit.query.get("attribute")
    entity = next((one for one in entities if one.name == visit.query.get("entity")), None)
    if attribute is not None:
        entity = next((one for one in entities if attribute in attributes_of(registry, one)), None)
        if entity is None:
            raise UnknownAttribute(f"the project has no attribute {attribute}: choose one on the page Why")
    await _WhyPage(visit, entity or entities[0], attribute).show(entities)


class _WhyPage:
    def __init__(self, visit: Visit, entity: Entity, attribute: str | None) -> None:
        self._visit = visit
        self._console = visit.console
        self._entity = entity
        names = attributes_of(visit.console.registry, entity)
        self._names = names
        self._attribute = attribute or names[0]
        self._id: Id | None = None

    async def show(self, entities: Sequence[Entity]) -> None:
        text("h1", "Why")
        text("p", "A value as it is served, and what the tiles and events behind it say.").classes("faint")
        entity_links(WHY.path, entities, self._entity)
        self._notice = Notice()
        guard = self._notice.guard
        ui.select(
            self._names,
            label="Attribute",
            value=self._attribute,
            with_input=True,
            on_change=guard(self._choose),
        ).props("dense outlined").style("width: 100%; max-width: 30rem")
        picker = Picker(self._visit, self._entity, self._pick, self._notice)
        self._found = ui.element("div").props('aria-live="polite"')
        given = [self._visit.query.get(name) for name in self._entity.key_names]
        if all(given):
            await guard(self._pick)(read_id(self._entity.keys, given if len(given) > 1 else given[0]))
        await guard(picker.offer)()

    async def _choose(self, change: Any) -> None:
        self._attribute = str(change.value)
        await self._explain()

    async def _pick(self, id_: Id) -> None:
        self._id = id_
        await self._explain()

    async def _explain(self) -> None:
        id_, attribute = self._id, self._attribute
        if id_ is None:
            return
        self._found.clear()
        if attribute.rpartition(".")[0] in self._console.registry.preferences:
            # Preference views are what the shop knows of a user, so they need the right to the shop.
            self._visit.grant.require("shop")
        found = await self._console.run(explain, self._console, self._entity, id_, attribute)
        if (id_, attribute) != (self._id, self._attribute):
            # The visitor has chosen another id or attribute in the meantime.
            return
        self._found.clear()
        with self._found:
            text("h2", f"{self._entity.name} {printable(id_label(id_), one_line=True)}: {attribute}")
            if isinstance(found, Explanation):
                _show_attribute(found)
            else:
                _show_view(found)
            for relation, rows in found.events.items():
                _table(f"Latest events: {relation}", rows)


def explain(console: Console, entity: Entity, id_: Id, attribute: str) -> Explanation | ViewExplanation:
    """Explain an attribute of an id. Raises WhyError, LineageError, ProfileError, EngineUnavailable."""
    registry, settings = console.registry, console.settings
    if attribute.rpartition(".")[0] in registry.preferences:
        lineage = load_lineage(settings.project, registry)
        return explain_view(console.engine, registry, lineage, id_, attribute)
    return explain_attribute(
        console.engine,
        console.profiles(entity.name),
        id_,
        attribute,
        expiry_spread_seconds=settings.expiry_spread_seconds,
    )


def _show_attribute(found: Explanation) -> None:
    window = (
        "no window" if found.window_days is None else f"{found.window_days} days from {found.window_start}"
    )
    served = {"cold_start": "no item", "failed": found.online_error}.get(found.online_state) or _shown(
        found.online
    )
    recomputed = _shown(found.recomputed) if found.in_view else "no item: no tile in the window"
    with ui.element("div").classes("scrolls"), ui.element("table").props('data-role="values"'):
        row("window", window)
        row("served", served)
        row("recomputed from tiles", recomputed)
    _verdict(found.equal)
    for relation, rows in found.tiles.items():
        _table(f"Tiles: {relation}", rows)


def _show_view(found: ViewExplanation) -> None:
    _table("Served", found.served)
    if found.recomputed is None:
        text("p", f"Not recomputed: {found.reason}.").classes("faint")
        return
    _table("Recomputed from events", found.recomputed)
    _verdict(bool(found.equal))


def _verdict(equal: bool) -> None:
    told = "They are equal." if equal else "They differ."
    text("p", told).classes("good" if equal else "bad").props('data-role="verdict"')


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    text("h2", title)
    if not rows:
        text("p", "none").classes("faint")
        return
    with (
        ui.element("div").classes("scrolls"),
        ui.element("table").props(f'aria-label="{title}"'),
    ):
        row(*rows[0], tag="th")
        for one in rows[:MOST_ROWS]:
            row(*map(_shown, one.values()))
    if len(rows) > MOST_ROWS:
        text("p", f"{len(rows) - MOST_ROWS} more rows").classes("faint")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return printable(value, one_line=True)


WHY = Page("/why", "Why", "domains", build, lambda registry: bool(shown_entities(registry)))
