"""The console of the shipped example, served by its command over a database that a follower keeps current."""

from __future__ import annotations

import signal
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from browser import opened_browser
from built_state import command_environment
from waiting import wait_for
from warm import Warm, WarmProcess

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.live.presence import read_follower
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@dataclass
class Running:
    """A served console: its address, the environment of its commands, and the platform behind it."""

    url: str
    environment: Mapping[str, str]
    platform: Platform


@contextmanager
def serving(warm: Warm, environment: Mapping[str, str], port: int, *options: str) -> Iterator[str]:
    """`prefs console` until the end of the block; gives its address once it answers."""
    process = warm.start(
        ["prefs", "console", "--port", str(port), *options], environment=environment, merge=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(process, url))
        yield url
    finally:
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)


def _answers(process: WarmProcess, url: str) -> bool:
    assert process.poll() is None, process.communicate(10)
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def place(
    copied_database: Callable[..., AbstractContextManager[EngineConfiguration]],
    deployed_template: EngineConfiguration,
    dynamodb_endpoint: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Platform, Mapping[str, str]]]:
    """A deployed engine with its follower, and the environment in which commands find it."""
    name = f"console_{uuid.uuid4().hex[:12]}"
    with copied_database(name, deployed_template) as engine, pytest.MonkeyPatch.context() as patch:
        given = command_environment(engine, tmp_path_factory.mktemp("console"), dynamodb_endpoint)
        given |= {
            "PREFS_TABLE_PREFIX": f"{name}_",
            "PREFS_CONSOLE_SEND": "on",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        for variable, value in given.items():
            patch.setenv(variable, value)
        platform = Platform(load_settings())
        platform.provision(platform.dynamodb())
        stop = threading.Event()
        follower = threading.Thread(target=platform.follower().run, args=[stop])
        follower.start()
        try:
            with engine.connect() as session:
                # It gives a sign of life after its first step.
                wait_for(lambda: read_follower(session, engine))
            yield platform, given
        finally:
            stop.set()
            follower.join()


@pytest.fixture(scope="module")
def console(
    place: tuple[Platform, Mapping[str, str]], warm: Warm, free_port: Callable[[], int]
) -> Iterator[Running]:
    """The console as its owner sees it on loopback, where sending is on."""
    platform, environment = place
    with serving(warm, environment, free_port()) as url:
        yield Running(url, environment, platform)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty tab of a desktop; what the page's scripts complain about fails the test."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    errors: list[Any] = []
    tab.on("pageerror", lambda error: errors.append(error))
    yield tab
    tab.close()
    assert errors == []
