"""Commands that deploy models and deliver data: plan, apply, publish, export, cost."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from dagster_prefs.cli.root import cli, console, print_json, run_job, say, start_logging, table_of
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import load_settings

logger = logging.getLogger("dagster_prefs.publish")


@cli.group()
def contract() -> None:
    """Compare serving contracts."""


@contract.command("diff")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
def contract_diff(old: Path, new: Path) -> None:
    """Classify the differences between two registries' contracts.

    A breaking change needs a new version.
    """
    from dagster_prefs.declarations.contract import check_version, diff_contracts, load_contract

    before, after = load_contract(old), load_contract(new)
    for change in diff_contracts(before, after):
        console.print(f"{change.kind}: {change.path}: {change.what}")
    check_version(before, after)


@cli.command()
def refresh() -> None:
    """Apply everything that has arrived, and publish it.

    Waits for the follower if one runs. If nothing is deployed yet, the project is deployed first.
    """
    from dagster_prefs.engine.catalog import NotDeployed
    from dagster_prefs.platform import Platform

    settings = load_settings()
    if settings.engine == "local":
        with suppress(NotDeployed):
            say(Platform(settings).refresh(say))
            return
    from dagster_prefs.defs.feature_views import REFRESH_JOB

    run_job(settings, REFRESH_JOB)
    console.print("every view is current and every change is published")


@cli.command()
@click.argument("view")
@click.option(
    "--from-lake",
    is_flag=True,
    help="First restore the raw messages that have left the engine from the tables of `prefs export events`.",
)
def rebuild(view: str, from_lake: bool) -> None:
    """Compute VIEW, or `all`, again from all messages.

    Everything that it is made from is computed again too. The old rows serve until the new ones are known. Safe to run
    again after any failure.
    """
    from dagster_prefs.platform import Platform

    done = Platform(load_settings()).rebuild(view, from_lake=from_lake, say=say)
    console.print(f"rebuilt: {', '.join(done)}")


@cli.command()
def follow() -> None:
    """Keep views and items current, until it is stopped.

    For the embedded engine: `prefs up` starts one in the background. Ends with SIGINT or SIGTERM.
    """
    from dagster_prefs.platform import Platform

    settings = load_settings()
    if settings.engine != "local":
        raise PrefsError(
            "RisingWave keeps its own views current: this is for PREFS_ENGINE=local. With PREFS_PUBLISH=changefeed, "
            "`prefs publish --follow` follows its changes"
        )
    start_logging(settings)
    Platform(settings).follower().run(_until_signal())


def _until_signal() -> threading.Event:
    """Return an event that SIGINT and SIGTERM set, in place of ending the process."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


@cli.command()
@click.option(
    "--follow", is_flag=True, help="Continue with every change until SIGINT or SIGTERM (RisingWave)."
)
@click.option(
    "--full", is_flag=True, help="Compare whole views first, regardless of what was published (RisingWave)."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def publish(follow: bool, full: bool, as_json: bool) -> None:
    """Publish the changes of the rolling views to DynamoDB."""
    from dagster_prefs.dynamodb.changefeed import process_label, publish_changes
    from dagster_prefs.dynamodb.publisher import publish_domain
    from dagster_prefs.platform import Platform

    settings = load_settings()
    if not settings.publishes and not settings.follows:
        raise PrefsError(
            "RisingWave's own sinks write DynamoDB: set PREFS_PUBLISH=changefeed to publish from its subscriptions"
        )
    if settings.publishes and (follow or full):
        raise PrefsError(
            "the local engine's views change when they are refreshed, and have no changes to follow: run "
            "`prefs refresh` or `prefs follow`; `prefs reconcile` compares whole views"
        )
    stop = _until_signal() if settings.follows else threading.Event()
    if follow:
        start_logging(settings)
    stores = Platform(settings).stores()
    if settings.follows:
        reports: list[Any] = publish_changes(
            stores,
            mode="follow" if follow else "once",
            stop=stop,
            label=process_label(),
            lease_seconds=settings.changefeed_lease_seconds,
            full=full,
            notify=logger.info if follow else lambda message: say(message, stderr=True),
        )
    else:
        reports = [publish_domain(store) for store in stores]
    if as_json:
        print_json([vars(report) for report in reports])
        return
    for report in reports:
        console.print(f"{report.domain_key}: {report.upserts:,} upserts, {report.deletes:,} deletes")


@cli.command()
@click.option("--drop-orphans", is_flag=True, help="Also drop relations that have no model any more.")
@click.option("--unchanged", "list_unchanged", is_flag=True, help="Also list unchanged relations.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def plan(drop_orphans: bool, list_unchanged: bool, as_json: bool) -> int:
    """Compare the models with what is deployed.

    Exit code 0 if there is nothing to do, 2 for changes, 1 for errors.
    """
    from dagster_prefs.declarations.stale import current_registry
    from dagster_prefs.platform import Platform

    platform = Platform(load_settings())
    current_registry(platform.dbt.project_dir)
    with console.status("comparing the models with what is deployed"):
        found = platform.plan(drop_orphans=drop_orphans)
    if as_json:
        print_json(found.as_dict())
    else:
        say(found.text(list_unchanged=list_unchanged))
    if found.refusals:
        return 1
    return 2 if found.changes else 0


@cli.command("apply")
@click.option("--drop-orphans", is_flag=True, help="Also drop relations that have no model any more.")
def apply_command(drop_orphans: bool) -> None:
    """Apply the changes that `prefs plan` shows.

    Changed views are built as shadow relations and swapped in.
    """
    from dagster_prefs.declarations.stale import current_registry
    from dagster_prefs.platform import Platform

    platform = Platform(load_settings())
    current_registry(platform.dbt.project_dir)
    done = platform.apply(drop_orphans=drop_orphans, on_step=lambda step: say(f"  {step}"))
    if done.changes:
        console.print("done: the deployed relations match the declarations")
    else:
        say(done.text())


@cli.group(invoke_without_command=True)
@click.option(
    "--replace-foreign",
    is_flag=True,
    help="Also revert another writer's changes to exported days: rows added, deleted or replaced.",
)
@click.pass_context
def export(context: click.Context, replace_foreign: bool) -> None:
    """Export the days that Iceberg lacks or holds outdated.

    Days that another writer changed are left unchanged, and so are days that fail their audit; the exit code is then 1,
    and the message names these days with the reasons. Every other day is exported.
    """
    if context.invoked_subcommand is not None:
        return
    from dagster_prefs.declarations.stale import current_registry
    from dagster_prefs.iceberg.export import ExportOptions, ForeignRows
    from dagster_prefs.platform import Platform

    settings = load_settings()
    if replace_foreign and settings.export == "sink":
        raise PrefsError(
            "--replace-foreign is for PREFS_EXPORT=platform: here RisingWave's sinks write every file; drop a sink and "
            "recreate it to have its table rewritten"
        )
    current_registry(settings.project)
    exporter = Platform(settings).exporter
    found = exporter.look(datetime.now(UTC))
    wanted = {*found.stale, *(found.foreign if replace_foreign else ())}
    if wanted:
        with console.status("exporting to Iceberg"):
            exporter.export(
                wanted,
                ExportOptions(replace_foreign=replace_foreign),
                say=lambda line: say(line, stderr=True),
            )
    days = {day for _, day in wanted}
    if days or not found.foreign:
        console.print(
            f"exported {len(days)} days" if days else "every complete day is exported in its current version"
        )
    if found.foreign and not replace_foreign:
        raise ForeignRows(found.foreign)


@export.command("events")
@click.option("--topic", "only", multiple=True, help="Only this topic; may be given more than once.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def export_events(only: tuple[str, ...], as_json: bool) -> None:
    """Export the messages and events that arrived and that Iceberg lacks or holds outdated.

    Each topic has two tables, named like its relations: the raw messages with their bytes, and the typed events. Hours
    of arrival that fail their audit stay as they were; the exit code is then 1. Safe to run again at any time.
    """
    from dagster_prefs.declarations.stale import current_registry
    from dagster_prefs.iceberg.event_export import HoursFailed
    from dagster_prefs.platform import Platform

    settings = load_settings()
    current_registry(settings.project)
    with console.status("exporting events to Iceberg"):
        reports = Platform(settings).export_events(only)
    if as_json:
        print_json([report.as_dict() for report in reports])
    else:
        rows = [
            (
                report.topic,
                f"{report.raw_rows:,}",
                f"{report.typed_rows:,}",
                f"{report.lost:,}" if report.lost else "",
                *((f"{report.waiting:,}" if report.waiting else "",) if settings.raw_by_sink else ()),
                None if report.complete_until is None else report.complete_until.isoformat(),
            )
            for report in reports
        ]
        # Messages that RisingWave's sink has not written yet.
        waiting = ["waiting"] if settings.raw_by_sink else []
        head = ["topic", "messages written", "events written", "lost", *waiting, "complete until"]
        console.print(table_of("", head, rows))
    if failed := {(report.topic, hour): why for report in reports for hour, why in report.failed.items()}:
        raise HoursFailed(failed)


@cli.command()
@click.option("--entity", help="Entity of the profiles; optional if only one entity has domains.")
@click.option(
    "--entities",
    default=1_000_000,
    show_default=True,
    type=click.IntRange(1),
    help="Number of ids with an event within the longest window.",
)
@click.option("--events-per-day", type=click.IntRange(0), help="Events per day; by default 2 per id.")
@click.option(
    "--share",
    "shares",
    multiple=True,
    metavar="TOPIC=SHARE",
    help="A topic's share of the events, e.g. purchases=0.9; the project's `workload` by default.",
)
@click.option(
    "--daily-active-share",
    default=0.25,
    show_default=True,
    help="Share of the entities with an event of the busiest topic on a given day.",
)
@click.option("--domains", type=click.IntRange(1), help="Domains of one size, in place of the contract's.")
@click.option("--attributes", type=click.IntRange(1), help="Attributes of each of --domains; 5 by default.")
@click.option("--reads-per-day", default=0, show_default=True, type=click.IntRange(0), help="Profiles read.")
@click.option(
    "--refresh-seconds", default=1.0, show_default=True, help="Seconds between two writes of changes."
)
@click.option(
    "--spread-seconds", type=click.IntRange(0), help="PREFS_EXPIRY_SPREAD_SECONDS; the setting by default."
)
@click.option(
    "--peak-factor", default=3.0, show_default=True, help="Load of the busiest second over the mean."
)
@click.option("--history-days", default=365, show_default=True, help="Days of events that the engine keeps.")
@click.option("--raw-days", type=click.IntRange(1), help="Days of raw messages among them; all by default.")
@click.option(
    "--fenced", is_flag=True, help="Items are written in transactions, as by PREFS_PUBLISH=changefeed."
)
@click.option(
    "--price",
    multiple=True,
    metavar="NAME=DOLLARS",
    help="A price in place of the list price, e.g. million_write_units=0.7.",
)
@click.option(
    "--capacity",
    multiple=True,
    metavar="NAME=N",
    help="A capacity in place of the default, e.g. table_write_units=80000.",
)
@click.option("--table", is_flag=True, help="The table of docs/scale.md, 1 million to 1 billion entities.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def cost(
    entity: str | None,
    entities: int,
    events_per_day: int | None,
    shares: tuple[str, ...],
    table: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Estimate writes, cost and the first limit reached.

    docs/scale.md explains the formulas, and contains the table of --table.
    """
    from dagster_prefs.tools import cost as model

    settings = load_settings()
    registry = settings.registry()
    served = model.served_entity(registry, entity)
    prices = model.Prices(**model.overrides(given.pop("price"), model.Prices))
    capacities = model.Capacities(**model.overrides(given.pop("capacity"), model.Capacities))
    if table:
        say(model.scale_table(registry, served, prices=prices, capacities=capacities))
        return
    domains, attributes = given.pop("domains"), given.pop("attributes")
    if attributes and not domains:
        raise PrefsError("--attributes is the size of each of --domains: set --domains too")
    spread_seconds = given.pop("spread_seconds")
    workload = model.Workload(
        entities=entities,
        events_per_day=2 * entities if events_per_day is None else events_per_day,
        shares=model.topic_shares(registry, served, model.share_overrides(shares) if shares else None),
        spread_seconds=settings.expiry_spread_seconds if spread_seconds is None else spread_seconds,
        **given,
    )
    shape = model.project_shape(registry, served, entities)
    if domains:
        shape = model.uniform_shape(shape, domains, attributes or 5)
    target_seconds = model.target_of(registry.contract, served)
    found = model.estimate(
        workload, shape, target_seconds=target_seconds, prices=prices, capacities=capacities
    )
    if as_json:
        print_json(found.as_dict())
        return
    spread = found.needed_spread_seconds
    rows = [
        ("events a second, mean", f"{found.events_per_second:,}"),
        ("items put a day by events", f"{found.event_writes_per_day:,} ({found.writes_per_event} an event)"),
        ("items written at midnight", f"{found.burst_writes:,}, {found.burst_per_second:,} a second"),
        ("spread that midnight needs", "none is enough" if spread is None else f"{spread:,} s"),
        ("bytes of an item", ", ".join(f"{name} {size:,}" for name, size in found.item_bytes.items())),
        (
            "write units",
            f"{found.write_units_per_day:,} a day, {found.peak_write_units:,} in the busiest second",
        ),
        ("read units a day", f"{found.read_units_per_day:,}"),
        ("table", f"{found.items:,} items, {found.table_bytes / model.GIB:,.1f} GiB"),
        ("tiles a day", ", ".join(f"{name} {count:,}" for name, count in found.tile_rows_per_day.items())),
        (
            "lake",
            f"{found.lake_files_per_day:,} files a day, {found.lake_bytes_per_year / model.GIB:,.1f} GiB a year",
        ),
        ("engine", f"{sum(found.engine_rows.values()):,} rows, {found.engine_bytes / model.GIB:,.0f} GiB"),
    ]
    console.print(table_of("Workload", ["", ""], rows))
    console.print(
        table_of(
            "\nDollars a month",
            ["for", "$"],
            [(name, f"{amount:,.2f}") for name, amount in found.dollars.items()],
        )
    )
    console.print(f"An estimate at {model.PRICES_FROM}; set your own prices with --price.")
    limits = sorted(found.limits, key=lambda limit: limit.used, reverse=True)
    console.print(
        table_of(
            "\nWhat breaks first",
            ["limit", "used", "remedy"],
            [(limit.name, f"{limit.used:,.0%}", limit.remedy) for limit in limits],
        )
    )
