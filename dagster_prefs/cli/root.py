"""The `prefs` command group, and the functions that its commands share."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dagster_prefs import logs
from dagster_prefs.errors import PrefsError
from dagster_prefs.printable import printable
from dagster_prefs.settings import Settings

if TYPE_CHECKING:
    from dagster_prefs.events.raw import ProgressCallback
    from dagster_prefs.local.services import LocalServices, ServiceStatus


class SafeConsole(Console):
    """A console that escapes control characters in all it prints: a genre or a title may contain any."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render like rich, after making every text printable, also inside tables."""
        if isinstance(renderable, Text) and (shown := printable(renderable.plain)) != renderable.plain:
            escaped = renderable.copy()
            escaped.plain = shown
            renderable = escaped
        return super().render(renderable, options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to Text like rich, which would silently drop some control characters."""
        return super().render_str(printable(text), **options)


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text unchanged.

    Messages and file names may contain `[/b]` or `:smile:`, and a path that is wrapped at the screen's width
    cannot be copied.
    """
    return SafeConsole(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


console = plain_console()


class SafeFormatter(logging.Formatter):
    """A log formatter that escapes control characters, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record as one text."""
        return printable(super().format(record))


def say(text: object, *, stderr: bool = False) -> None:
    """Print text unchanged to stdout or stderr, with control characters escaped."""
    click.echo(printable(text), err=stderr)


def main() -> None:
    """Run the command. An expected failure prints one line to stderr and sets the exit code.

    Only this user may read files that a command and its child processes write: state, exports and rejected
    messages contain personal data.
    """
    # Looking for garbage after every 700 objects takes a fourth of the time of importing Dagster and dbt.
    gc.set_threshold(20_000, 10, 10)
    os.umask(0o077)
    if logging.lastResort is not None:
        # Used for log records, because no command configures logging.
        logging.lastResort.setFormatter(SafeFormatter())
    try:
        # click keeps handling usage errors; this code handles the errors that the platform raises.
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except PrefsError as error:
        say(f"error: {error}", stderr=True)
        sys.exit(error.exit_code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dagster-prefs")
def cli() -> None:
    """Real-time preference and engagement profiles."""


def start_logging(settings: Settings) -> None:
    """Write the log of a command that runs on to stderr, as the settings say."""
    logs.start_logging(settings.log_format, settings.log_level, secrets=settings.secrets)


def services_of(settings: Settings) -> LocalServices:
    """Return the embedded services that the settings configure."""
    # The packages of the embedded services may not be installed.
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
    """Start the embedded services if the engine is the embedded one, else return None."""
    if settings.engine != "local":
        return None
    return services_of(settings).up(progress=lambda step: console.print(f"  {step}", style="dim"))


def start_follower(settings: Settings, project: Path) -> None:
    """Make the embedded services keep everything current with these settings; deploys first if nothing is deployed."""
    from dagster_prefs.platform import Platform

    platform = Platform(settings)
    if not platform.is_deployed():
        console.print("  deploying the project", style="dim")
        platform.apply()
    services_of(settings).follow(environment_of(settings, project))


def environment_of(settings: Settings, project: Path) -> dict[str, str]:
    """Return the environment in which another process, in whatever folder, works on the same project and state."""
    return {
        **os.environ,
        "PREFS_DATA_DIR": str(settings.data_dir.expanduser().resolve()),
        "PREFS_PROJECT_DIR": str(project.resolve()),
    }


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressCallback]:
    """Show a counter on a terminal; silent elsewhere."""
    columns = (
        SpinnerColumn(),
        # The description is passed as a value instead of in the pattern, because a file name may contain
        # braces.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda progress: bar.update(task, completed=progress.done, total=progress.total)


def run_job(settings: Settings, job: str) -> None:
    """Run one Dagster job in this process, recorded on the same instance as the UI's runs."""
    from dagster_prefs.runs import JobRunner

    with console.status(f"running the Dagster job {job}"), JobRunner(settings) as runner:
        runner.run(job)


def print_json(value: Any) -> None:
    """Print JSON with exact numbers as strings of digits."""
    # The only control character that JSON leaves unescaped.
    click.echo(json.dumps(value, default=str, indent=2).replace("\x7f", "\\u007f"))


def table_of(
    title: str, columns: list[str], rows: list[tuple[Any, ...]], *, whole_names: bool = False
) -> Group:
    """Render a small table that cuts nothing off, however narrow the screen.

    With `whole_names` the first column is not folded, so that its names can be searched for and copied.
    """
    table = Table(show_edge=False, pad_edge=False)
    longest = max((len(_cell(row[0])) for row in rows), default=0)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", min_width=longest if whole_names and number == 0 else None)
    for row in rows:
        table.add_row(*map(_cell, row))
    # rich would wrap the table's own title at the table's width.
    return Group(Text(printable(title)), table) if title else Group(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    # A line feed would look like the next row.
    return (
        ", ".join(map(_cell, value)) if isinstance(value, list | tuple) else printable(value, one_line=True)
    )
