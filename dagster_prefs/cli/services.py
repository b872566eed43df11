"""Commands that start, stop and show the services of this machine."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from dagster_prefs.cli.freshness import installed
from dagster_prefs.cli.root import (
    cli,
    console,
    environment_of,
    plain_console,
    print_json,
    services_of,
    start_follower,
    start_logging,
    start_services,
    table_of,
)
from dagster_prefs.ids import id_label
from dagster_prefs.settings import load_settings
from dagster_prefs.shipped import shipped

if TYPE_CHECKING:
    from dagster_prefs.tools.demo import Summary

# Where Dagster finds the code location, in the project's folder or the package's.
WORKSPACE = "workspace.yaml"


@cli.command()
@click.option(
    "--no-follow", is_flag=True, help="Only start the services; `prefs refresh` applies arrived events."
)
def up(no_follow: bool) -> None:
    """Start the embedded services and the follower.

    The services are PostgreSQL and the local AWS server. The follower keeps every view and item current. If nothing is
    deployed yet, the project is deployed first.
    """
    from dagster_prefs.declarations.registry import RegistryError, find_project
    from dagster_prefs.declarations.stale import current_registry

    settings = load_settings()
    # The services do not depend on a project; but if there is one, its registry must not be stale.
    project = None
    with suppress(RegistryError):
        project = find_project(named=settings.project_dir)
    if project is not None:
        current_registry(project)
    status = start_services(settings)
    if status is None:
        console.print(f"PREFS_ENGINE={settings.engine}: there is nothing to start on this machine")
        return
    for service in status.services:
        console.print(f"{service.name}: {'running' if service.running else 'down'} at {service.address}")
    if not status.started:
        console.print("everything was running already")
    if project is not None and not no_follow:
        start_follower(settings, project)
        console.print("follower: keeps views and items current; `prefs status` shows it")


@cli.command()
@click.option("--delete-state", is_flag=True, help="Also delete the data folder with everything in it.")
def down(delete_state: bool) -> None:
    """Stop the embedded services.

    Keeps the data folder unless an option deletes it.
    """
    settings = load_settings()
    services = services_of(settings)
    stopped = "stopped; DynamoDB's items were in memory, `prefs refresh` publishes them again"
    console.print(stopped if services.down() else "nothing was running")
    if delete_state:
        services.delete_state()
        import shutil

        if settings.data_dir.is_dir():
            shutil.rmtree(settings.data_dir)
        console.print(f"deleted {settings.data_dir}")


@cli.command()
@click.option("--port", default=3000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--console-port", default=3001, show_default=True, type=click.IntRange(1, 65535))
def ui(port: int, console_port: int) -> None:
    """Start the services, the Dagster UI and the console."""
    from dagster_prefs.defs.instance import ensure_dagster_home
    from dagster_prefs.defs.webserver import serve_ui
    from dagster_prefs.local.state import require_free_port

    settings = load_settings()
    start_logging(settings)
    # Dagster would silently choose another port.
    require_free_port(port, "--port")
    with_console = installed("nicegui")
    if with_console:
        require_free_port(console_port, "--console-port")
    start_services(settings)
    if settings.engine == "local":
        start_follower(settings, settings.project)
    home = ensure_dagster_home(settings.state_dir)
    beside = None
    if with_console:
        beside = [sys.executable, "-m", "dagster_prefs", "console", "--port", str(console_port)]
        console.print(f"the console will be at http://127.0.0.1:{console_port} in some seconds")
    else:
        console.print("the console is not installed: `pip install dagster-prefs[console]` adds it")
    console.print(f"the Dagster UI will be at http://127.0.0.1:{port} in half a minute; Ctrl-C stops both")
    environment = {**environment_of(settings, settings.project), "DAGSTER_HOME": str(home)}
    own = settings.home / WORKSPACE
    workspace = own if own.is_file() else shipped(WORKSPACE)
    raise SystemExit(serve_ui(workspace, port, environment, beside))


@cli.command()
@click.option("--viewers", default=5_000, show_default=True, type=click.IntRange(1))
@click.option("--view-events", default=200_000, show_default=True, type=click.IntRange(0))
@click.option("--shop-events", default=100_000, show_default=True, type=click.IntRange(0))
@click.option("--interactions", default=20_000, show_default=True, type=click.IntRange(0))
@click.option("--days", default=35, show_default=True, type=click.IntRange(1, 3650), help="Days of events.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="Last UTC day; by default the first demo's.")
@click.option("--seed", default=7, show_default=True, help="The same seed generates the same events.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary for machines.")
def demo(
    viewers: int,
    view_events: int,
    shop_events: int,
    interactions: int,
    days: int,
    until: datetime | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run the whole flow on generated events.

    Deploy, load, refresh, publish, test, export, read back. Afterwards the follower keeps everything current.
    """
    from dagster_prefs.declarations.stale import current_registry
    from dagster_prefs.tools.demo import Demo
    from dagster_prefs.tools.scenario import SimulationPlan
    from dagster_prefs.tools.simulator import fitted

    settings = load_settings()
    current_registry(settings.project)
    steps = plain_console(stderr=True)
    steps.print("start the services")
    if settings.engine == "local":
        services_of(settings).up()
    plan = SimulationPlan(
        seed=seed,
        viewers=viewers,
        days=days,
        view_events=view_events,
        shop_events=shop_events,
        interactions=interactions,
        end=datetime.now(UTC),
    )
    end = until.replace(tzinfo=UTC) + timedelta(days=1) if until else None
    summary = Demo(settings, fitted(settings.registry(), plan), steps.print, end).run()
    if settings.engine == "local":
        # Started last: the follower would apply the load in many small steps, concurrently with the demo.
        start_follower(settings, settings.project)
    if as_json:
        print_json(summary.as_dict())
        return
    print_summary(summary)


def print_summary(summary: Summary) -> None:
    """Print the summary of a demo."""
    console.print()
    console.print(table_of("Rows", ["relation", "rows"], [(n, f"{c:,}") for n, c in summary.rows.items()]))
    rows = [(t, why, f"{n:,}") for t, reasons in summary.rejected.items() for why, n in reasons.items()]
    console.print(table_of("\nRejected events", ["topic", "reason", "messages"], rows))
    for domain, values in summary.items.items():
        title = f"\n{summary.entity} {id_label(summary.id)} in DynamoDB: {domain}"
        console.print(table_of(title, ["attribute", "value"], list(values.items())))
    ranking = [(item, title, f"{score:.6f}") for item, title, score in summary.ranking]
    if summary.user_id is not None:
        title = f"\nTop items for user {summary.user_id}"
        console.print(table_of(title, ["item", "title", "score"], ranking))
    snapshots = [
        (name, snapshot.snapshot_id, len(snapshot.rows_per_day), f"{sum(snapshot.rows_per_day.values()):,}")
        for name, snapshot in summary.snapshots.items()
    ]
    console.print(table_of("\nIceberg", ["table", "snapshot", "days", "rows"], snapshots))
    console.print(table_of("\nFreshness", ["domain", "level", "why"], list(summary.freshness)))
    seconds = [(step, f"{taken:.1f}") for step, taken in summary.seconds.items()]
    console.print(table_of("\nSeconds", ["step", "s"], seconds))
    console.print("\nOpen the UI with `prefs ui`; stop the services with `prefs down`.")
