"""The page Pipeline: a line for each topic and stage, with its last hour; a red line links to the run book."""

from __future__ import annotations

from datetime import UTC, datetime

from nicegui import ui

from dagster_prefs.console.context import Page, Visit
from dagster_prefs.console.frame import Notice, row, text
from dagster_prefs.console.history import Line, sparkline, topics_of_measures
from dagster_prefs.console.runbook_page import RUNBOOK, anchor
from dagster_prefs.freshness.status import duration

LOOK_SECONDS = 1.0
LOOKS = {"warn": "warn", "catching up": "warn", "skipped": "faint"}
COLUMNS = ("stage", "name", "rate", "lag", "last hour", "target", "rejected", "last", "state")


async def build(visit: Visit) -> None:
    """Show the latest reading of all stages, and update it."""
    await _PipelinePage(visit).show()


class _Shown:
    """The table row of one line; updates change the texts of its cells."""

    def __init__(self, line: Line) -> None:
        self._rate, self._lag, spark, self._target, self._rejected, self._last, state = row(
            line.stage, line.name, *[""] * (len(COLUMNS) - 2)
        )[2:]
        for cell in (self._rate, self._lag, self._target, self._rejected):
            cell.classes("number")
        self._last.classes("nowrap")
        with spark:
            self._spark = ui.html("", sanitize=False)
        self._state = state
        with state:
            self._level = ui.link(line.level, f"{RUNBOOK.path}#{anchor(line.stage)}")
            self._reason = text("div", "").classes("faint")
        state.props["data-line"] = line.key

    def show(self, line: Line) -> None:
        """Show the current values."""
        self._rate.set_text("" if line.rate is None else f"{line.rate:.1f}/s")
        self._lag.set_text(duration(line.lag_seconds))
        self._target.set_text(duration(line.target_seconds))
        self._rejected.set_text("" if line.rejected is None else f"{line.rejected:,}")
        self._last.set_text(line.last)
        self._spark.set_content(sparkline(line))
        self._spark.classes(replace="bad" if line.is_bad else "")
        self._level.set_text(line.level)
        self._level.classes(replace="bad" if line.is_bad else LOOKS.get(line.level, "good"))
        self._reason.set_text("" if line.level == "ok" else line.reason)


class _PipelinePage:
    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self._watcher = visit.console.watcher
        self._topics = topics_of_measures(visit.console.registry)
        self._rows: dict[str, _Shown] = {}

    async def show(self) -> None:
        text("h1", "Pipeline")
        text("p", "Every stage from the event to its readers, measured while you look.").classes("faint")
        self._notice = Notice()
        self._summary = text("p", "The first reading is taken …").props(
            'data-role="summary" aria-live="polite"'
        )
        self._table = ui.element("div").classes("scrolls")
        self._look()
        ui.timer(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._watcher.look()
        self._notice.say(self._watcher.problem)
        status = self._watcher.history.status
        if status is None:
            return
        lines = self._watcher.history.lines(self._topics, datetime.now(UTC))
        wrong = [line for line in lines if line.is_bad]
        self._summary.set_text(
            f"{len(wrong)} of {len(lines)} lines are red." if wrong else f"All {len(lines)} lines are well."
        )
        self._summary.classes(replace="bad" if wrong else "good")
        if [line.key for line in lines] != list(self._rows):
            self._table.clear()
            with self._table, ui.element("table"):
                row(*COLUMNS, tag="th")
                self._rows = {line.key: _Shown(line) for line in lines}
        for line in lines:
            self._rows[line.key].show(line)


PIPELINE = Page("/pipeline", "Pipeline", "inspect", build)
