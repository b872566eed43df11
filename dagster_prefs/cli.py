"""The `prefs` command. Each command parses, calls the room that does the work, and prints."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import PROJECT_ROOT, Settings, load_settings

if TYPE_CHECKING:
    from dagster_prefs.demo import Summary
    from dagster_prefs.events.ingest import Delivery
    from dagster_prefs.freshness.status import Status
    from dagster_prefs.local.services import LocalServices, ServiceStatus
    from dagster_prefs.serving import ProfileClient

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
@click.option(
    "--mapping", type=click.Choice(["auto", "rees46"]), default="auto", help="Column mapping of CSV."
)
@click.option("--shift-to-now", is_flag=True, help="Move the event times so that the newest event is now.")
def ingest(
    files: tuple[Path, ...], topic: str | None, mapping: Literal["auto", "rees46"], shift_to_now: bool
) -> None:
    """Load events from JSON lines or CSV files, gzipped or not; a re-run adds only what is missing."""
    from dagster_prefs.events.ingest import ingest_file

    settings = load_settings()
    deliver = kafka_delivery(settings)
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
                deliver=deliver,
            )
        rate = report.lines / report.seconds if report.seconds else 0
        console.print(
            f"{file}: {report.accepted} messages into {report.topic}, {report.already_present} were there already"
            f" ({report.seconds:.1f} s, {rate:,.0f}/s)"
        )
    if settings.engine == "local":
        console.print("the views follow with the next refresh: `prefs refresh`, or the sensor new_events")


def kafka_delivery(settings: Settings) -> Delivery | None:
    """Where messages go whose raw tables a Kafka connector fills; None where this platform writes them."""
    if settings.engine != "risingwave" or not settings.kafka_bootstrap:
        return None
    from dagster_prefs.events.brokers import client_properties
    from dagster_prefs.events.kafka import KafkaWriter

    writer = KafkaWriter(settings.kafka_bootstrap, client=client_properties(settings))
    return writer.delivery(settings.kafka_topics)


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
    """Generate from the dbt project what the code reads: contract.json, training tables and the views behind them."""
    import tempfile

    from dagster_prefs.defs.resources import Platform
    from dagster_prefs.offline.tables import TILES_PATH, render_tiles
    from dagster_prefs.offline.windows import VIEWS, compile_views
    from dagster_prefs.online.contract import (
        CONTRACT_PATH,
        build_contract,
        check_version,
        load_contract,
        parse_contract,
        render_contract,
    )

    dbt = Platform(load_settings()).dbt
    manifest = dbt.manifest()
    built = build_contract(manifest)
    contract = parse_contract(built)
    check_version(load_contract(), contract)
    relations = [domain.relation for domain in contract.domains.values()]
    with tempfile.TemporaryDirectory() as target:
        views = compile_views(dbt.project_dir, Path(target), relations)
    wanted = {CONTRACT_PATH: render_contract(built), TILES_PATH: render_tiles(manifest)}
    wanted |= {VIEWS / f"{relation}.sql": text for relation, text in views.items()}
    outdated = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    gone = [path for path in VIEWS.glob("*.sql") if path not in wanted]
    for path in outdated + gone:
        if check:
            raise PrefsError(f"{path.name} is out of date: run `prefs contract build` and commit it")
    for path in outdated:
        path.write_text(wanted[path])
        console.print(f"wrote {path}")
    for path in gone:
        path.unlink()
        console.print(f"removed {path}, which no domain reads any more")
    if not outdated and not gone:
        console.print("contract.json, the training tables and the views behind them are up to date")


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


@cli.command()
def refresh() -> None:
    """Bring every view up to date and publish what changed, as one Dagster run."""
    from dagster_prefs.defs.feature_views import REFRESH_JOB

    settings = load_settings()
    run_job(settings, REFRESH_JOB)
    console.print("every view is current and every change is published")


@cli.command()
@click.option("--follow", is_flag=True, help="Go on with every change until SIGINT or SIGTERM (RisingWave).")
@click.option("--full", is_flag=True, help="Compare whole views first, whatever was published (RisingWave).")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def publish(follow: bool, full: bool, as_json: bool) -> None:
    """Publish what changed in the rolling views to DynamoDB."""
    import signal
    import threading

    from dagster_prefs.online.changefeed import process_label, publish_changes
    from dagster_prefs.online.contract import load_contract
    from dagster_prefs.online.publisher import publish_domain
    from dagster_prefs.online.tables import dynamodb_client, provision

    settings = load_settings()
    if not settings.publishes and not settings.follows:
        raise PrefsError(
            "RisingWave's own sinks write DynamoDB: set PREFS_PUBLISH=changefeed to publish from its subscriptions"
        )
    if settings.publishes and (follow or full):
        raise PrefsError(
            "the local engine's views change when they are refreshed, and have no changes to follow: run "
            "`prefs refresh` or the sensor new_events; `prefs reconcile` compares whole views"
        )
    stop = threading.Event()
    if settings.follows:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
    engine, contract = EngineConnection.of(settings), load_contract()
    client = dynamodb_client(settings.aws_endpoint, settings.aws_region)
    table = provision(client, contract, prefix=settings.table_prefix, mode=settings.provisioning)
    if settings.follows:
        reports: list[Any] = publish_changes(
            engine,
            client,
            contract,
            table,
            mode="follow" if follow else "once",
            stop=stop,
            label=process_label(),
            promise_seconds=settings.changefeed_lease_seconds,
            full=full,
            notify=lambda message: click.echo(message, err=True),
        )
    else:
        reports = [publish_domain(engine, client, contract, domain, table) for domain in contract.domains]
    if as_json:
        print_json([vars(report) for report in reports])
        return
    for report in reports:
        console.print(f"{report.domain_key}: {report.upserts:,} upserts, {report.deletes:,} deletes")


@cli.command()
@click.option("--drop-orphans", is_flag=True, help="Also drop relations that have no model any more.")
@click.option("--unchanged", "list_unchanged", is_flag=True, help="Also list what stays as it is.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def plan(drop_orphans: bool, list_unchanged: bool, as_json: bool) -> int:
    """Compare the models with what is deployed; exit 0 when nothing is to do, 2 for changes, 1 for errors."""
    from dagster_prefs.defs.deployment import plan_of
    from dagster_prefs.defs.resources import Platform

    found = plan_of(Platform(load_settings()), drop_orphans=drop_orphans)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(found.text(list_unchanged=list_unchanged))
    if found.refusals:
        return 1
    return 2 if found.changes else 0


@cli.command("apply")
@click.option("--drop-orphans", is_flag=True, help="Also drop relations that have no model any more.")
def apply_command(drop_orphans: bool) -> None:
    """Carry out what `prefs plan` shows: changed views are built beside the old ones and swapped."""
    from dagster_prefs.defs.deployment import apply_to
    from dagster_prefs.defs.resources import Platform

    done = apply_to(
        Platform(load_settings()), drop_orphans=drop_orphans, on_step=lambda step: click.echo(f"  {step}")
    )
    if done.changes:
        console.print("done: what runs is what is written")
    else:
        click.echo(done.text())


@cli.command()
def export() -> None:
    """Export exactly the days of tiles that Iceberg lacks or holds in an older state."""
    from dagster_prefs.defs.offline_store import EXPORT_JOB, days_that_need_export, range_tags, ranges
    from dagster_prefs.defs.resources import Platform

    settings = load_settings()
    days = days_that_need_export(Platform(settings))
    for first, last in ranges(days):
        run_job(settings, EXPORT_JOB, range_tags(first, last))
    console.print(f"exported {len(days)} days" if days else "every complete day is exported as it is")


def run_job(settings: Settings, job: str, tags: dict[str, str] | None = None) -> None:
    """Run one Dagster job in this process, recorded on the same instance as the UI's runs."""
    from dagster_prefs.runs import JobRunner

    with JobRunner(settings) as runner:
        runner.run(job, tags)


@cli.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.pass_context
def topics(context: click.Context, as_json: bool) -> None:
    """Show the Kafka topics, and whether each is still the one whose messages were read."""
    if context.invoked_subcommand is not None:
        return
    from dagster_prefs.defs.resources import Platform

    lives = Platform(kafka_settings()).kafka_topics()
    if as_json:
        print_json([{**vars(life), "state": life.state, "source": life.source} for life in lives])
        return
    rows = [(life.kafka_topic, life.generation, life.state, life.source) for life in lives]
    console.print(table_of("", ["topic", "generation", "state", "source"], rows))


@topics.command("renew")
def topics_renew() -> None:
    """Read topics that were deleted and made anew from their start, beside the messages of the old ones."""
    from dagster_prefs.defs.resources import Platform

    settings = kafka_settings()
    platform = Platform(settings)
    found = [life for life in platform.kafka_topics() if life.state == "recreated"]
    platform.kafka_topics(note=True)
    if settings.engine == "risingwave":
        feeds = platform.dbt.run("run", ["config.materialized:kafka_feed"])
        if failed := [f"{feed.name}: {feed.message}" for feed in feeds if not feed.ok]:
            raise PrefsError("; ".join(failed))
    for life in found:
        console.print(f"{life.kafka_topic}: generation {life.generation + 1} is read from its start")
    if not found:
        console.print("every topic is the one that was read")


@cli.command()
@click.option("--topic", help="Only this topic.")
@click.option("--follow", is_flag=True, help="Go on with what arrives, until Ctrl-C; needs --topic.")
def consume(topic: str | None, follow: bool) -> None:
    """Read Kafka topics into the raw tables of the embedded engine, from where the last reading ended."""
    from dagster_prefs.defs.resources import Platform
    from dagster_prefs.events.brokers import client_properties
    from dagster_prefs.events.formats import find_topic
    from dagster_prefs.events.kafka import ingest_topic

    settings = kafka_settings()
    if settings.engine != "local":
        raise PrefsError("on RisingWave the feeds read Kafka: run `dbt run` in dbt_project/")
    if follow and topic is None:
        raise PrefsError("--follow reads one topic at a time: name it with --topic")
    names = [find_topic(topic).name] if topic else list(settings.kafka_topics)
    lives = {life.kafka_topic: life for life in Platform(settings).kafka_topics(note=True)}
    for name in names:
        kafka_topic = settings.kafka_topics[name]
        with progress_bar(name) as advance:
            report = ingest_topic(
                EngineConnection.of(settings),
                settings.kafka_bootstrap or "",
                name,
                kafka_topic=kafka_topic,
                generation=lives[kafka_topic].generation,
                start=settings.kafka_start,
                until=None if follow else "end",
                client=client_properties(settings),
                progress=advance,
            )
        console.print(f"{name}: {report.accepted} messages of {report.source} ({report.seconds:.1f} s)")
    console.print("the views follow with the next refresh: `prefs refresh`, or the sensor new_events")


def kafka_settings() -> Settings:
    """The settings, which must name brokers."""
    settings = load_settings()
    if not settings.kafka_bootstrap:
        raise PrefsError("PREFS_KAFKA_BOOTSTRAP names no brokers: set it to their host:port list")
    return settings


@cli.group(invoke_without_command=True)
@click.option("--topic", help="Only this topic.")
@click.option("--reason", help="Only this reason; lists the messages instead of counting them.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--all", "with_replayed", is_flag=True, help="Those that were replayed, too.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.pass_context
def rejected(
    context: click.Context,
    topic: str | None,
    reason: str | None,
    limit: int,
    with_replayed: bool,
    as_json: bool,
) -> None:
    """Count rejected messages by reason, or list those of one topic or reason."""
    if context.invoked_subcommand is not None:
        return
    from dagster_prefs.events.rejected import rejected_counts, rejected_events

    engine = EngineConnection.of(load_settings())
    open_only = not with_replayed
    if topic or reason:
        events = rejected_events(engine, topic, reason, limit, open_only=open_only)
        if as_json:
            print_json([vars(event) for event in events])
            return
        rows = [(e.topic, e.source, f"{e.partition}/{e.offset}", e.reason, e.payload[:100]) for e in events]
        console.print(table_of("", ["topic", "source", "partition/offset", "reason", "message"], rows))
        return
    counts = rejected_counts(engine, open_only=open_only)
    if as_json:
        print_json(counts)
        return
    counted = [(name, why, f"{n:,}") for name, reasons in counts.items() for why, n in reasons.items()]
    console.print(
        table_of("", ["topic", "reason", "messages"], counted) if counted else "no rejected message is open"
    )


@rejected.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--topic", help="Only this topic.")
@click.option("--reason", help="Only this reason.")
def rejected_export(file: Path, topic: str | None, reason: str | None) -> None:
    """Write the open rejected messages to a new JSON-lines file, to be corrected and replayed."""
    from dagster_prefs.events.replay import export_rejected

    written = export_rejected(EngineConnection.of(load_settings()), file, topic, reason)
    console.print(
        f"{file}: {written} messages; correct each payload, then `prefs rejected replay {file}`",
        soft_wrap=True,
        markup=False,
    )


@rejected.command("replay")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--skip-invalid", is_flag=True, help="Send what is valid now and leave the rest of the file out."
)
@click.option("--unchanged", is_flag=True, help="Without a file: send those again that are valid by now.")
@click.option("--topic", help="With --unchanged: only this topic.")
@click.option("--reason", help="With --unchanged: only this reason.")
def rejected_replay(
    file: Path | None, skip_invalid: bool, unchanged: bool, topic: str | None, reason: str | None
) -> None:
    """Send corrected messages of an exported file again; what was replayed before is left out."""
    from dagster_prefs.events.replay import ReplayError, replay_file, replay_unchanged

    if (file is None) != unchanged or (file is not None and (topic or reason)):
        raise click.UsageError("give either a FILE of corrections, or --unchanged with --topic or --reason")
    settings = load_settings()
    engine, deliver = EngineConnection.of(settings), kafka_delivery(settings)
    now = datetime.now(UTC)
    if file is None:
        report = replay_unchanged(engine, topic, reason, now=now, deliver=deliver)
    else:
        try:
            report = replay_file(engine, file, now=now, skip_invalid=skip_invalid, deliver=deliver)
        except ReplayError as error:
            for line, why in error.problems:
                console.print(f"{file}, line {line}: {why}", soft_wrap=True, markup=False)
            raise
    console.print(f"{report.sent} messages sent, {report.already_replayed} were replayed before")
    for why, count in report.left_out.items():
        console.print(f"{count} left out: {why}", soft_wrap=True, markup=False)
    if settings.engine == "local" and report.sent:
        console.print("the views follow with the next refresh: `prefs refresh`, or the sensor new_events")


def profile_client(settings: Settings) -> ProfileClient:
    """A client for people, who rather wait for the local AWS server than see half a profile."""
    from dagster_prefs.serving import ProfileClient

    return ProfileClient(
        endpoint_url=settings.aws_endpoint,
        region=settings.aws_region,
        table_prefix=settings.table_prefix,
        budget_seconds=30.0,
        read_timeout_seconds=30.0,
    )


@cli.command()
@click.argument("viewer", type=int)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def profile(viewer: int, as_json: bool) -> None:
    """Read one viewer's items from DynamoDB, as a service would."""
    settings = load_settings()
    with profile_client(settings) as client:
        found = client.get(viewer).as_dict()
    if as_json:
        print_json(found)
        return
    for domain, read in found["domains"].items():
        rows = list((read["attributes"] or {"": read["error"]}).items())
        console.print(table_of(f"viewer {viewer}: {domain}", ["attribute", "value"], rows))


@cli.command()
@click.argument("user")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--session/--no-session", default=True, show_default=True, help="React to the last hours.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def rank(user: str, limit: int, session: bool, as_json: bool) -> None:
    """Rank the catalogue for one user."""
    from dagster_prefs.serving import PreferenceClient

    with PreferenceClient(EngineConnection.of(load_settings())) as client:
        ranking = client.rank(user, limit=limit, session=session, now=datetime.now(UTC))
    if as_json:
        print_json([item.as_dict() for item in ranking])
        return
    rows = [
        (
            item.item_id,
            item.title or "",
            item.category or "",
            item.score,
        )
        for item in ranking
    ]
    console.print(table_of(f"items for {user}", ["item", "title", "category", "score"], rows))


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535))
@click.option("--only", type=click.Choice(["profiles", "users"]), help="Leave the other half out.")
@click.option(
    "--budget-ms", default=1000, show_default=True, type=click.IntRange(1, 30_000), help="Time for an answer."
)
@click.option("--threads", default=8, show_default=True, type=click.IntRange(1, 256), help="Reads at a time.")
@click.option(
    "--max-in-flight", default=256, show_default=True, type=click.IntRange(1), help="More are refused."
)
@click.option(
    "--ranker",
    type=click.Choice(["memory", "sql"]),
    default="memory",
    show_default=True,
    help="Rank from the catalogue in memory, or in the engine.",
)
@click.option(
    "--refresh-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Age of the catalogue.",
)
@click.option(
    "--drain-seconds", default=10, show_default=True, type=click.IntRange(0), help="Time to end in."
)
def serve(
    host: str,
    port: int,
    only: str | None,
    budget_ms: int,
    threads: int,
    max_in_flight: int,
    ranker: str,
    refresh_seconds: float,
    drain_seconds: int,
) -> None:
    """Serve profiles and rankings over HTTP until Ctrl-C or SIGTERM."""
    from dagster_prefs.serving import AsyncProfileClient, PreferenceClient
    from dagster_prefs.serving.server import make_app
    from dagster_prefs.serving.server import serve as run_server

    settings = load_settings()
    budget = budget_ms / 1000
    profiles = preferences = None
    if only != "users":
        profiles = AsyncProfileClient(
            threads=threads,
            endpoint_url=settings.aws_endpoint,
            region=settings.aws_region,
            table_prefix=settings.table_prefix,
            budget_seconds=budget,
            read_timeout_seconds=budget,
        )
    if only != "profiles":
        preferences = PreferenceClient(
            EngineConnection.of(settings), pool_size=threads, statement_timeout_seconds=max(5.0, budget)
        )
    app = make_app(
        profiles,
        preferences,
        budget_seconds=budget,
        catalogue_refresh_seconds=refresh_seconds if ranker == "memory" else None,
        max_in_flight=max_in_flight,
        threads=threads,
    )
    run_server(
        app,
        host=host,
        port=port,
        drain_seconds=drain_seconds,
        started=lambda url: console.print(f"serving at {url}; Ctrl-C stops"),
    )


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
    """Run the whole flow on generated events: load, refresh, publish, export, read back."""
    from dagster_prefs.demo import Demo
    from dagster_prefs.events.simulator import SimulationPlan

    settings = load_settings()
    steps = Console(stderr=True, highlight=False)
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
    summary = Demo(settings, plan, steps.print, end).run()
    if as_json:
        print_json(summary.as_dict())
        return
    print_summary(summary)


def print_summary(summary: Summary) -> None:
    """The outcome of a demo for people."""
    console.print()
    console.print(table_of("Rows", ["relation", "rows"], [(n, f"{c:,}") for n, c in summary.rows.items()]))
    rows = [(t, why, f"{n:,}") for t, reasons in summary.rejected.items() for why, n in reasons.items()]
    console.print(table_of("\nRejected events", ["topic", "reason", "messages"], rows))
    for domain, values in summary.items.items():
        title = f"\nViewer {summary.viewer_id} in DynamoDB: {domain}"
        console.print(table_of(title, ["attribute", "value"], list(values.items())))
    ranking = [(item, title, f"{score:.6f}") for item, title, score in summary.ranking]
    console.print(table_of(f"\nTop items for user {summary.user_id}", ["item", "title", "score"], ranking))
    snapshots = [
        (name, snapshot.snapshot_id, len(snapshot.rows_per_day), f"{sum(snapshot.rows_per_day.values()):,}")
        for name, snapshot in summary.snapshots.items()
    ]
    console.print(table_of("\nIceberg", ["table", "snapshot", "days", "rows"], snapshots))
    console.print(table_of("\nFreshness", ["domain", "level", "why"], list(summary.freshness)))
    seconds = [(step, f"{taken:.1f}") for step, taken in summary.seconds.items()]
    console.print(table_of("\nSeconds", ["step", "s"], seconds))
    console.print("\nOpen the UI with `make ui`; stop the services with `make down`.")


@cli.command()
@click.option("--watch", is_flag=True, help="Look again every few seconds until Ctrl-C.")
@click.option(
    "--interval", default=5.0, show_default=True, type=click.FloatRange(1), help="Seconds between looks."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def status(watch: bool, interval: float, as_json: bool) -> int:
    """Show services, lag and freshness; exit 0 for ok, 1 for warnings, 2 for errors."""
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


@contextmanager
def readings(settings: Settings) -> Iterator[Callable[[], Status]]:
    """What takes all readings: of the stages themselves, and of the canary where its sensor left them."""
    from dagster_prefs.defs.freshness import last_probe
    from dagster_prefs.defs.instance import open_instance
    from dagster_prefs.freshness.status import Sources, evaluate

    sources = Sources(settings)
    with open_instance(settings.data_dir) as instance:

        def read() -> Status:
            canary = last_probe(instance, sources.contract, now=datetime.now(UTC))
            return evaluate(sources, now=lambda: datetime.now(UTC), extra=canary)

        yield read


@cli.command()
@click.option("--port", default=9475, show_default=True, type=click.IntRange(1, 65535))
def metrics(port: int) -> None:
    """Serve the readings of `prefs status` at /metrics for Prometheus (loopback)."""
    from dagster_prefs.freshness.metrics import MetricsServer

    with readings(load_settings()) as read, MetricsServer(read, port=port) as server:
        console.print(f"metrics at http://127.0.0.1:{server.server_port}/metrics; Ctrl-C stops")
        server.serve_forever()


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only count what differs.")
def reconcile(dry_run: bool) -> None:
    """Compare every viewer with DynamoDB; repair stale, missing and extra items."""
    from dagster_prefs.freshness.reconcile import reconcile_domain
    from dagster_prefs.freshness.status import Sources

    sources = Sources(load_settings())
    client, table = sources.dynamodb()
    for domain in sources.contract.domains.values():
        report = reconcile_domain(
            sources.engine,
            client,
            sources.contract,
            domain,
            table,
            now=datetime.now(UTC),
            dry_run=dry_run,
        )
        console.print(
            f"{domain.name}: {report.compared:,} compared, {report.missing} missing, {report.different} stale,"
            f" {report.extra} extra, {report.overtaken} changed meanwhile{' (nothing written)' if dry_run else ''}"
        )


@cli.group()
def alerts() -> None:
    """Alerts of freshness."""


@alerts.command("test")
def alerts_test() -> None:
    """Send a message to PREFS_ALERT_WEBHOOK."""
    from dagster_prefs.freshness.alerts import Webhook

    settings = load_settings()
    if settings.alert_webhook is None:
        raise PrefsError("PREFS_ALERT_WEBHOOK is not set: set it to the webhook's https URL")
    Webhook(settings.alert_webhook.get_secret_value()).send("dagster-prefs: this is a test of the alerts")
    console.print("sent")


@cli.group("training-set", invoke_without_command=True)
@click.option("--labels", help="Parquet or CSV file, or Iceberg table: viewer_id, label_time, …")
@click.option(
    "--output",
    help="Parquet or CSV file, or Iceberg table, to write; by default <labels>.training.parquet.",
)
@click.option("--manifest", type=click.Path(path_type=Path), help="By default <output>.manifest.json.")
@click.option("--tag", help="Tag the tile snapshots, so that the set stays reproducible.")
@click.option("--timezone", help="Zone of label times that have none, e.g. UTC.")
@click.option("--as-known", is_flag=True, help="Never use a tile version written after the label's time.")
@click.option(
    "--print-sql",
    type=click.Choice(["trino", "spark", "athena"]),
    help="Only print the join in this engine's SQL, over labels in an Iceberg table.",
)
@click.pass_context
def training_set(
    context: click.Context,
    labels: str | None,
    output: str | None,
    manifest: Path | None,
    tag: str | None,
    timezone: str | None,
    as_known: bool,
    print_sql: Literal["trino", "spark", "athena"] | None,
) -> None:
    """Join every label with the features as they were known at its time; a manifest tells how to do so again."""
    if context.invoked_subcommand is not None:
        return
    if labels is None:
        raise click.UsageError("--labels is missing: name a Parquet or CSV file, or an Iceberg table")
    from dagster_prefs.defs.resources import Platform
    from dagster_prefs.offline.training_set import build_training_set, print_training_sql

    platform = Platform(load_settings())
    if print_sql is not None:
        namespace = platform.settings.iceberg_namespace
        click.echo(
            print_training_sql(platform.catalog(), labels, print_sql, as_known=as_known, namespace=namespace)
        )
        return
    made = build_training_set(
        platform.catalog(),
        labels,
        output or str(Path(labels).with_suffix(".training.parquet")),
        now=datetime.now(UTC),
        contract_version=platform.contract.version,
        timezone=timezone,
        as_known=as_known,
        manifest=manifest,
        tag=tag,
        namespace=platform.settings.iceberg_namespace,
    )
    console.print(
        f"{made.rows:,} rows ({made.cold_start_rows:,} without history) in {made.output}; manifest {made.manifest}"
    )


@training_set.command("reproduce")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--output",
    help="Parquet or CSV file, or Iceberg table, to write; by default beside the manifest, .reproduced.parquet.",
)
@click.option("--labels", help="Where the labels are now, if they moved.")
def training_set_reproduce(manifest: Path, output: str | None, labels: str | None) -> None:
    """Write the training set of a manifest again and prove that every row is equal."""
    from dagster_prefs.defs.resources import Platform
    from dagster_prefs.offline.training_set import reproduce_training_set

    first = manifest.with_name(manifest.name.removesuffix(".manifest.json"))
    made = reproduce_training_set(
        Platform(load_settings()).catalog(),
        manifest,
        output or str(first.with_suffix(".reproduced.parquet")),
        labels=labels,
    )
    console.print(f"{made.rows:,} rows, equal to those of {manifest}, in {made.output}")


@cli.command()
@click.option(
    "--events", default=320_000, show_default=True, type=click.IntRange(0), help="About how many events."
)
@click.option("--viewers", default=5_000, show_default=True, type=click.IntRange(1))
@click.option("--days", default=35, show_default=True, type=click.IntRange(1, 3650))
@click.option("--seed", default=7, show_default=True, help="The same seed generates the same events.")
@click.option("--to", "target", default="engine", show_default=True, help="engine, kafka, or a folder.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Events per second at most.")
@click.option("--follow", is_flag=True, help="A live trickle of events that happen now, until Ctrl-C.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="End a live trickle after this time."
)
@click.option("--once", is_flag=True, help="Send nothing to Kafka where it holds events already.")
def simulate(
    events: int,
    viewers: int,
    days: int,
    seed: int,
    target: str,
    rate: float | None,
    follow: bool,
    seconds: float | None,
    once: bool,
) -> None:
    """Generate events of a realistic shape: into the engine, Kafka, or JSON-lines files."""
    from dagster_prefs.events import simulator
    from dagster_prefs.events.brokers import client_properties

    settings = load_settings()
    plan = simulator.SimulationPlan(
        seed=seed,
        viewers=viewers,
        days=days,
        # The proportions of the demo: views, shop events, interactions.
        view_events=events * 10 // 16,
        shop_events=events * 5 // 16,
        interactions=events // 16,
        end=datetime.now(UTC),
    )
    if target == "kafka" and not settings.kafka_bootstrap:
        raise PrefsError("--to kafka needs PREFS_KAFKA_BOOTSTRAP, the brokers' host:port list: set it")
    if once:
        from dagster_prefs.events.kafka import holds_messages

        if target != "kafka":
            raise PrefsError("--once is for --to kafka: the engine and files tell a repetition by themselves")
        if holds_messages(
            settings.kafka_bootstrap or "",
            settings.kafka_topics["view_events"],
            client=client_properties(settings),
        ):
            console.print("Kafka holds events already: nothing was sent")
            return
    engine = EngineConnection.of(settings)
    with progress_bar("events") as advance:
        if follow and target == "engine":
            counts = simulator.follow_to_engine(
                engine, plan, rate=rate or 20.0, seconds=seconds, progress=advance
            )
        elif follow and target == "kafka":
            counts = simulator.follow(
                simulator.KafkaSink(
                    settings.kafka_bootstrap or "", settings.kafka_topics, client_properties(settings)
                ),
                plan,
                rate=rate or 20.0,
                seconds=seconds,
                progress=advance,
            )
        elif follow:
            raise PrefsError("--follow writes to engine or kafka: leave it out to write files")
        elif target == "engine":
            reports = simulator.simulate_to_engine(engine, plan, rate=rate, progress=advance)
            counts = {report.topic: report.accepted for report in reports}
        elif target == "kafka":
            counts = simulator.simulate_to_kafka(
                settings.kafka_bootstrap or "",
                plan,
                names=settings.kafka_topics,
                client=client_properties(settings),
                rate=rate,
                progress=advance,
            )
        else:
            files = simulator.simulate_to_files(Path(target), plan, compress=True, progress=advance)
            console.print("\n".join(f"{topic}: {path}" for topic, path in files.items()))
            return
    for topic, count in counts.items():
        console.print(f"{topic}: {count:,} messages")


@cli.command()
@click.argument("viewer", type=int)
@click.argument("attribute")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def why(viewer: int, attribute: str, as_json: bool) -> None:
    """Set a served number beside the same number recomputed from its tiles, with the latest events."""
    from dagster_prefs.serving.why import explain_attribute

    settings = load_settings()
    with profile_client(settings) as client:
        found = explain_attribute(
            EngineConnection.of(settings),
            client,
            viewer,
            attribute,
            expiry_spread_seconds=settings.expiry_spread_seconds,
        )
    if as_json:
        print_json(found.as_dict())
        return
    console.print(
        f"viewer {viewer}, {found.domain}.{found.attribute}, {found.window_days} days from {found.window_start}"
    )
    console.print(f"  served      {found.online}")
    console.print(f"  recomputed  {found.recomputed}{'' if found.equal else '   (they differ)'}")
    for title, rows in (("Tiles", found.tiles), ("Latest events", found.events)):
        if rows:
            console.print(table_of(f"\n{title}", list(rows[0]), [tuple(row.values()) for row in rows]))


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("subject", nargs=-1, required=True, metavar="[viewer|user] ID")
@click.option("--drop-tags", is_flag=True, help="Also drop tags and branches that keep the viewer's rows.")
@click.option(
    "--training-sets",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder whose training sets are searched for the viewer; may be given more than once.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def erase(subject: tuple[str, ...], drop_tags: bool, training_sets: tuple[Path, ...], as_json: bool) -> None:
    """Forget a viewer, or a shop user, everywhere, and prove it; safe to run again after any failure."""
    from dagster_prefs import erasure
    from dagster_prefs.defs.resources import Platform
    from dagster_prefs.events.redaction import Subject

    if len(subject) > 2:
        raise click.UsageError(f"one subject at a time, as `viewer ID` or `user ID`, not {' '.join(subject)}")
    kind, name = subject if len(subject) == 2 else ("viewer", subject[0])
    platform = Platform(load_settings())
    steps = Console(stderr=True, highlight=False)
    report = erasure.erase(
        erasure.Stores(
            platform.engine,
            platform.contract,
            platform.catalog,
            platform.dynamodb,
            platform.settings.table_prefix + platform.contract.table.name,
            erasure.refresh_with(platform.dbt),
            platform.settings.iceberg_namespace,
            platform.settings.export == "sink",
        ),
        Subject.named(kind, name),
        now=datetime.now(UTC),
        drop_tags=drop_tags,
        training_sets=training_sets,
        step=lambda step: steps.print(step, style="dim"),
    )
    if as_json:
        print_json(report.as_dict())
        return
    rows = [(h.store, h.place, h.unit, f"{h.before:,}", f"{h.after:,}") for h in report.holdings]
    console.print(table_of("", ["store", "place", "what", "before", "after"], rows))
    console.print(
        f"\n{report.subject}: {'forgotten' if report.held else 'nothing was held'}; "
        f"events up to {report.erased_at.isoformat()} stay suppressed"
    )
    if report.newer_events:
        console.print(f"{report.newer_events:,} events happened after that and count again")
    for path in report.training_sets:
        console.print(f"still in the training set {path}: remove it or build it again")
    console.print(table_of("\nWhat only time removes", ["where", "until"], list(report.unfinished.items())))


@cli.command()
@click.option(
    "--viewers", default=1_000_000, show_default=True, type=click.IntRange(1), help="Seen within 28 days."
)
@click.option(
    "--events-per-day", type=click.IntRange(0), help="View events and interactions; 2 a viewer by default."
)
@click.option(
    "--interaction-share", default=0.1, show_default=True, help="Likes, shares, searches among them."
)
@click.option(
    "--daily-active-share", default=0.25, show_default=True, help="Viewers who watch on a given day."
)
@click.option("--domains", type=click.IntRange(1), help="Domains of one size, in place of the contract's.")
@click.option("--attributes", type=click.IntRange(1), help="Attributes of each of --domains; 5 by default.")
@click.option("--reads-per-day", default=0, show_default=True, type=click.IntRange(0), help="Profiles read.")
@click.option("--refresh-seconds", default=1.0, show_default=True, help="How often changes are written.")
@click.option(
    "--spread-seconds", type=click.IntRange(0), help="PREFS_EXPIRY_SPREAD_SECONDS; the setting by default."
)
@click.option("--peak-factor", default=3.0, show_default=True, help="The busiest second over the mean.")
@click.option("--history-days", default=365, show_default=True, help="Days of events that the engine keeps.")
@click.option("--raw-days", type=click.IntRange(1), help="Days of raw messages among them; all by default.")
@click.option(
    "--fenced", is_flag=True, help="Items are written in transactions, as by PREFS_PUBLISH=changefeed."
)
@click.option(
    "--price", multiple=True, metavar="NAME=DOLLARS", help="A price of yours, e.g. million_write_units=0.7."
)
@click.option(
    "--capacity", multiple=True, metavar="NAME=N", help="What yours bears, e.g. table_write_units=80000."
)
@click.option("--table", is_flag=True, help="The table of docs/scale.md, 1 million to 1 billion viewers.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def cost(
    viewers: int,
    events_per_day: int | None,
    domains: int | None,
    attributes: int | None,
    spread_seconds: int | None,
    price: tuple[str, ...],
    capacity: tuple[str, ...],
    table: bool,
    as_json: bool,
    **shape: Any,
) -> None:
    """Estimate writes, storage and dollars of a workload, and what breaks first (docs/scale.md)."""
    from dagster_prefs import cost as model
    from dagster_prefs.online.contract import load_contract

    contract = load_contract()
    prices = model.Prices(**model.overrides(price, model.Prices))
    capacities = model.Capacities(**model.overrides(capacity, model.Capacities))
    if table:
        click.echo(model.scale_table(contract, prices=prices, capacities=capacities))
        return
    if attributes and not domains:
        raise PrefsError("--attributes says how large each of --domains is: give --domains too")
    workload = model.Workload(
        viewers=viewers,
        events_per_day=2 * viewers if events_per_day is None else events_per_day,
        spread_seconds=load_settings().expiry_spread_seconds if spread_seconds is None else spread_seconds,
        **shape,
    )
    loads = (
        model.uniform_domains(contract, viewers, domains, attributes or 5)
        if domains
        else model.contract_domains(contract, viewers)
    )
    found = model.estimate(
        workload, loads, promise_seconds=model.promise_of(contract), prices=prices, capacities=capacities
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
    console.print(f"An estimate at {model.PRICES_FROM}; give yours with --price.", soft_wrap=True)
    limits = sorted(found.limits, key=lambda limit: limit.used, reverse=True)
    console.print(
        table_of(
            "\nWhat breaks first",
            ["limit", "used", "remedy"],
            [(limit.name, f"{limit.used:,.0%}", limit.remedy) for limit in limits],
        )
    )


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
