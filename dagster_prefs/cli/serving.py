"""Commands that read and serve the online data."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dagster_prefs.cli.root import cli, console, print_json, start_logging, table_of
from dagster_prefs.declarations.masking import masked_row
from dagster_prefs.declarations.registry import Entity
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.ids import BadId, Id, id_label, read_id
from dagster_prefs.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster_prefs.serving import ProfileClient, ServedLog
    from dagster_prefs.serving.observing import Observer, Watched

logger = logging.getLogger(__name__)


def profile_client(settings: Settings, entity: str | None) -> ProfileClient:
    """Return a client for interactive use, whose budget lets the slow local AWS server answer."""
    from dagster_prefs.serving import ClientOptions, ProfileClient

    return ProfileClient(
        settings.registry(),
        entity=entity,
        endpoint_url=settings.aws_endpoint,
        region=settings.aws_region,
        table_prefix=settings.table_prefix,
        options=ClientOptions(budget_seconds=30.0, read_timeout_seconds=30.0),
    )


ENTITY = click.option("--entity", help="Entity of the id; by default the first one with profiles.")


def id_of(entity: Entity, *given: str) -> Id:
    """Return the id from the command line, one word per key column of the entity; raises a usage error otherwise."""
    if len(given) != len(entity.keys):
        names = " ".join(entity.key_names)
        raise click.BadParameter(
            f"the id of a {entity.name} is {names}, not {excerpt(' '.join(given))}", param_hint="ID"
        )
    try:
        return read_id(entity.keys, given if len(given) > 1 else given[0])
    except BadId as error:
        raise click.BadParameter(str(error), param_hint="ID") from None


# An id below 0, like the canary's, must not be parsed as an option.
@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("id_", metavar="ID...", nargs=-1, required=True)
@ENTITY
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def profile(id_: tuple[str, ...], entity: str | None, as_json: bool) -> None:
    """Read the items of one id from DynamoDB, as a service would.

    Personal values are masked.

    A composite key has one word per column.
    """
    settings = load_settings()
    with profile_client(settings, entity) as client:
        found = client.get(id_of(client.entity, *id_))
        registry = client.registry
    told = found.as_dict()
    for name, read in told["domains"].items():
        if read["attributes"] is not None:
            relation = registry.contract.domain(name).relation
            read["attributes"] = masked_row(registry, relation, read["attributes"])
    if as_json:
        print_json(told)
    else:
        for name, read in told["domains"].items():
            if read["attributes"] is not None:
                unknown = (
                    " (no item; these are the cold-start values)" if read["state"] == "cold_start" else ""
                )
                rows = list(read["attributes"].items())
                console.print(
                    table_of(
                        f"{found.entity} {id_label(found.id)}: {name}{unknown}", ["attribute", "value"], rows
                    )
                )
    if found.partial:
        reasons = "; ".join(dict.fromkeys(str(read.error) for read in found.reads.values() if read.error))
        local = " (the local DynamoDB: `prefs up` starts it, `prefs refresh` fills it)"
        raise PrefsError(reasons + local if settings.uses_local_aws else reasons)


@cli.command()
@click.argument("user")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1, 10_000))
@click.option(
    "--session/--no-session", default=True, show_default=True, help="Include the activity of the last hours."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def rank(user: str, limit: int, session: bool, as_json: bool) -> None:
    """Rank the catalogue for one user."""
    from dagster_prefs.serving import ShopClient

    with ShopClient(EngineConfiguration.of(load_settings())) as client:
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
@click.option("--only", type=click.Choice(["profiles", "users"]), help="Serve only this part.")
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
    "--request-seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0.1, 600),
    help="Time for a request to arrive.",
)
@click.option(
    "--max-connections", default=1024, show_default=True, type=click.IntRange(8), help="The idlest gives way."
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="A name by which the server may be called, besides localhost and addresses; *.example.com for all below.",
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
    request_seconds: float,
    max_connections: int,
    allowed_hosts: tuple[str, ...],
    drain_seconds: int,
) -> None:
    """Serve profiles and rankings over HTTP.

    Until Ctrl-C or SIGTERM. Off loopback it needs a token (`prefs token`).
    """
    from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ShopClient
    from dagster_prefs.serving.connections import ConnectionLimits
    from dagster_prefs.serving.server import Load, make_app
    from dagster_prefs.serving.server import serve as run_server

    settings = load_settings()
    start_logging(settings)
    observer, watched = _telemetry()
    log = _served_log(settings)
    budget = budget_ms / 1000
    preferences = None
    profiles: list[AsyncProfileClient] = []
    if only != "users":
        registry = settings.registry()
        profiles += [
            AsyncProfileClient(
                registry,
                entity=entity,
                threads=threads,
                endpoint_url=settings.aws_endpoint,
                region=settings.aws_region,
                table_prefix=settings.table_prefix,
                options=ClientOptions(
                    budget_seconds=budget, read_timeout_seconds=budget, observer=observer, log=log
                ),
            )
            for entity in registry.contract.tables
        ]
    if only != "profiles":
        preferences = ShopClient(
            EngineConfiguration.of(settings),
            pool_size=threads,
            statement_timeout_seconds=max(5.0, budget),
            observer=observer,
        )
    app = make_app(
        profiles,
        preferences,
        load=Load(budget_seconds=budget, max_in_flight=max_in_flight, threads=threads),
        catalogue_refresh_seconds=refresh_seconds if ranker == "memory" else None,
        allowed_hosts=allowed_hosts,
        watched=replace(watched, log=log),
    )
    run_server(
        app,
        host=host,
        port=port,
        limits=ConnectionLimits(request_seconds, max_connections, settings.local_users == "own"),
        drain_seconds=drain_seconds,
        entrance=settings.entrance(),
        started=lambda url: console.print(f"serving at {url}; Ctrl-C stops"),
    )


def _served_log(settings: Settings) -> ServedLog | None:
    """Return the log of what is served, None if the settings name no place for it."""
    from dagster_prefs.serving.served_log import (
        FileRows,
        FirehoseRows,
        KafkaRows,
        RowSink,
        ServedLog,
        firehose_client,
    )

    if settings.served_log_place is None:
        return None
    kind, name = settings.served_log_place
    sink: RowSink
    if kind == "files":
        sink = FileRows(Path(name).expanduser())
    elif kind == "firehose":
        sink = FirehoseRows(firehose_client(settings.aws_endpoint, settings.aws_region), name)
    else:
        try:
            from dagster_prefs.events.brokers import client_properties
            from dagster_prefs.events.kafka import KafkaWriter
            from dagster_prefs.platform import kafka_security
        except ModuleNotFoundError as error:
            raise PrefsError(
                f"PREFS_SERVED_LOG={settings.served_log} needs {error.name}, which is not installed: install "
                "confluent-kafka, or log to files: or firehose:"
            ) from None
        connect = partial(
            KafkaWriter, str(settings.kafka_bootstrap), client=client_properties(kafka_security(settings))
        )
        # Now, so that a wrong topic or password is known before anything is served.
        connect().check(name)
        sink = KafkaRows(connect, name)
    return ServedLog(sink, share=settings.served_log_share)


def _telemetry() -> tuple[Observer, Watched]:
    """Who is told of reads, and what the server shows: OpenTelemetry too, if its variables ask and it is installed."""
    from dagster_prefs.serving.observing import ReadCounts, Watched, telemetry_is_on

    counts = ReadCounts()
    if not telemetry_is_on(os.environ):
        return counts, Watched(counts)
    try:
        from dagster_prefs.serving.telemetry import ReadTelemetry, RequestTelemetry, start_telemetry
    except ModuleNotFoundError as error:
        # An operator of a cluster may set these variables for every process in it.
        logger.warning(
            "OTEL_… variables ask for OpenTelemetry, and %s is not installed: install dagster-prefs[telemetry], or set "
            "OTEL_SDK_DISABLED=true",
            error.name,
        )
        return counts, Watched(counts)
    start_telemetry(os.environ)
    telemetry = ReadTelemetry()
    return telemetry, Watched(telemetry.counts, RequestTelemetry())


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("id_", metavar="ID...", nargs=-1, required=True)
@click.argument("attribute")
@ENTITY
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def why(id_: tuple[str, ...], attribute: str, entity: str | None, as_json: bool) -> None:
    """Compare a served value with its tiles.

    Also shows these tiles, and the latest events. ATTRIBUTE is a domain's (lessons_7d, or progress.lessons_7d), or a
    column of a preference view (VIEW.COLUMN), whose rows are recomputed from the events.
    """
    from dagster_prefs.serving.why import explain_attribute

    settings = load_settings()
    if attribute.rpartition(".")[0] in settings.registry().preferences:
        _why_view(settings, id_, attribute, as_json=as_json)
        return
    with profile_client(settings, entity) as client:
        found = explain_attribute(
            EngineConfiguration.of(settings),
            client,
            id_of(client.entity, *id_),
            attribute,
            expiry_spread_seconds=settings.expiry_spread_seconds,
        )
    if as_json:
        print_json(found.as_dict())
        return
    window = (
        "no window" if found.window_days is None else f"{found.window_days} days from {found.window_start}"
    )
    console.print(f"{found.entity} {id_label(found.id)}, {found.domain}.{found.attribute}, {window}")
    served = {"cold_start": "no item", "failed": found.online_error}.get(found.online_state, found.online)
    console.print(f"  served      {served}")
    absent = f"no item: the {found.entity} has no tile in the window"
    console.print(
        f"  recomputed  {found.recomputed if found.in_view else absent}"
        f"{'' if found.equal else '   (they differ)'}"
    )
    for title, relations in (("Tiles", found.tiles), ("Latest events", found.events)):
        for relation, rows in relations.items():
            if rows:
                shown = [tuple(row.values()) for row in rows]
                console.print(table_of(f"\n{title}: {relation}", list(rows[0]), shown))


def _why_view(settings: Settings, words: tuple[str, ...], name: str, *, as_json: bool) -> None:
    from dagster_prefs.declarations.lineage import load_lineage
    from dagster_prefs.serving.why import explain_view

    registry = settings.registry()
    entity = registry.entity(registry.preferences[name.rpartition(".")[0]].entity)
    found = explain_view(
        EngineConfiguration.of(settings),
        registry,
        load_lineage(settings.project, registry),
        id_of(entity, *words),
        name,
    )
    if as_json:
        print_json(found.as_dict())
        return
    differ = "" if found.equal in (True, None) else "   (they differ)"
    console.print(f"{found.entity} {id_label(found.id)}, {found.relation}.{found.column}{differ}")
    if found.reason:
        console.print(f"  not recomputed: {found.reason}")
    parts = {"Served": found.served, "Recomputed": found.recomputed or ()}
    parts |= {f"Latest events: {relation}": rows for relation, rows in found.events.items()}
    for title, rows in parts.items():
        if rows:
            console.print(table_of(f"\n{title}", list(rows[0]), [tuple(row.values()) for row in rows]))
