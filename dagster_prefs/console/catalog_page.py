"""The page Catalog: all that the project declares, searched, and one entry in full with where it comes from."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import quote

from nicegui import ui

from dagster_prefs.console.context import Console, Page, Visit
from dagster_prefs.console.frame import Notice, row, text
from dagster_prefs.console.why_page import WHY
from dagster_prefs.errors import PrefsError
from dagster_prefs.printable import printable
from dagster_prefs.serving.feature_catalog import (
    Entry,
    FeatureCatalog,
    described,
    has_statistics,
    load_catalog,
    sampled,
)

# More entries than a person reads; the others are found by another word.
MOST_SHOWN = 200
COLUMNS = ("kind", "name", "type", "owner", "meaning")


async def build(visit: Visit) -> None:
    """Show the entries that have the words of the parameter `search`, or in full the one named by `name`."""
    catalog = await visit.console.run(_catalog, visit.console)
    if name := visit.query.get("name"):
        await _Entry(visit, catalog.entry(name, visit.query.get("kind"))).show()
    else:
        _Search(catalog, visit.query.get("search", "")).show()


@lru_cache(maxsize=1)
def _catalog(console: Console) -> FeatureCatalog:
    """The catalog, which takes a second to read and stays the same for a process, as the registry does."""
    return load_catalog(console.settings.project, console.registry)


def address(entry: Entry) -> str:
    """Return the address of an entry's page."""
    return f"{CATALOG.path}?kind={entry.kind}&name={quote(entry.name, safe='')}"


class _Search:
    def __init__(self, catalog: FeatureCatalog, words: str) -> None:
        self._catalog = catalog
        self._words = words

    def show(self) -> None:
        text("h1", "Catalog")
        text(
            "p", "What the project declares, from the event's field to the attribute that is served."
        ).classes("faint")
        ui.input(
            "Search", value=self._words, on_change=lambda change: self._fill(str(change.value or ""))
        ).props('dense outlined clearable debounce=150 type="search"').style("width: 100%; max-width: 30rem")
        self._count = text("p", "").props('data-role="count" aria-live="polite"').classes("faint")
        self._table = ui.element("div").classes("scrolls")
        self._fill(self._words)

    def _fill(self, words: str) -> None:
        found = self._catalog.search(words)
        more = f", the first {MOST_SHOWN} are shown" if len(found) > MOST_SHOWN else ""
        self._count.set_text(f"{len(found)} of {len(self._catalog.entries)} entries{more}")
        self._table.clear()
        with self._table, ui.element("table"):
            row(*COLUMNS, tag="th")
            for entry in found[:MOST_SHOWN]:
                _, name, *_ = row(entry.kind, "", entry.type or "", entry.owner or "", entry.meaning)
                with name:
                    ui.link(entry.name, address(entry))


class _Entry:
    """One entry; its examples are read once it is shown, because they need the engine."""

    def __init__(self, visit: Visit, entry: Entry) -> None:
        self._visit = visit
        self._entry = entry

    async def show(self) -> None:
        entry = self._entry
        ui.link("All entries", CATALOG.path)
        text("h1", entry.name)
        text("p", f"{entry.kind}: {entry.meaning}" if entry.meaning else entry.kind)
        with ui.element("div").classes("scrolls"):
            self._facts = ui.element("table").props('data-role="facts"')
        self._fill(entry)
        if entry.kind == "attribute" or (entry.kind == "column" and self._in_view()):
            ui.link("Why has somebody this value?", f"{WHY.path}?attribute={quote(entry.name, safe='')}")
        self._tree()
        if entry.goes_to:
            text("h2", "Where it goes")
            with ui.element("ul").props('data-role="goes-to"'):
                for one in entry.goes_to:
                    text("li", one)
        if entry.read:
            text("h2", "How to read it")
            with ui.element("div").classes("scrolls"), ui.element("table").props('data-role="read"'):
                for way, what in entry.read.items():
                    row(way, what)[1].style("font-family: monospace")
        if entry.column is not None:
            await self._read_examples()

    def _in_view(self) -> bool:
        column = self._entry.column
        return column is not None and column.of in self._visit.console.registry.preferences

    def _tree(self) -> None:
        if not self._entry.made_from:
            return
        text("h2", "Where it comes from")
        with ui.element("ul").props('data-role="made-from"').style("list-style: none; padding: 0"):
            for depth, name, how in self._entry.made_from:
                with text("li", "").style(f"padding-left: {1.25 * depth}rem"):
                    text("span", name)
                    text("span", f" {how}").classes("faint")

    async def _read_examples(self) -> None:
        console, entry = self._visit.console, self._entry
        notice = Notice()
        try:
            found = await console.run(_sampled, console, entry)
        except PrefsError as error:
            # All else on the page is right without the engine.
            notice.say(str(error))
            return
        self._fill(found)
        if has_statistics(console.registry, entry):
            (found,) = described([found], await console.run(console.statistics))
            self._fill(found)

    def _fill(self, entry: Entry) -> None:
        self._facts.clear()
        with self._facts:
            for label, fact in entry.facts.items():
                row(label, printable(fact, one_line=True))


def _sampled(console: Console, entry: Entry) -> Entry:
    (found,) = console.query(
        entry.name, lambda connection: sampled(connection, console.engine, console.registry, [entry])
    )
    return found


CATALOG = Page("/catalog", "Catalog", "inspect", build)
