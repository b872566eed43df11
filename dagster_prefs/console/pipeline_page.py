"""The page Pipeline: every stage with its lag and level."""

from __future__ import annotations

from nicegui import ui

from dagster_prefs.console.context import Page, Visit
from dagster_prefs.console.frame import Notice, text
from dagster_prefs.freshness.status import duration

LOOK_SECONDS = 5.0


async def build(visit: Visit) -> None:
    """Show the measures of all stages, and look again every few seconds."""
    text("h1", "Pipeline")
    notice = Notice()
    table = ui.element("div").classes("scrolls")

    async def look() -> None:
        status = await visit.console.run(visit.console.read_status)
        table.clear()
        with table, ui.element("table"):
            for measure in status.measures:
                with ui.element("tr"):
                    for text in (measure.stage, measure.name, duration(measure.lag_seconds), measure.level):
                        with ui.element("td"):
                            ui.label(text)

    ui.timer(LOOK_SECONDS, notice.guard(look))


PIPELINE = Page("/pipeline", "Pipeline", "inspect", build)
