"""The page Viewers: the items of one id, events about it, and the way of each event to the items."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from nicegui import ui

from dagster_prefs.console.context import Page, Visit
from dagster_prefs.console.events import asked_fields, topics_about
from dagster_prefs.console.frame import Notice, entity_links, row, text
from dagster_prefs.console.picker import Picker
from dagster_prefs.console.way import Values, Way, age_seconds, domain_values, follow_trail
from dagster_prefs.declarations.masking import masked_row
from dagster_prefs.declarations.registry import Entity, FieldDeclaration, Registry, TopicDeclaration
from dagster_prefs.freshness.status import duration
from dagster_prefs.ids import Id, id_label, read_id
from dagster_prefs.printable import printable

if TYPE_CHECKING:
    from dagster_prefs.serving.profiles import Profile

# Interval at which the items are read: while an event is on its way, and otherwise, seconds.
SOON_SECONDS, IDLE_SECONDS = 0.1, 2.0
# Time for which a changed item is highlighted, seconds.
CHANGED_SECONDS = 10.0
INPUT_TYPES = {"int": "number", "bigint": "number", "decimal": "number"}


def shown_entities(registry: Registry) -> list[Entity]:
    """Return the entities that have items, and a topic whose events name their ids."""
    return [
        entity
        for entity in registry.entities.values()
        if entity.table is not None and topics_about(registry, entity)
    ]


async def build(visit: Visit) -> None:
    """Build the page; the parameter `entity` names the entity, and its key columns an id."""
    entities = shown_entities(visit.console.registry)
    entity = next((one for one in entities if one.name == visit.query.get("entity")), entities[0])
    await _ViewersPage(visit, entity).show(entities)


class _ItemBox:
    """The item of one domain: its values, its age, and whether it has just changed."""

    def __init__(self, name: str, key: str) -> None:
        with ui.element("section").classes("box").props(f'aria-label="{name}"'):
            with ui.element("div").classes("line"):
                text("h2", name).style("margin: 0")
                text("span", key).classes("faint")
                ui.space()
                self.changed = text("span", "").classes("good")
            self.state = text("div", "").classes("faint")
            self.rows = ui.element("div").classes("scrolls")
        self._values: Values | None = None
        self._changed_at: float | None = None
        self._cells: dict[str, Any] = {}

    def show(
        self,
        values: Values | None,
        state: str,
        problem: str | None,
        *,
        first: bool,
        masked: Callable[[Values], Values],
    ) -> None:
        """Show an item and store when it changed; the `first` read of an id is no change."""
        if values != self._values:
            if not first:
                self._changed_at = time.monotonic()
            self._fill(values or {}, masked)
            self._values = values
        age = age_seconds(values, datetime.now(UTC))
        told = "no item: what a service gets for anybody new" if state == "cold_start" else "item"
        self.state.set_text(problem or (told if age is None else f"{told}, newest event {duration(age)} ago"))
        since = None if self._changed_at is None or first else time.monotonic() - self._changed_at
        self.changed.set_text(
            "" if since is None or since > CHANGED_SECONDS else f"changed {since:.0f} s ago"
        )

    def _fill(self, values: Values, masked: Callable[[Values], Values]) -> None:
        before = self._values or {}
        if values.keys() != self._cells.keys():
            self.rows.clear()
            with self.rows, ui.element("table"):
                self._cells = {name: row(name, "")[1] for name in values}
        told = masked(values)
        for name, cell in self._cells.items():
            cell.set_text(shown(told[name]))
            cell.classes(replace="good" if before and before.get(name) != values[name] else "")


class _ViewersPage:
    def __init__(self, visit: Visit, entity: Entity) -> None:
        self._visit = visit
        self._console = visit.console
        self._entity = entity
        self._id: Id | None = None
        self._profile: Profile | None = None
        self._way: Way | None = None
        self._next = 0.0
        self._boxes: dict[str, _ItemBox] = {}
        self._inputs: dict[str, Any] = {}

    async def show(self, entities: list[Entity]) -> None:
        refusal = await self._visit.sending_refusal()
        text("h1", "Viewers")
        text("p", f"The items of one {self._entity.name} in DynamoDB, as a service reads them.").classes(
            "faint"
        )
        entity_links(VIEWERS.path, entities, self._entity)
        # What a timer reads well must not take away what a click was told.
        self._notice, self._reading = Notice(), Notice()
        picker = Picker(self._visit, self._entity, self._pick, self._notice)
        self._who = text("h2", "")
        with ui.element("div").classes("cards"):
            for domain in self._console.registry.contract.domains.values():
                if domain.entity == self._entity.name:
                    self._boxes[domain.name] = _ItemBox(domain.name, domain.key)
        self._sending = ui.element("div")
        self._sending.set_visibility(False)
        with self._sending:
            self._build_form(refusal)
        await self._notice.guard(picker.offer)()
        await self._notice.guard(self._pick_given)()
        ui.timer(SOON_SECONDS, self._reading.guard(self._look))

    async def _pick_given(self) -> None:
        """Show the id that the address names, if it names one."""
        given = [self._visit.query.get(name) for name in self._entity.key_names]
        if all(given):
            await self._pick(read_id(self._entity.keys, given if len(given) > 1 else given[0]))

    def _build_form(self, refusal: str | None) -> None:
        text("h2", "Send an event")
        if refusal:
            text("p", f"Read only: {refusal}.").classes("faint").props('data-role="read-only"')
            return
        topics = topics_about(self._console.registry, self._entity)
        self._topic = topics[0]
        with ui.element("div").classes("line"):
            if len(topics) > 1:
                for topic in topics:
                    ui.button(topic.name, on_click=lambda topic=topic: self._choose(topic)).classes(
                        "action"
                    ).props("outline dense no-caps")
        self._form = ui.element("div").classes("line")
        self._choose(self._topic)
        text("h2", "Its way")
        with (
            ui.element("div").classes("scrolls"),
            ui.element("table").props('data-role="way" aria-live="polite"'),
        ):
            row("", "where", "at (UTC)", "after", tag="th")
            self._stops = ui.element("tbody")

    def _choose(self, topic: TopicDeclaration) -> None:
        self._topic = topic
        self._form.clear()
        with self._form:
            text("strong", topic.name)
            self._inputs = {field.name: _input(field) for field in asked_fields(topic, self._entity)}
            ui.button("Send", on_click=self._notice.guard(self._send)).classes("action").props("unelevated")

    async def _pick(self, id_: Id) -> None:
        self._id, self._profile, self._way = id_, None, None
        self._who.set_text(f"{self._entity.name} {printable(id_label(id_), one_line=True)}")
        self._sending.set_visibility(True)
        await self._look(at_once=True)

    async def _send(self) -> None:
        if self._id is None or self._profile is None:
            return
        before = domain_values(self._profile)
        given = {name: field.value for name, field in self._inputs.items()}
        sent = await self._visit.send(self._topic, self._entity, self._id, given, datetime.now(UTC))
        domains = self._console.registry.contract.domains.values()
        self._way = Way(sent, before, {one.name: one.key for one in domains if one.name in before})
        self._next = 0.0
        self._show_way(self._way)

    async def _look(self, *, at_once: bool = False) -> None:
        """Read the items, and how far the event on its way has come."""
        id_, started = self._id, time.monotonic()
        if id_ is None or (started < self._next and not at_once):
            return
        self._next = started + (IDLE_SECONDS if self._way is None else 0.0)
        client = self._console.profiles(self._entity.name)
        profile = await self._console.run(client.get, id_, consistent=True)
        if id_ != self._id:
            return
        first, self._profile = self._profile is None, profile
        registry = self._console.registry
        for name, read in profile.as_dict()["domains"].items():
            # The box compares the values, and masks what it shows.
            masked = partial(masked_row, registry, registry.contract.domain(name).relation)
            self._boxes[name].show(
                read["attributes"], read["state"], read["error"], first=first, masked=masked
            )
        if self._way is not None:
            await self._follow(self._way, profile)

    async def _follow(self, way: Way, profile: Profile) -> None:
        now = datetime.now(UTC)
        way = await self._console.run(follow_trail, self._console, way.seen(profile, now))
        if self._way is None or self._way.sent is not way.sent:
            # The visitor has sent another event in the meantime.
            return
        self._way = None if way.is_over(now) else way
        self._show_way(way)

    def _show_way(self, way: Way) -> None:
        self._stops.clear()
        with self._stops:
            for stop in way.stops(followed=self._console.settings.engine == "local"):
                at = "" if stop.at is None else f"{stop.at:%H:%M:%S.%f}"[:-3]
                row(
                    stop.what,
                    stop.where,
                    at,
                    "" if stop.seconds is None else f"{1000 * stop.seconds:,.0f} ms",
                )


def shown(value: Any) -> str:
    """Return a value of an item for people."""
    if value is None:
        return "-"
    return printable(", ".join(map(str, value)) if isinstance(value, list | tuple) else value, one_line=True)


def _input(field: FieldDeclaration) -> Any:
    """An input for one declared field, empty where a message may omit it."""
    label = field.name if field.optional else f"{field.name} *"
    if field.accepted:
        choices = [*([""] if field.optional else []), *field.accepted]
        made: Any = ui.select(choices, label=label, value=choices[0]).style("min-width: 10rem")
    elif field.type == "boolean":
        made = ui.select(["", "true", "false"], label=label, value="" if field.optional else "true")
    else:
        made = ui.input(label).props(f"type={INPUT_TYPES.get(field.type, 'text')}" + " step=any")
    return made.props("dense outlined").tooltip(field.description)


VIEWERS = Page("/viewers", "Viewers", "domains", build, lambda registry: bool(shown_entities(registry)))
