"""The part of a page where an id is chosen: typed, or found by how it begins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from nicegui import ui
from nicegui.events import GenericEventArguments

from dagster_prefs.console.context import Visit
from dagster_prefs.console.frame import Notice
from dagster_prefs.console.lookup import find_ids
from dagster_prefs.declarations.registry import Entity
from dagster_prefs.ids import Id, id_label, read_id

SEND_TYPED = "(event) => emit(event.target.value)"


class Picker:
    """An input for each key column, the ids that begin like the first one, and a button that takes what is typed.

    `picked` is called with an id, which need not have any events yet.
    """

    def __init__(
        self, visit: Visit, entity: Entity, picked: Callable[[Id], Awaitable[None]], notice: Notice
    ) -> None:
        self._visit = visit
        self._entity = entity
        self._picked = picked
        self._notice = notice
        with ui.element("div").classes("line"):
            self._inputs = [ui.input(key.name).props("dense outlined debounce=250") for key in entity.keys]
            for place, field in enumerate(self._inputs):
                # What was typed last may not have been sent yet.
                field.on("keydown.enter", notice.guard(partial(self._entered, place)), js_handler=SEND_TYPED)
            self._inputs[0].on_value_change(notice.guard(self._search))
            ui.button("Show", on_click=notice.guard(self._take)).classes("action").props("unelevated")
        self._found = ui.element("div").classes("line").props('aria-label="Found"')

    async def offer(self) -> None:
        """Show the newest ids."""
        await self._search()

    async def _search(self) -> None:
        begin = str(self._inputs[0].value or "")
        found = await self._visit.console.run(find_ids, self._visit.console, self._entity, begin)
        if str(self._inputs[0].value or "") != begin:
            # What was typed meanwhile has a search of its own.
            return
        self._found.clear()
        with self._found:
            for id_ in found:
                ui.button(
                    id_label(id_), on_click=self._notice.guard(lambda id_=id_: self._choose(id_))
                ).classes("action").props("outline dense no-caps")

    async def _entered(self, place: int, event: GenericEventArguments) -> None:
        self._inputs[place].set_value(str(event.args))
        await self._take()

    async def _take(self) -> None:
        typed = tuple(str(one.value or "") for one in self._inputs)
        await self._picked(read_id(self._entity.keys, typed if len(typed) > 1 else typed[0]))

    async def _choose(self, id_: Id) -> None:
        for field, part in zip(self._inputs, id_ if isinstance(id_, tuple) else (id_,), strict=True):
            field.set_value(str(part))
        await self._picked(id_)
