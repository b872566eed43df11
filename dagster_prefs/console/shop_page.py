"""The page Shop: items ranked for one user; after a click on one, the ranking follows."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from dagster_prefs.console.context import Page, Visit
from dagster_prefs.console.frame import Notice, text
from dagster_prefs.console.picker import Picker
from dagster_prefs.console.shop import PARTS, Shop, has_shop, moves, reason, score_parts, shop_of
from dagster_prefs.declarations.registry import Entity
from dagster_prefs.ids import Id
from dagster_prefs.printable import printable
from dagster_prefs.serving.preferences import RankedItem, Ranking, ranked_entity

# Items on the page.
SHOWN = 12
# Interval at which the user's signals are read: after a click until they change, and otherwise, seconds.
SOON_SECONDS, IDLE_SECONDS = 0.1, 1.0
# Time after which the page stops waiting for the effect of a click, seconds.
PATIENCE_SECONDS = 15.0
# Number of rankings whose items can be clicked: the browser may still show one that was just replaced.
REMEMBERED = 3


async def build(visit: Visit) -> None:
    """Build the page; the parameter `user` names whose ranking is shown."""
    entity = ranked_entity(visit.console.registry)
    if entity is not None:
        await _ShopPage(visit, entity).show(visit.query.get("user"))


class _Slot:
    """One place of the ranking. Updates change the texts of its elements, so that the keyboard focus stays."""

    def __init__(self, place: int, actions: tuple[str, ...], click: Any) -> None:
        with ui.element("li").classes("box") as self.box:
            with ui.element("div").classes("line"):
                text("strong", f"{place}.")
                self.title = text("strong", "")
                self.move = text("span", "")
                ui.space()
                self.score = text("span", "").classes("number")
            self.about = text("div", "").classes("faint")
            with ui.element("div").classes("shares").props("aria-hidden=true"):
                self.shares = {part: ui.element("div").classes(f"part-{part}") for part in PARTS}
            self.reason = text("div", "").props('data-role="reason"')
            with ui.element("div").classes("line"):
                self.buttons = [
                    ui.button(action.replace("_", " ").capitalize())
                    .classes("action")
                    .props("outline dense")
                    .on("click", lambda event, action=action: click(action, event),
                        js_handler="(event) => emit(event.currentTarget.dataset.item)")
                    for action in actions
                ]  # fmt: skip

    def show(self, item: RankedItem | None, parts: dict[str, Decimal], rose: int | None) -> None:
        """Show an item, or nothing."""
        self.box.set_visibility(item is not None)
        if item is None:
            return
        self.box.props["data-item"] = item.item_id
        self.box.update()
        name = printable(item.title or item.item_id, one_line=True)
        self.title.set_text(name)
        self.score.set_text(f"{item.score:,.2f}")
        facts = (item.item_id, item.category, item.brand, item.price_tier, _price(item.price))
        self.about.set_text(printable(" · ".join(fact for fact in facts if fact), one_line=True))
        self.reason.set_text(printable(reason(item, parts), one_line=True))
        self.move.set_text("" if not rose else f"▲ {rose}" if rose > 0 else f"▼ {-rose}")
        self.move.classes(replace="" if not rose else "good" if rose > 0 else "faint")
        whole = sum(parts.values())
        for part, share in self.shares.items():
            share.style(f"width: {100 * parts[part] / whole if whole else 0:.1f}%")
        for button in self.buttons:
            button.props["data-item"] = item.item_id
            button.props["aria-label"] = f"{button.text} {name}"
            button.update()


class _ShopPage:
    def __init__(self, visit: Visit, entity: Entity) -> None:
        self._visit = visit
        self._entity = entity
        self._console = visit.console
        self._shop: Shop | None = shop_of(self._console.registry)
        self._session = f"console-{secrets.token_hex(4)}"
        self._user: str | None = None
        self._ranking: Ranking | None = None
        self._items: list[dict[str, RankedItem]] = []
        self._signals: Any = None
        self._clicked: float | None = None
        self._next = 0.0

    async def show(self, user: str | None) -> None:
        refusal = "the project has no topic of what users do with items"
        if self._shop is not None:
            refusal = await self._visit.sending_refusal() or ""
        text("h1", "Shop")
        text(
            "p", "Items ranked for one user. Each click is sent as an event, and the ranking follows."
        ).classes("faint")
        # What a timer reads well must not take away what a click was told.
        self._notice, self._reading = Notice(), Notice()
        picker = Picker(self._visit, self._entity, self._pick, self._notice)
        with ui.element("div").classes("line"):
            ui.button("Be a new user", on_click=self._notice.guard(self._be_new)).classes("action").props(
                "outline"
            )
        if refusal:
            text("p", f"Read only: {refusal}.").classes("faint").props('data-role="read-only"')
        with ui.element("div").props('aria-live="polite"'):
            self._who = text("h2", "")
            self._told = text("p", "").props('data-role="told"')
        actions = () if refusal or self._shop is None else self._shop.actions
        with ui.element("ol").classes("cards"):
            self._slots = [
                _Slot(place, actions, self._notice.guard(self._click)) for place in range(1, SHOWN + 1)
            ]
        for slot in self._slots:
            slot.show(None, {}, None)
        await self._notice.guard(picker.offer)()
        if user:
            await self._notice.guard(self._pick)(user)
        ui.timer(SOON_SECONDS, self._reading.guard(self._look))

    async def _be_new(self) -> None:
        await self._pick(f"new-{secrets.token_hex(4)}")

    async def _pick(self, id_: Id) -> None:
        self._user, self._ranking, self._signals, self._clicked = str(id_), None, None, None
        self._told.set_text("")
        await self._look(at_once=True)

    async def _click(self, action: str, event: GenericEventArguments) -> None:
        item = next((known[event.args] for known in self._items if event.args in known), None)
        if item is None or self._shop is None or self._user is None:
            return
        self._clicked = time.monotonic()
        given = self._shop.values(action, item, self._session)
        await self._visit.send(self._shop.topic, self._shop.entity, self._user, given, datetime.now(UTC))
        name = printable(item.title or item.item_id, one_line=True)
        self._told.set_text(f"{action.replace('_', ' ')}: {name} …")
        self._next = 0.0

    async def _look(self, *, at_once: bool = False) -> None:
        """Rank again if any input of the ranking has changed."""
        started, user = time.monotonic(), self._user
        if user is None or (started < self._next and not at_once):
            return
        waits = self._clicked is not None and started - self._clicked < PATIENCE_SECONDS
        self._next = started + (0.0 if waits else IDLE_SECONDS)
        shop, now = self._console.shop, datetime.now(UTC)
        signals = sorted(await self._console.run(shop.signals, user, shop.parameters, now), key=str)
        if signals == self._signals and self._ranking is not None:
            return
        ranking = await self._console.run(shop.rank, user, SHOWN, now=now, explain=True)
        if user == self._user:
            self._signals = signals
            self._show(ranking)

    def _show(self, ranking: Ranking) -> None:
        rose, before = moves(self._ranking, ranking), self._ranking
        self._ranking = ranking
        self._items = [{item.item_id: item for item in ranking}, *self._items[: REMEMBERED - 1]]
        known = bool(self._signals)
        session = "her session counts" if ranking.session_active else "no session yet"
        told = f"known, {session}" if known else "nothing is known of this user yet"
        self._who.set_text(f"{printable(ranking.user_id, one_line=True)}: {told}")
        for place, slot in enumerate(self._slots):
            item = ranking[place] if place < len(ranking) else None
            shown = (
                None if item is None or before is None else rose.get(item.item_id, len(self._slots) - place)
            )
            slot.show(item, {} if item is None else score_parts(item, ranking), shown)
        if self._clicked is not None:
            self._told.set_text(f"Ranked again {time.monotonic() - self._clicked:.2f} s after the click.")
            self._clicked = None


def _price(price: Decimal | None) -> str:
    return "" if price is None else f"{price:,.2f}"


SHOP = Page("/shop", "Shop", "shop", build, has_shop)
