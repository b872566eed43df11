"""The pages of the console in a real browser: what is clicked, and what is then on the page."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from browser import needs_chromium
from shipped import SHORT
from waiting import PATIENCE_SECONDS, wait_for
from warm import Warm

from dagster_prefs.access import digest
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.live.presence import wait_until_applied
from dagster_prefs.platform import Platform
from tests.console.conftest import Running, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = [needs_chromium, pytest.mark.slow]

# What the shop sells: brand and category tell them apart.
CATALOGUE = [
    {"item_id": f"{category}-{number}", "title": f"{brand} {category}", "category": category, "brand": brand,
     "price": 20 + 50 * number, "in_stock": True}
    for category in ("lamp", "sofa", "kettle")
    for number, brand in enumerate(("lumen", "fjord", "maple", "orbit"))
]  # fmt: skip


def store(platform: Platform, topic: str, source: str, messages: list[dict[str, Any]]) -> None:
    """Store messages in the raw table of a topic, from where the follower takes them."""
    with RawStore(platform.engine) as raw:
        rows = [RawMessage(0, number, json.dumps(one).encode()) for number, one in enumerate(messages)]
        raw.write(platform.registry.topic(topic), source, rows)


@pytest.fixture(scope="module", autouse=True)
def _catalogue(console: Running) -> None:
    store(console.platform, "items", "file:items", CATALOGUE)
    seen_at = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    viewed = [
        {"event_id": f"seen-{number}", "viewer_id": number, "genre": "crime", "watch_duration_sec": 60,
         "watched_at": seen_at}
        for number in range(100, 300)
    ]  # fmt: skip
    store(console.platform, "view_events", "file:views", viewed)
    found = {"event_id": "f1", "user_id": "find-me", "category": "lamp", "event_type": "view"}
    store(console.platform, "user.events", "file:f", [{**found, "event_time": datetime.now(UTC).isoformat()}])
    wait_until_applied(console.platform.engine, seconds=PATIENCE_SECONDS)


def first(page: Page) -> Locator:
    """The first place of the ranking."""
    return page.locator("ol > li").first


def test_a_click_reorders_the_ranking_and_says_why(console: Running, page: Page) -> None:
    page.goto(f"{console.url}/shop")
    page.get_by_role("button", name="Be a new user").click()
    page.get_by_role("heading", name="nothing is known of this user yet").wait_for()
    page.locator('[data-item="sofa-1"]').first.wait_for()
    assert first(page).get_attribute("data-item") == "kettle-0", (
        "on a cold start items are ranked by their id"
    )
    assert "nothing is known" in first(page).locator('[data-role="reason"]').inner_text()
    page.get_by_role("button", name="Purchase fjord sofa").click()
    page.locator('[data-role="told"]').get_by_text("Ranked again").wait_for()
    told = page.locator('[data-role="told"]').inner_text()
    assert float(told.split()[2]) > 0
    assert first(page).get_attribute("data-item") == "sofa-1"
    reason = first(page).locator('[data-role="reason"]').inner_text()
    assert "category sofa 4.00" in reason
    assert "brand fjord 3.00" in reason
    page.get_by_role("heading", name="known, no session yet").wait_for()

    # What she does elsewhere shows as well, without a click.
    user = page.locator("h2").first.inner_text().partition(":")[0]
    bought = {
        "item_id": "lamp-0",
        "category": "lamp",
        "brand": "lumen",
        "price": 20,
        "event_type": "purchase",
    }
    elsewhere = [
        {
            **bought,
            "event_id": f"{user}-{number}",
            "user_id": user,
            "event_time": datetime.now(UTC).isoformat(),
        }
        for number in range(3)
    ]
    store(console.platform, "user.events", f"file:{user}", elsewhere)
    page.locator('ol > li:first-child[data-item="lamp-0"]').wait_for()


def test_a_known_user_is_found_by_how_her_id_begins(console: Running, page: Page) -> None:
    page.goto(f"{console.url}/shop")
    page.get_by_label("user_id").fill("find")
    page.get_by_role("button", name="find-me").click()
    page.get_by_role("heading", name="find-me: known").wait_for()


def test_the_catalog_leads_from_a_word_to_the_field_and_to_the_reason(console: Running, page: Page) -> None:
    watched = {
        "event_id": "t1",
        "viewer_id": 77,
        "content_id": "t",
        "genre": "crime",
        "watch_duration_sec": 120,
    }
    store(
        console.platform, "view_events", "file:t", [watched | {"watched_at": datetime.now(UTC).isoformat()}]
    )
    page.goto(f"{console.url}/catalog")
    page.get_by_label("Search").fill("attribute content_id")
    page.locator('[data-role="count"]').get_by_text(re.compile(r"^\d+ of")).wait_for()
    # In one go: between finding the place of a link and pressing there, the list may be drawn again.
    page.get_by_role("link", name=f"watch.titles_{SHORT}d").evaluate("link => link.click()")
    page.get_by_role("heading", name=f"watch.titles_{SHORT}d").wait_for()
    facts = page.locator('[data-role="facts"]')
    assert "Made from view_events.content_id" in facts.inner_text()
    assert "recommendations@example.com" in facts.inner_text()
    steps = [one.inner_text() for one in page.locator('[data-role="made-from"] > li').all()]
    assert steps == [
        "viewer_watch_metrics_1d.content_started aggregation",
        "view_events.content_id aggregation",
        "field view_events.content_id identity",
    ]
    assert (
        f"DynamoDB viewer_profiles, attribute titles_{SHORT}d"
        in page.locator('[data-role="goes-to"]').inner_text()
    )
    read = page.locator('[data-role="read"]').inner_text()
    assert f"select titles_{SHORT}d from viewer_engagement_rolling where viewer_id = 42" in read
    facts.get_by_role("row", name="null 0.0% of").wait_for()
    page.goto(f"{console.url}/catalog?kind=field&name=view_events.viewer_id")
    page.locator('[data-role="facts"]').get_by_role("row", name="examples none, it is personal").wait_for()
    page.goto(f"{console.url}/catalog?name=watch.titels")
    page.get_by_role("alert").get_by_text(f"did you mean watch.titles_{SHORT}d").wait_for()

    page.goto(f"{console.url}/catalog?kind=attribute&name=watch.titles_{SHORT}d")
    page.get_by_role("link", name="Why has somebody this value?").click()
    page.get_by_label("viewer_id").fill("77")
    page.get_by_label("viewer_id").press("Enter")
    page.locator('[data-role="verdict"]').get_by_text("They are equal.").wait_for()
    values = page.locator('[data-role="values"]')
    values.get_by_role("row", name="served 1", exact=True).wait_for()
    values.get_by_role("row", name="recomputed from tiles 1", exact=True).wait_for()
    page.get_by_role("table", name="Tiles: viewer_watch_metrics_1d").wait_for()
    page.get_by_role("table", name="Latest events: view_events").get_by_role("cell", name="t1").wait_for()


def test_why_shows_what_the_shop_knows_of_a_user(console: Running, page: Page) -> None:
    event = {"event_id": "w1", "user_id": "whose", "category": "lamp", "event_type": "purchase"}
    store(console.platform, "user.events", "file:w", [{**event, "event_time": datetime.now(UTC).isoformat()}])
    with console.platform.engine.connect() as session:
        known = "select 1 from user_category_profile where user_id = 'whose'"
        wait_for(lambda: session.execute(known).fetchone() is not None)
    page.goto(f"{console.url}/why?attribute=user_category_profile.affinity_score&user_id=whose")
    page.locator('[data-role="verdict"]').get_by_text("They are equal.").wait_for()
    for title in ("Served", "Recomputed from events"):
        assert "lamp\t10" in page.get_by_role("table", name=title).inner_text()
    page.goto(f"{console.url}/why?attribute=no.such")
    page.get_by_role("alert").get_by_text("the project has no attribute no.such").wait_for()


def test_an_event_about_a_viewer_is_followed_to_her_items(console: Running, page: Page) -> None:
    page.goto(f"{console.url}/viewers")
    search = page.get_by_label("viewer_id")
    search.press_sequentially("42")
    # By keyboard alone.
    search.press("Enter")
    page.get_by_role("heading", name="viewer 42", exact=True).wait_for()
    watch = page.get_by_role("region", name="watch")
    watch.get_by_text("no item: what a service gets for anybody new").wait_for()
    page.get_by_role("button", name="view_events", exact=True).click()
    page.get_by_label("watch_duration_sec").fill("-5")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").get_by_text(
        "the event would be rejected: negative watch_duration_sec"
    ).wait_for()
    page.get_by_label("watch_duration_sec").fill("600")
    page.get_by_label("genre").fill("crime")
    page.get_by_role("button", name="Send").click()
    watch.get_by_role("row", name=f"watch_minutes_{SHORT}d 10").wait_for()
    watch.get_by_text("newest event").wait_for()
    way = page.locator('[data-role="way"]')
    way.get_by_role("row", name="read watch").wait_for()
    stops = [cell.inner_text() for cell in way.locator("tbody td:first-child").all()]
    assert stops[:3] == ["sent", "arrival", "commit"]
    assert stops[3:5] == ["publish", "read"]
    step = way.get_by_role("row", name="commit step").locator("td").nth(1).inner_text()
    with console.platform.engine.connect() as session:
        held = session.execute(
            "select topic, source like 'console:%%' from live_trail where step = %s",
            [step.removeprefix("step ")],
        ).fetchall()
    assert ("view_events", True) in held


def test_viewers_are_searched_in_the_engine(console: Running, page: Page) -> None:
    page.goto(f"{console.url}/viewers")
    found = page.locator('[aria-label="Found"] button:visible')
    # The newest are offered, until something is typed. Other tests have made a few that are newer.
    page.get_by_role("button", name="100", exact=True).wait_for()
    page.get_by_label("viewer_id").fill("11")
    page.get_by_role("button", name="100", exact=True).wait_for(state="hidden")
    assert [button.inner_text() for button in found.all()] == [str(110 + number) for number in range(10)]
    page.get_by_role("button", name="117", exact=True).click()
    page.get_by_role("region", name="watch").get_by_role(
        "row", name=f"watch_minutes_{SHORT}d 1", exact=False
    ).wait_for()


def test_the_pipeline_shows_every_stage_and_leads_to_the_run_book(console: Running, page: Page) -> None:
    page.goto(f"{console.url}/pipeline")
    for line in ("engine/follower", "views/view_events", "online/watch"):
        page.locator(f'[data-line="{line}"]').wait_for()
    # Of the exports Iceberg's own process tells later; nothing was exported, so that something is red or warned of.
    state = page.locator('[data-line^="offline/"]').first
    state.wait_for()
    state.get_by_role("link").click()
    page.wait_for_url("**/runbook#stage-offline")
    page.locator("#stage-offline").get_by_text("prefs export").first.wait_for()


def test_it_fits_a_phone_and_the_dark(console: Running, browser: Browser) -> None:
    tab = browser.new_page(viewport={"width": 360, "height": 740})
    for path in (
        "/shop",
        "/viewers?entity=viewer&viewer_id=42",
        "/pipeline",
        "/catalog",
        "/why?viewer_id=42",
    ):
        tab.goto(f"{console.url}{path}")
        tab.locator("main h1").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert "body--light" in str(tab.locator("body").get_attribute("class"))
    tab.get_by_role("button", name="Light or dark").click()
    tab.locator("body.body--dark").wait_for()
    tab.goto(f"{console.url}/shop")
    tab.locator("body.body--dark").wait_for()
    tab.close()


def test_nothing_is_loaded_from_elsewhere(console: Running, browser: Browser) -> None:
    tab = browser.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    for path in ("/shop", "/viewers", "/pipeline", "/catalog", "/why", "/runbook"):
        tab.goto(f"{console.url}{path}")
        tab.locator("main h1").wait_for()
    assert [
        url for url in asked if not url.startswith((console.url, console.url.replace("http", "ws"), "data:"))
    ] == []
    tab.close()


def test_a_website_and_a_foreign_name_are_refused(console: Running) -> None:
    def code(path: str, **headers: str) -> int:
        asked = urllib.request.Request(
            f"{console.url}{path}", headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refused:
            return refused.code

    assert code("/shop") == 200
    for path in ("/shop", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        assert code(path, host="evil.example") == 403
        assert code(path, origin="https://evil.example") == 403
        assert code(path, sec_fetch_site="cross-site") == 403


def test_a_token_sees_its_pages_and_sends_only_with_its_scope(
    console: Running, warm: Warm, free_port: Callable[[], int], page: Page
) -> None:
    secret = "a-secret-of-more-than-24-characters"
    environment = {**console.environment, "PREFS_TOKENS": f"looker:shop+domains:sha256:{digest(secret)}"}
    with serving(warm, environment, free_port()) as url:
        page.goto(f"{url}/viewers?viewer_id=42")
        page.get_by_label("Token").fill(secret)
        page.get_by_role("button", name="Sign in").click()
        page.locator("main h1").get_by_text("Viewers").wait_for()
        assert page.get_by_role("link", name="Pipeline").count() == 0
        page.get_by_label("viewer_id").fill("42")
        page.get_by_label("viewer_id").press("Enter")
        page.get_by_text("Read only: the token 'looker' has domains, shop, and this needs send").wait_for()
        assert page.get_by_role("button", name="Send").count() == 0
        answer = page.goto(f"{url}/pipeline")
        assert answer is not None
        assert answer.status == 403
        page.goto(f"{url}/shop")
        page.get_by_role("link", name="Sign out looker").click()
        page.get_by_label("Token").wait_for()


def test_two_visitors_each_see_their_own_ranking(console: Running, browser: Browser, page: Page) -> None:
    page.goto(f"{console.url}/shop?user=one")
    other = browser.new_page()
    other.goto(f"{console.url}/shop?user=two")
    page.get_by_role("button", name="Wishlist maple lamp").click()
    other.get_by_role("button", name="Wishlist orbit kettle").click()
    page.locator('ol > li:first-child[data-item="lamp-2"]').wait_for()
    other.locator('ol > li:first-child[data-item="kettle-3"]').wait_for()
    other.close()
