"""The `prefs` command itself, and what its commands share."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import Settings

if TYPE_CHECKING:
    from dagster_prefs.local.services import LocalServices, ServiceStatus


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
    # Where the commands run without them, their packages are not installed.
    from dagster_prefs.local.services import LocalServices

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
        return lambda done: self._progress.update(task, completed=done.done, total=done.total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def run_job(settings: Settings, job: str, tags: dict[str, str] | None = None) -> None:
    """Run one Dagster job in this process, recorded on the same instance as the UI's runs."""
    from dagster_prefs.runs import JobRunner

    with JobRunner(settings) as runner:
        runner.run(job, tags)


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
