"""The pages of the console in a real browser: what is clicked, and what is then on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from browser import needs_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.console.conftest import Running

pytestmark = needs_chromium


def test_the_pipeline_shows_every_stage(console: Running, page: Page) -> None:
    page.goto(f"{console.url}/pipeline")
    for name in ("follower", "viewer_engagement_rolling", "watch"):
        page.get_by_text(name, exact=True).first.wait_for()
