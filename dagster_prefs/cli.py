"""The `prefs` command. Each command parses, calls the room that does the work, and prints."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.errors import PrefsError
from dagster_prefs.local.services import LocalServices, ServiceStatus
from dagster_prefs.settings import PROJECT_ROOT, Settings, load_settings

console = Console(highlight=False)


def main() -> None:
    """Run the command; an expected failure is one line on stderr and its exit code."""
    try:
        # click's own handling of usage errors stays; ours covers what the platform raises.
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except PrefsError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dagster-prefs")
def cli() -> None:
    """Real-time preference and engagement profiles."""


def services_of(settings: Settings) -> LocalServices:
    """The embedded services that these settings ask for."""
    return LocalServices(
        settings.data_dir,
        settings.port,
        settings.local_aws_port,
        user=settings.user,
        database=settings.database,
        with_aws=settings.uses_local_aws,
    )


def start_services(settings: Settings) -> ServiceStatus | None:
    """Start the embedded services where the engine is the embedded one; None where it is not."""
    if settings.engine != "local":
        return None
    return services_of(settings).up(progress=lambda step: console.print(f"  {step}", style="dim"))


@cli.command()
def up() -> None:
    """Start the embedded services: PostgreSQL and the local AWS server."""
    settings = load_settings()
    status = start_services(settings)
    if status is None:
        console.print(f"PREFS_ENGINE={settings.engine}: there is nothing to start on this machine")
        return
    for service in status.services:
        console.print(f"{service.name}: {'running' if service.running else 'down'} at {service.address}")
    if not status.started:
        console.print("everything was running already")


@cli.command()
@click.option("--delete-state", is_flag=True, help="Also delete the data folder with everything in it.")
def down(delete_state: bool) -> None:
    """Stop the embedded services; the data stays unless told otherwise."""
    settings = load_settings()
    services = services_of(settings)
    console.print("stopped" if services.down() else "nothing was running")
    if delete_state:
        services.delete_state()
        import shutil

        if settings.data_dir.is_dir():
            shutil.rmtree(settings.data_dir)
        console.print(f"deleted {settings.data_dir}")


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--topic", help="Topic of the files; found from their content by default.")
@click.option("--mapping", type=click.Choice(["auto", "rees46"]), default="auto", help="Column mapping of CSV.")
@click.option("--shift-to-now", is_flag=True, help="Move the event times so that the newest event is now.")
def ingest(files: tuple[Path, ...], topic: str | None, mapping: str, shift_to_now: bool) -> None:
    """Load events from JSON lines or CSV files, gzipped or not; a re-run adds only what is missing."""
    from dagster_prefs.events.ingest import ingest_file

    settings = load_settings()
    for file in files:
        with progress_bar(f"{file.name}") as advance:
            report = ingest_file(
                EngineConnection.of(settings),
                file,
                topic=topic,
                mapping=mapping,
                shift_to_now=shift_to_now,
                now=datetime.now(UTC),
                progress=advance,
            )
        rate = report.lines / report.seconds if report.seconds else 0
        console.print(
            f"{file}: {report.accepted} messages into {report.topic}, {report.already_present} were there already"
            f" ({report.seconds:.1f} s, {rate:,.0f}/s)"
        )
    console.print("the views follow with the next refresh: `prefs refresh`, or the sensor new_events")


class progress_bar:
    """A counter of messages on a terminal; silent elsewhere."""

    def __init__(self, what: str) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn(what), BarColumn(), TextColumn("{task.completed:,.0f}"),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Any:
        self._progress.start()
        task = self._progress.add_task("", total=None)
        return lambda done: self._progress.update(task, completed=done)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@cli.command()
def ui() -> None:
    """Start the services and the Dagster UI on this state (loopback, port 3000)."""
    from dagster_prefs.defs.instance import ensure_dagster_home

    settings = load_settings()
    start_services(settings)
    home = ensure_dagster_home(settings.data_dir)
    console.print("the Dagster UI is at http://127.0.0.1:3000; Ctrl-C stops it")
    environment = {**os.environ, "DAGSTER_HOME": str(home)}
    dagster = str(Path(sys.executable).with_name("dagster"))
    command = [dagster, "dev", "-w", str(PROJECT_ROOT / "workspace.yaml"), "-h", "127.0.0.1", "-p", "3000"]
    os.chdir(PROJECT_ROOT)
    os.execve(dagster, command, environment)  # noqa: S606


@cli.group()
def contract() -> None:
    """The serving contract: tables, domains, attributes and freshness."""


@contract.command("build")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when the file is out of date.")
def contract_build(check: bool) -> None:
    """Generate contract.json from the YAML beside the rolling views."""
    from dagster_prefs.defs.resources import Platform
    from dagster_prefs.online.contract import (
        CONTRACT_PATH,
        build_contract,
        check_version,
        load_contract,
        parse_contract,
        render_contract,
    )

    built = build_contract(Platform(load_settings()).dbt.manifest())
    text = render_contract(built)
    if CONTRACT_PATH.read_text() == text:
        console.print("contract.json is up to date")
        return
    if check:
        raise PrefsError("contract.json is out of date: run `prefs contract build` and commit it")
    check_version(load_contract(), parse_contract(built))
    CONTRACT_PATH.write_text(text)
    console.print(f"wrote {CONTRACT_PATH}")


@contract.command("diff")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
def contract_diff(old: Path, new: Path) -> None:
    """Classify what changed between two contracts; a breaking change needs a new version."""
    from dagster_prefs.online.contract import check_version, diff_contracts, load_contract

    before, after = load_contract(old), load_contract(new)
    for change in diff_contracts(before, after):
        console.print(f"{change.kind}: {change.path}: {change.what}")
    check_version(before, after)


def print_json(value: Any) -> None:
    """Machine-readable output, exact numbers as strings of digits."""
    click.echo(json.dumps(value, default=str, indent=2))


def table_of(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> Table:
    """A small table for people."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*[str(value) for value in row])
    return table
