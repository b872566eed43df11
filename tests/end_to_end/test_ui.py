"""The Dagster UI on real state: launch a materialization as it does, and look at the asset graph."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import needs_chromium, opened_browser
from warm import WarmProcess

from tests.end_to_end.conftest import Place

pytestmark = pytest.mark.slow

LAUNCH = """
mutation ($executionParams: ExecutionParams!) {
  launchPipelineExecution(executionParams: $executionParams) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}
"""
RUN = "query ($runId: ID!) { runOrError(runId: $runId) { ... on Run { status } } }"
MATERIALIZED = """
query ($key: AssetKeyInput!) {
  assetOrError(assetKey: $key) { ... on Asset { assetMaterializations(limit: 1) {
    runId metadataEntries { label ... on IntMetadataEntry { intValue } } } } }
}
"""


class Ui:
    """The running webserver."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = json.load(answer)
        assert "errors" not in content, content
        data: dict[str, Any] = content["data"]
        return data


def wait_for(what: str, check: Callable[[], Any], seconds: float = 180) -> Any:
    """Poll until `check` gives something true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.5)
    pytest.fail(f"{what} did not happen within {seconds} s")


class Command:
    """`prefs ui` in a place of its own, started where a test needs it and it does not run."""

    def __init__(self, place: Place, port: int, console_port: int) -> None:
        self.place, self._port, self.console_port = place, port, console_port
        self.started: subprocess.Popen[str] | WarmProcess | None = None

    def ui(self) -> Ui:
        """The UI, once it has loaded the definitions."""
        found = Ui(f"http://127.0.0.1:{self._port}")
        if self.started is None:
            started = self.started = self.place.start(
                "prefs", "ui", "--port", str(self._port), "--console-port", str(self.console_port)
            )

            def ready() -> bool:
                assert started.poll() is None, started.communicate()
                try:
                    return len(found.ask("{ assetNodes { id } }")["assetNodes"]) > 0
                except (urllib.error.URLError, ConnectionError):
                    return False

            wait_for("the UI's start", ready)
        return found

    def interrupt(self) -> int | None:
        """Press Ctrl-C, and give the exit code once it has ended."""
        if self.started is None:
            return None
        ended, self.started = self.started, None
        os.kill(ended.pid, signal.SIGINT)
        ended.communicate(timeout=90)
        return ended.returncode


@pytest.fixture(scope="module")
def command(new_place: Callable[[], Place], free_port: Callable[[], int]) -> Iterator[Command]:
    found = Command(new_place(), free_port(), free_port())
    yield found
    found.interrupt()


@pytest.fixture
def ui(command: Command) -> Ui:
    return command.ui()


MUTATION = 'mutation { shutdownRepositoryLocation(repositoryLocationName: "x") { __typename } }'
SENT = json.dumps({"query": MUTATION})


def status(ui: Ui, method: str, path: str, body: str | None = None, **headers: str) -> int:
    """The status of an answer to a request with these headers, sent as they are."""
    connection = http.client.HTTPConnection(ui.url.removeprefix("http://"), timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, {"content-type": "application/json", **given})
        return connection.getresponse().status
    finally:
        connection.close()


FOREIGN = [
    {"host": "evil.example"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_website_can_start_nothing(ui: Ui, headers: dict[str, str]) -> None:
    assert status(ui, "POST", "/graphql", SENT) == 200
    assert status(ui, "POST", "/graphql", SENT, **headers) == 403
    assert status(ui, "GET", "/server_info", **headers) == 403
    # Dagster would run a mutation of an image's address.
    query = urllib.parse.quote(MUTATION)
    assert status(ui, "GET", f"/graphql?query={query}") == 405
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec_websocket_version": "13",
        "sec_websocket_key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "sec_websocket_protocol": "graphql-ws",
    }
    assert status(ui, "GET", "/graphql", **upgrade) == 101
    assert status(ui, "GET", "/graphql", **upgrade, **headers) == 403


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_can_start_nothing(ui: Ui) -> None:
    ask = (
        "import encodings.idna, http.client, os, sys; os.setuid(int(sys.argv[2]));"
        "c = http.client.HTTPConnection(sys.argv[1], timeout=60);"
        "c.request('GET', '/server_info'); print(c.getresponse().status)"
    )
    address = ui.url.removeprefix("http://")
    told = [
        subprocess.run(
            [sys.executable, "-c", ask, address, uid], capture_output=True, text=True, check=True
        ).stdout
        for uid in ("0", "54321")
    ]
    assert told == ["200\n", "403\n"]


def test_the_uis_own_pages_and_a_link_to_them_work(ui: Ui) -> None:
    own = {"origin": ui.url, "sec_fetch_site": "same-origin"}
    assert status(ui, "POST", "/graphql", SENT, **own) == 200
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert status(ui, "GET", "/assets", **link) == 200


def test_an_asset_is_materialized_by_a_click(ui: Ui) -> None:
    # The canary is in none of them.
    tables = ["raw_items", "items_parsed", "items", "erased_subjects"]
    outcome = ui.ask(
        LAUNCH,
        executionParams={
            "mode": "default",
            "runConfigData": "{}",
            "selector": {
                "repositoryLocationName": "dagster_prefs",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": [name]} for name in tables],
                "assetCheckSelection": [],
            },
        },
    )["launchPipelineExecution"]
    assert outcome["__typename"] == "LaunchRunSuccess", outcome
    run_id = outcome["run"]["runId"]
    status = wait_for(
        "the end of the run",
        lambda: (
            status
            if (status := ui.ask(RUN, runId=run_id)["runOrError"]["status"])
            in ("SUCCESS", "FAILURE", "CANCELED")
            else None
        ),
    )
    assert status == "SUCCESS"
    for name in tables:
        (event,) = ui.ask(MATERIALIZED, key={"path": [name]})["assetOrError"]["assetMaterializations"]
        assert event["runId"] == run_id
        assert {"label": "dagster/row_count", "intValue": 0} in event["metadataEntries"]


@needs_chromium
def test_the_asset_graph_shows_every_group_and_asset(ui: Ui, tmp_path: Path) -> None:
    with opened_browser() as browser:
        # Dagster draws what lies in the window, so that it has to be large, but nobody looks at each of its pixels.
        page = browser.new_page(viewport={"width": 2500, "height": 5000}, device_scale_factor=0.2)
        page.goto(f"{ui.url}/asset-groups")
        page.get_by_text("engagement", exact=True).first.wait_for(timeout=120_000)
        page.keyboard.press("Alt+e")  # expand all groups
        page.get_by_text("raw_user_events").first.wait_for(timeout=60_000)
        picture = tmp_path / "asset-graph.png"
        page.screenshot(path=picture)
        text = page.content()
    assert picture.stat().st_size > 20_000
    for group in (
        "events",
        "preferences",
        "engagement",
        "sinks",
        "operations",
        "online_store",
        "offline_store",
    ):
        assert group in text
    for asset in ("raw_user_events", "viewer_profiles", "view_events_parsed"):
        assert asset in text


def test_an_event_is_readable_without_another_command(command: Command, ui: Ui, tmp_path: Path) -> None:
    """The follower that the UI started applies and publishes it, also after it was killed."""

    def killed() -> bool:
        followers = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "dagster_prefs follow" in " ".join(process.info["cmdline"] or ())
            and process.environ().get("PREFS_DATA_DIR") == str(command.place.data_dir.resolve())
        ]
        for process in followers:
            process.kill()
        return bool(followers)

    for viewer in (4242, 4243):
        event = {
            "event_id": f"event of {viewer}",
            "viewer_id": viewer,
            "watch_duration_sec": 600,
            "watched_at": datetime.now(UTC).isoformat(),
        }
        file = tmp_path / f"{viewer}.jsonl"
        file.write_text(json.dumps(event) + "\n")
        command.place.ok("prefs", "ingest", str(file))

        def watched(viewer: int = viewer) -> bool:
            shown = json.loads(command.place.ok("prefs", "profile", str(viewer), "--json"))
            return bool(shown["domains"]["watch"]["attributes"]["last_event_at"])

        wait_for(f"the item of {viewer}", watched)
        if viewer == 4242:
            assert killed()


def test_the_console_is_beside_it(command: Command, ui: Ui) -> None:
    def answers() -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{command.console_port}/pipeline", timeout=60
            ) as page:
                return b"Pipeline" in page.read()
        except (urllib.error.URLError, ConnectionError):
            return False

    wait_for("the console's start", answers)


def test_ctrl_c_ends_the_ui_with_all_its_processes(command: Command, ui: Ui) -> None:
    assert command.started is not None
    parent = psutil.Process(command.started.pid)

    def processes() -> list[psutil.Process]:
        found: list[psutil.Process] = parent.children(recursive=True)
        return found

    def names(family: list[psutil.Process]) -> list[str]:
        found = []
        for process in family:
            # One that ends meanwhile has no name.
            with suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()))
        return found

    assert any("dagster_prefs.defs.webserver" in name for name in names(processes()))
    # It starts once the webserver answers.
    wait_for("the daemon's start", lambda: any("dagster-daemon" in name for name in names(processes())))
    assert status(ui, "POST", "/graphql", SENT, origin="https://evil.example") == 403
    # The embedded services stay, as `prefs down` says.
    stay = ("dagster_prefs.local.supervisor", "dagster_prefs follow", "postgres")
    family = [one for one in processes() if not any(kept in name for kept in stay for name in names([one]))]
    assert command.interrupt() == 0
    _, alive = psutil.wait_procs(family, timeout=120)
    assert names(alive) == []
