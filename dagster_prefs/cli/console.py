"""The command that serves the console."""

from __future__ import annotations

import click

from dagster_prefs.cli.freshness import installed, readings
from dagster_prefs.cli.root import cli
from dagster_prefs.cli.root import console as terminal
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import load_settings


class ConsoleMissing(PrefsError):
    """The console's packages are not installed."""


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=3001, show_default=True, type=click.IntRange(1, 65535))
def console(host: str, port: int) -> None:
    """Serve pages in a browser that show the running product.

    Until Ctrl-C or SIGTERM. Off loopback it needs a token (`prefs token`).
    """
    if not installed("nicegui"):
        raise ConsoleMissing(
            "the console needs NiceGUI, which is not installed: run `pip install dagster-prefs[platform,console]`"
        )
    from dagster_prefs.console import context
    from dagster_prefs.console.app import serve
    from dagster_prefs.console.lake_readings import LakeReadings
    from dagster_prefs.tools.simulator import holds_simulated_events

    settings = load_settings()
    _ = settings.registry()
    lake = LakeReadings(settings.registry)
    with readings(settings, lake) as read:
        pages = context.Console(
            settings,
            read_status=read,
            is_demo=lambda: holds_simulated_events(pages.engine),
            statistics=lake.statistics,
        )
        try:
            serve(
                pages,
                host=host,
                port=port,
                started=lambda url: terminal.print(f"the console is at {url}; Ctrl-C stops it"),
            )
        finally:
            pages.close()
