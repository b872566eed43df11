"""The page Run book: a paragraph for each stage that can fail, from runbook.md next to this file."""

from __future__ import annotations

from pathlib import Path

from nicegui import ui

from dagster_prefs.console.context import Page, Visit
from dagster_prefs.console.frame import text

FILE = Path(__file__).with_name("runbook.md")


def paragraphs(content: str) -> dict[str, tuple[str, str]]:
    """Return the paragraphs of a run book: the stage in the brackets of each heading → (title, text)."""
    found = {}
    for part in content.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        title, _, stage = heading.rpartition(" (")
        found[stage.rstrip(")")] = (title, body.strip())
    return found


def anchor(stage: str) -> str:
    """Return the anchor of a stage's paragraph on the page."""
    return f"stage-{stage}"


def build(visit: Visit) -> None:
    """Show every paragraph."""
    text("h1", "Run book")
    for stage, (title, body) in paragraphs(FILE.read_text(encoding="utf-8")).items():
        with ui.element("section").props(f'id="{anchor(stage)}"'):
            text("h2", title)
            ui.markdown(body)


RUNBOOK = Page("/runbook", "Run book", "inspect", build)
