"""Commands that show freshness, and repair differences."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from dagster_prefs.cli.root import (
    cli,
    console,
    print_json,
    progress_bar,
    services_of,
    start_logging,
    table_of,
)
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from dagster_prefs.freshness.canary import Tick
    from dagster_prefs.freshness.levels import Measure
    from dagster_prefs.freshness.status import Status


@cli.command()
@click.option("--watch", is_flag=True, help="Refresh the screen every few seconds, until Ctrl-C.")
@click.option(
    "--interval",
    default=5.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds between refreshes of the screen.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def status(watch: bool, interval: float, as_json: bool) -> int:
    """Show services, lag and freshness.

    Exit code 0 for ok, 1 for warnings, 2 for errors.
    """
    from dagster_prefs.freshness.status import render_status

    settings = load_settings()
    with readings(settings) as read:
        while True:
            found = read()
            services = services_of(settings).status().services if settings.engine == "local" else ()
            if as_json:
                print_json({**found.as_dict(), "services": [vars(service) for service in services]})
            else:
                if watch:
                    console.clear()
                rows = [
                    (s.name, "running" if s.running else f"down: {s.detail}", s.address) for s in services
                ]
                if rows:
                    console.print(table_of("Services", ["service", "state", "address"], rows))
                    console.print()
                console.print(render_status(found))
            if not watch:
                return found.exit_code
            time.sleep(interval)


class OfflineReadings(Protocol):
    """Measures the training tables, and the drift of what is in them."""

    def exports(self, now: datetime) -> list[Measure]:
        """Return the measures of the training tables."""
        ...

    def drift(self, now: datetime) -> list[Measure]:
        """Return a measure for each cause of drift."""
        ...


@contextmanager
def readings(settings: Settings, offline: OfflineReadings | None = None) -> Iterator[Callable[[], Status]]:
    """Yield a function that reads all measures; those of the canary come from the stored ticks.

    `offline` measures the training tables and drift, which loads Iceberg's libraries into this process where it is
    None.
    """
    from dagster_prefs.freshness.canary import measure_canary
    from dagster_prefs.freshness.prober import prober_ticks
    from dagster_prefs.freshness.status import evaluate
    from dagster_prefs.platform import Platform

    sources = Platform(settings).sources
    if offline is not None:
        sources = replace(sources, exports=offline.exports, drift=offline.drift)

    def now() -> datetime:
        return datetime.now(UTC)

    with _sensor_ticks(settings) as sensors:
        yield lambda: evaluate(
            sources,
            now=now,
            extra=measure_canary(prober_ticks(settings.state_dir), sensors, sources.registry, now=now()),
        )


@contextmanager
def _sensor_ticks(settings: Settings) -> Iterator[Callable[[], Sequence[Tick]]]:
    """Yield a function that returns the ticks of Dagster's sensors, none where Dagster is not installed.

    Dagster is loaded only if its store cannot be read without it.
    """
    from dagster_prefs.freshness.canary import CANARY_SENSOR
    from dagster_prefs.freshness.probe_store import stored_ticks

    if not installed("dagster"):
        yield lambda: ()
        return
    told = os.environ.get("DAGSTER_HOME")
    sensor = settings.dagster_name(CANARY_SENSOR)
    home = Path(told or settings.state_dir / "dagster")
    with ExitStack() as stack:

        @cache
        def instance() -> DagsterInstance:
            from dagster_prefs.defs.instance import open_instance

            return stack.enter_context(open_instance(settings.state_dir))

        def ticks() -> Sequence[Tick]:
            # Dagster itself reports what is wrong with a DAGSTER_HOME that does not exist.
            stored = None if told and not home.is_dir() else stored_ticks(home, sensor)
            if stored is not None:
                return stored
            from dagster_prefs.defs.freshness import sensor_ticks

            return sensor_ticks(instance(), sensor)

        yield ticks


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        # An import hook blocks the package.
        return False


@cli.command()
@click.option("--port", default=9475, show_default=True, type=click.IntRange(1, 65535))
def metrics(port: int) -> None:
    """Serve the measures of `prefs status` to Prometheus.

    At /metrics, on loopback.
    """
    from dagster_prefs.freshness.metrics import MetricsServer
    from dagster_prefs.freshness.values import ValueMetrics
    from dagster_prefs.platform import Platform

    settings = load_settings()
    start_logging(settings)
    platform = Platform(settings)
    values = ValueMetrics(platform.statistics)
    with (
        readings(settings) as read,
        MetricsServer(read, port=port, others=[values]) as server,
    ):
        console.print(f"metrics at http://127.0.0.1:{server.server_port}/metrics; Ctrl-C stops")
        server.serve_forever()


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only count the differences.")
def reconcile(dry_run: bool) -> None:
    """Compare every row with DynamoDB and repair the differences.

    Writes stale and missing items, deletes extra ones.
    """
    from dagster_prefs.events.raw import Progress
    from dagster_prefs.freshness.reconcile import reconcile_domain
    from dagster_prefs.platform import Platform

    settings = load_settings()
    if settings.follows and not dry_run:
        raise PrefsError(
            "with PREFS_PUBLISH=changefeed only the holder of a domain's lease writes it: run `prefs publish --full`, "
            "which compares whole views and repairs; `prefs reconcile --dry-run` counts what differs"
        )
    for store in Platform(settings).sources.stores():
        with progress_bar(store.domain.name) as advance:
            report = reconcile_domain(
                store,
                now=datetime.now(UTC),
                dry_run=dry_run,
                progress=lambda compared: advance(Progress(compared, compared, None, "rows")),
            )
        console.print(
            f"{report.domain}: {report.compared:,} compared, {report.missing} missing, {report.different} stale,"
            f" {report.extra} extra, {report.overtaken} changed meanwhile{' (nothing written)' if dry_run else ''}"
        )


@cli.group()
def alerts() -> None:
    """Freshness alerts."""


@alerts.command("test")
def alerts_test() -> None:
    """Send a test message to PREFS_ALERT_WEBHOOK."""
    from dagster_prefs.freshness.alerts import channels

    settings = load_settings()
    if not settings.alert_webhooks:
        raise PrefsError("PREFS_ALERT_WEBHOOK is not set: set it to the webhook's https URL")
    for webhook in channels(settings.alert_webhooks):
        webhook.send("dagster-prefs: this is a test of the alerts")
    console.print("sent")
