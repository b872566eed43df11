"""Photograph the console and the asset graph of the running product, for the README.

    python docs/images/take.py

Starts `prefs ui` on the state of the settings (after `make demo`), clicks as a visitor would, and writes the pictures
beside this file. Needs chromium on the PATH, and the packages of the group `dev`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).resolve().parent
PATIENCE_SECONDS = 300
# Root may not use the sandbox.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def main() -> None:
    """Start the UI and the console, take every picture, and stop them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--console-port", type=int, default=3001)
    ports = parser.parse_args()
    ui, console = (f"http://127.0.0.1:{port}" for port in (ports.port, ports.console_port))
    running = subprocess.Popen(
        [
            sys.executable, "-m", "dagster_prefs", "ui",
            "--port", str(ports.port), "--console-port", str(ports.console_port),
        ]
    )  # fmt: skip
    try:
        wait_for(running, lambda: asked(f"{console}/healthz") == b"ok\n")
        wait_for(running, lambda: bool(assets(ui)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            take(browser, "console-shop", lambda page: shop(page, console))
            take(browser, "console-viewers", lambda page: viewers(page, console), height=1250)
            take(browser, "console-pipeline", lambda page: pipeline(page, console))
            take(browser, "asset-graph", lambda page: graph(page, ui), width=2500, height=3200, scale=0.6)
            browser.close()
    finally:
        running.send_signal(signal.SIGINT)
        running.wait()


def take(
    browser: Browser,
    name: str,
    show: Callable[[Page], None],
    *,
    width: int = 1200,
    height: int = 900,
    scale: float = 1.0,
) -> None:
    """Write one picture, after `show` has brought a page to what it shows."""
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page.set_default_timeout(PATIENCE_SECONDS * 1000)
    show(page)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=FOLDER / f"{name}.png")
    print(f"{name}.png")
    page.close()


def shop(page: Page, console: str) -> None:
    """A new user who has clicked twice."""
    page.goto(f"{console}/shop")
    page.get_by_role("button", name="Be a new user").click()
    for place in (3, 7):
        page.locator("ol > li").nth(place).get_by_role("button").first.click()
        page.locator('[data-role="told"]').get_by_text("Ranked again").wait_for()
        time.sleep(2)


def viewers(page: Page, console: str) -> None:
    """The first viewer of the search, after an event of the first topic."""
    page.goto(f"{console}/viewers")
    page.locator('[aria-label="Found"] button').first.click()
    page.get_by_role("button", name="Send").click()
    page.locator('[data-role="way"] td').get_by_text("read", exact=True).first.wait_for()
    time.sleep(2)


def pipeline(page: Page, console: str) -> None:
    """Every stage, with some minutes of history."""
    page.goto(f"{console}/pipeline")
    page.locator("[data-line]").first.wait_for()
    time.sleep(90)


def graph(page: Page, ui: str) -> None:
    """The asset graph with all groups expanded."""
    page.goto(f"{ui}/asset-groups")
    page.get_by_text("operations", exact=True).first.wait_for()
    page.keyboard.press("Alt+e")
    page.get_by_text("deployments").first.wait_for()
    time.sleep(5)


def wait_for(running: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Wait until it has happened. Exits with a sentence if the product ends, or it takes too long."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if happened():
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        if running.poll() is not None:
            sys.exit("`prefs ui` ended: see what it printed")
        if time.monotonic() > end:
            sys.exit(f"`prefs ui` did not answer within {PATIENCE_SECONDS} s")
        time.sleep(1)


def asked(url: str, body: bytes | None = None) -> bytes:
    """Return the answer to a request."""
    # Both addresses are loopback's.
    request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


def assets(ui: str) -> list[object]:
    """Return the assets that Dagster has loaded."""
    told = json.loads(asked(f"{ui}/graphql", json.dumps({"query": "{ assetNodes { id } }"}).encode()))
    nodes: list[object] = told["data"]["assetNodes"]
    return nodes


if __name__ == "__main__":
    main()
