"""The frame of every page: navigation, light and dark mode, the style, and the message shown for an error."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any

from fastapi import Request
from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from dagster_prefs.access import NOTHING
from dagster_prefs.console.access import GRANT, SIGN_OUT
from dagster_prefs.console.context import Console, Page, Visit
from dagster_prefs.declarations.registry import Entity
from dagster_prefs.errors import PrefsError

# Time limit of building a page. Slow reads start after the page is shown.
BUILD_SECONDS = 10.0

STYLE = """
:root { --line: #0002; --soft: #0000000a; --faint: #5f6368; --good: #1b7f4b; --bad: #c62828; --warn: #9a6700;
  --accent: #1a5fb4; }
body.body--dark { --line: #fff3; --soft: #ffffff10; --faint: #a8adb3; --good: #5bd08d; --bad: #ff8a80;
  --warn: #e3b341; --accent: #8ab4f8; }
body.body--light { --q-primary: #1a5fb4 !important; } body.body--dark { --q-primary: #8ab4f8 !important; }
body.body--dark .q-btn.bg-primary { color: #111 !important; }
body { font-family: system-ui, sans-serif; }
.nicegui-content { padding: 0; gap: 0; align-items: stretch; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem .75rem; padding: .5rem 1rem;
  border-bottom: 1px solid var(--line); }
.bar a { color: inherit; text-decoration: none; padding: .35rem .6rem; border-radius: .4rem; }
.bar a:hover, .bar a[aria-current] { background: var(--soft); }
.bar a[aria-current] { font-weight: 600; box-shadow: inset 0 -2px var(--accent); }
.bar strong { margin-right: .5rem; }
main { display: block; box-sizing: border-box; width: 100%; max-width: 80rem; margin: 0 auto; padding: 1rem; }
main h1 { font-size: 1.5rem; line-height: 1.3; font-weight: 600; margin: 0 0 .25rem; }
main h2 { font-size: 1.1rem; line-height: 1.3; font-weight: 600; margin: 1.25rem 0 .5rem; }
.faint { color: var(--faint); } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.warn { color: var(--warn); font-weight: 600; } main a { color: var(--accent); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .75rem;
  width: 100%; margin: 0; padding: 0; list-style: none; }
.box { border: 1px solid var(--line); border-radius: .6rem; padding: .75rem; min-width: 0; }
.line { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin: .35rem 0; }
.scrolls { overflow-x: auto; width: 100%; }
.scrolls table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.scrolls th, .scrolls td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word; }
.scrolls td.number, .scrolls td.nowrap { white-space: nowrap; }
.scrolls th { font-weight: 600; color: var(--faint); white-space: nowrap; }
.scrolls td.number, .scrolls th.number { text-align: right; }
.spark { display: block; width: 7.5rem; height: 1.6rem; color: var(--accent); }
.problem { border-left: 4px solid var(--bad); background: var(--soft); padding: .75rem 1rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.shares { display: flex; height: .5rem; border-radius: .25rem; overflow: hidden; background: var(--soft); }
.shares > * { height: 100%; } .part-category { background: #4c78c9; } .part-brand { background: #d9822b; }
.part-tier { background: #7a5cc0; } .part-session { background: #2e9e6b; }
.q-btn.action { text-transform: none; min-height: 2.25rem; }
@media (max-width: 40rem) { main { padding: .75rem; } .bar { padding: .4rem .5rem; } }
"""

# The browser stores the visitor's choice; without one the system's preference applies.
TOGGLE_DARK = "() => { Quasar.Dark.toggle(); localStorage.setItem('dark', Quasar.Dark.isActive ? '1' : ''); }"
KEEP_DARK = """<script>addEventListener("load", () => {
  const dark = localStorage.getItem("dark"); if (dark !== null) Quasar.Dark.set(dark === "1"); });</script>"""


def add_pages(console: Console, pages: Sequence[Page]) -> None:
    """Register the pages that exist for the project; the first one that a visitor may see is also at `/`."""
    shown = [page for page in pages if page.exists(console.registry)]
    framed = {page.path: _framed(console, page, shown) for page in shown}
    for page in shown:
        ui.page(page.path, title=f"{page.title} · dagster-prefs", response_timeout=BUILD_SECONDS)(
            framed[page.path]
        )

    async def root(request: Request) -> None:
        rights = getattr(request.state, GRANT, NOTHING).rights
        page = next((one for one in shown if one.right in rights), shown[0])
        await framed[page.path](request)

    ui.page("/", title="dagster-prefs", response_timeout=BUILD_SECONDS)(root)


def _framed(console: Console, page: Page, pages: Sequence[Page]) -> Callable[[Request], Awaitable[None]]:
    async def show(request: Request) -> None:
        grant = getattr(request.state, GRANT, NOTHING)
        ui.add_css(STYLE)
        ui.add_body_html(KEEP_DARK)
        with ui.element("nav").classes("bar").props('aria-label="Pages"'):
            text("strong", "dagster-prefs")
            for other in pages:
                if other.right in grant.rights:
                    link = ui.link(other.title, other.path)
                    if other is page:
                        link.props('aria-current="page"')
            ui.space()
            if grant.name:
                ui.link(f"Sign out {grant.name}", SIGN_OUT)
            ui.button(icon="contrast").props('flat round dense aria-label="Light or dark"').on(
                "click", js_handler=TOGGLE_DARK
            )
        with ui.element("main") as content:
            if page.right in grant.rights:
                await Notice().guard(page.build)(Visit(console, grant, dict(request.query_params)))
            else:
                Notice().say(grant.refusal(page.right))
        ui.skip_link(target=content)

    return show


class Notice:
    """The place on a page for an error message; empty if there is none."""

    def __init__(self) -> None:
        self._label = text("p", "").classes("problem").props('role="alert"')
        self.say(None)

    def say(self, what: str | None) -> None:
        """Show an error message with its remedy, or nothing."""
        self._label.set_text(what or "")
        self._label.set_visibility(bool(what))

    def guard(self, work: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        """Wrap a handler or a timer's callback: show an expected failure here, and clear it at the next success."""

        @wraps(work)
        async def call(*args: Any, **kwargs: Any) -> None:
            try:
                outcome = work(*args, **kwargs)
                if inspect.isawaitable(outcome):
                    await outcome
            except PrefsError as error:
                self.say(str(error))
            else:
                self.say(None)

        return call


def text(tag: str, content: str) -> TextElement:
    """An HTML element with a text, which is shown as it is."""
    return TextElement(tag=tag, text=content)


def row(*cells: str, tag: str = "td") -> list[TextElement]:
    """Add a row to the current table, and return its cells."""
    with ui.element("tr"):
        return [text(tag, cell) for cell in cells]


def entity_links(path: str, entities: Sequence[Entity], shown: Entity) -> None:
    """Add links to a page about each entity, if there are several; mark the one that is `shown`."""
    if len(entities) < 2:
        return
    with ui.element("div").classes("line"):
        for entity in entities:
            link = ui.link(entity.name, f"{path}?entity={entity.name}")
            if entity is shown:
                link.props('aria-current="true"')
