"""The part of a page where a visitor chooses an id: typed, or found by its prefix."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import zip_longest

from nicegui import ui
from nicegui.events import GenericEventArguments

from dagster_prefs.console.context import Visit
from dagster_prefs.console.frame import Notice
from dagster_prefs.console.lookup import MOST_FOUND, find_ids
from dagster_prefs.declarations.registry import Entity
from dagster_prefs.ids import Id, id_label, read_id
from dagster_prefs.printable import printable

SEND_ID = "(event) => emit(event.currentTarget.dataset.id)"
SEND_TYPED = "(event) => emit(event.target.value)"


class Picker:
    """An input for each key column, the ids with the typed prefix, and a button that takes the typed id.

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
                # The browser may not have sent the last keystrokes yet.
                field.on("keydown.enter", notice.guard(partial(self._entered, place)), js_handler=SEND_TYPED)
            self._inputs[0].on_value_change(notice.guard(self._search))
            ui.button("Show", on_click=notice.guard(self._take)).classes("action").props("unelevated")
        with ui.element("div").classes("line").props('aria-label="Found"'):
            # The buttons stay when other ids are found, so that no click is lost.
            self._found = [
                ui.button()
                .classes("action")
                .props("outline dense no-caps")
                .on("click", notice.guard(self._choose), js_handler=SEND_ID)
                for _ in range(MOST_FOUND)
            ]
        for button in self._found:
            button.set_visibility(False)

    async def offer(self) -> None:
        """Show the newest ids."""
        await self._search()

    async def _search(self) -> None:
        begin = str(self._inputs[0].value or "")
        found = await self._visit.console.run(find_ids, self._visit.console, self._entity, begin)
        if str(self._inputs[0].value or "") != begin:
            # A later input has started its own search.
            return
        for button, id_ in zip_longest(self._found, found):
            button.set_visibility(id_ is not None)
            if id_ is not None:
                button.set_text(printable(id_label(id_), one_line=True))
                button.props["data-id"] = json.dumps(id_)
                button.update()

    async def _entered(self, place: int, event: GenericEventArguments) -> None:
        self._inputs[place].set_value(str(event.args))
        await self._take()

    async def _take(self) -> None:
        typed = tuple(str(one.value or "") for one in self._inputs)
        await self._picked(read_id(self._entity.keys, typed if len(typed) > 1 else typed[0]))

    async def _choose(self, event: GenericEventArguments) -> None:
        given = json.loads(event.args)
        id_ = read_id(self._entity.keys, tuple(given) if isinstance(given, list) else given)
        for field, part in zip(self._inputs, id_ if isinstance(id_, tuple) else (id_,), strict=True):
            field.set_value(str(part))
        await self._picked(id_)
