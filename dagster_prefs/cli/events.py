"""Commands that load events, and correct rejected ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import click

from dagster_prefs.cli.root import cli, console, print_json, progress_bar, table_of
from dagster_prefs.declarations.names import FEED_KIND
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster_prefs.events.bootstrap import BootstrapState
    from dagster_prefs.events.dry_run import DryRun
    from dagster_prefs.events.ingest import Delivery
    from dagster_prefs.events.messages import Topic
    from dagster_prefs.events.raw import IngestReport


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--topic", help="Topic of the files; found from their content by default.")
@click.option(
    "--mapping", type=click.Choice(["auto", "rees46"]), default="auto", help="Column mapping of CSV."
)
@click.option("--shift-to-now", is_flag=True, help="Move the event times so that the newest event is now.")
@click.option(
    "--map", "maps", multiple=True, metavar="COLUMN=FIELD", help="Field of a column; `COLUMN=` leaves it out."
)
@click.option("--where", metavar="SQL", help="Condition over the columns; other rows are left out.")
@click.option("--arrived-at", metavar="COLUMN", help="Column that holds when each row arrived.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Messages per second at most.")
@click.option("--dry-run", is_flag=True, help="Show what would be rejected and why; write nothing.")
def ingest(
    files: tuple[str, ...], topic: str | None, mapping: Literal["auto", "rees46"], **given: Any
) -> None:
    """Load events from files, folders, S3 and Iceberg.

    FILES may be s3://BUCKET/PREFIX and iceberg:NAMESPACE.TABLE.
    Files are JSON lines or CSV (gzipped or not), Parquet or Arrow. --map, --where and --arrived-at are for Parquet,
    Arrow and Iceberg. A repeated run only adds what is missing.
    """
    from dagster_prefs.events.ingest import FileOptions
    from dagster_prefs.events.inputs import dry_run_input, ingest_input
    from dagster_prefs.events.raw import Batches
    from dagster_prefs.platform import Platform

    settings = load_settings()
    registry, engine = settings.registry(), EngineConfiguration.of(settings)
    deliver = None if given["dry_run"] else kafka_delivery(settings)
    options = FileOptions(
        topic,
        mapping,
        datetime.now(UTC) if given["shift_to_now"] else None,
        given["rate"],
        read_maps(given["maps"]),
        given["where"],
        given["arrived_at"],
    )
    platform = Platform(settings)
    for source in (found for file in files for found in platform.inputs(file)):
        with progress_bar(PurePath(source.name).name) as advance:
            if given["dry_run"]:
                dry_run = dry_run_input(engine, registry, source, options, advance)
            else:
                report = ingest_input(
                    engine, registry, source, options, batches=Batches(progress=advance), deliver=deliver
                )
        if given["dry_run"]:
            tell_dry_run(source.name, dry_run)
        else:
            tell_ingested(source.name, report)
    if settings.engine == "local" and not given["dry_run"]:
        console.print(
            "the follower of `prefs up` applies them; `prefs refresh` waits for it, or applies them itself"
        )


@cli.command()
@click.argument("topic")
@click.option(
    "--from", "given", metavar="HISTORY", help="Files, s3://BUCKET/PREFIX or iceberg:NAMESPACE.TABLE."
)
@click.option("--until", metavar="TIME|OFFSETS", help="Where Kafka begins: a time, or 0:1200,1:1187.")
@click.option(
    "--map", "maps", multiple=True, metavar="COLUMN=FIELD", help="Field of a column; `COLUMN=` leaves it out."
)
@click.option("--where", metavar="SQL", help="Condition over the columns; other rows are left out.")
@click.option("--arrived-at", metavar="COLUMN", help="Column that holds when each row arrived.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Messages per second at most.")
@click.option("--status", "only_status", is_flag=True, help="Show how far it is; read nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def bootstrap(topic: str, given: str | None, until: str | None, **options: Any) -> None:
    """Read the history of a TOPIC that also comes from Kafka.

    The history may overlap with Kafka: nothing counts twice. Stop it at any time, and run the same command again.
    RisingWave reads an Iceberg table itself; the embedded engine reads files, S3 and Iceberg.
    """
    from dagster_prefs.events.bootstrap import parse_until
    from dagster_prefs.events.ingest import FileOptions
    from dagster_prefs.events.raw import Progress
    from dagster_prefs.platform import Platform

    platform = Platform(load_settings())
    if options["only_status"]:
        tell_bootstraps(topic, platform.bootstraps(topic), as_json=options["as_json"])
        return
    if given is None:
        raise click.UsageError("give --from HISTORY, or --status")
    end = None if until is None else parse_until(until)
    if isinstance(end, dict):
        end = platform.history_end(topic, end)
        console.print(
            f"Kafka holds all that happened from {end:%Y-%m-%d %H:%M:%S} UTC on: history ends there"
        )
    chosen = FileOptions(
        rate=options["rate"],
        renamed=read_maps(options["maps"]),
        where=options["where"],
        arrived_at=options["arrived_at"],
        until=end,
    )
    with progress_bar(topic) as advance:
        state = platform.bootstrap(
            topic,
            given,
            chosen,
            progress=lambda found: advance(Progress(found.messages, found.parts_done, found.parts, "parts")),
        )
    tell_bootstraps(topic, [state], as_json=options["as_json"])


def tell_bootstraps(topic: str, states: Sequence[BootstrapState], *, as_json: bool) -> None:
    """Print how far the bootstraps of a topic are."""
    from dagster_prefs.freshness.status import duration

    if as_json:
        print_json([state.as_dict() for state in states])
        return
    if not states:
        console.print(f"no history of {topic} was read: `prefs bootstrap {topic} --from HISTORY`")
        return
    rows = [
        (
            state.history.shown,
            "complete" if state.is_complete else "incomplete",
            f"{state.parts_done}/{state.parts}",
            f"{state.messages:,}",
            "" if state.rate is None else f"{state.rate:,.0f}/s",
            "" if state.is_complete else duration(state.seconds_left),
        )
        for state in states
    ]
    console.print(table_of("", ["history", "state", "parts", "messages", "rate", "left"], rows))


def tell_ingested(name: str, report: IngestReport) -> None:
    """Print what was stored of a file, and which rows of it could not be read."""
    rate = report.lines / report.seconds if report.seconds else 0
    console.print(
        f"{name}: {report.accepted} messages into {report.topic}, {report.already_present} were already present"
        f" ({report.seconds:.1f} s, {rate:,.0f}/s)"
    )
    if report.note:
        console.print(f"{name}: {report.note}")
    for line, why in report.examples:
        console.print(f"{name}, line {line}: {why}; stored unchanged, and rejected")
    if report.malformed > len(report.examples):
        console.print(f"{name}: {report.malformed:,} rows could not be read, `prefs rejected` lists them")


def tell_dry_run(name: str, found: DryRun) -> None:
    """Print what would be rejected of a file, by reason with examples."""
    console.print(
        f"{name}: {found.messages:,} messages of {found.topic}, {found.rejections:,} would be rejected; "
        "nothing was written"
    )
    for kind, reason in sorted(found.rejected.items(), key=lambda item: -item[1].count):
        console.print(f"{reason.count:,} of them: {kind}")
        for row, why, message in reason.examples:
            console.print(f"  row {row}: {'' if why == kind else f'{why}: '}{message}")


def read_maps(maps: Sequence[str]) -> dict[str, str | None]:
    """Return the field of each column of `--map COLUMN=FIELD`, None if it is left out.

    Raises PrefsError for a text without `=`, and for a column that is named twice.
    """
    renamed: dict[str, str | None] = {}
    for text in maps:
        # A field has no `=` in its name, and a column may have one.
        column, equals, field = text.rpartition("=")
        if not equals or not column:
            raise PrefsError(f"--map {text!r} is not COLUMN=FIELD: write e.g. --map user=FIELD")
        if column in renamed:
            raise PrefsError(f"--map names the column {column} twice: leave one out")
        renamed[column] = field or None
    return renamed


def kafka_delivery(settings: Settings) -> Delivery | None:
    """Return the delivery to Kafka if a connector fills the raw tables; None if this platform writes them."""
    if settings.engine != "risingwave" or not settings.kafka_bootstrap:
        return None
    from dagster_prefs.events.kafka import KafkaWriter
    from dagster_prefs.platform import Platform

    kafka = Platform(settings).kafka
    return KafkaWriter(settings.kafka_bootstrap, client=kafka.client).delivery(kafka.topics)


@cli.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.pass_context
def topics(context: click.Context, as_json: bool) -> None:
    """Show the Kafka topics.

    A topic that was deleted and recreated is not the one whose messages were read.
    """
    if context.invoked_subcommand is not None:
        return
    from dagster_prefs.platform import Platform

    lives = Platform(kafka_settings()).kafka_topics()
    if as_json:
        print_json([{**vars(life), "state": life.state, "source": life.source} for life in lives])
        return
    rows = [(life.kafka_topic, life.generation, life.state, life.source) for life in lives]
    console.print(table_of("", ["topic", "generation", "state", "source"], rows))


@topics.command("renew")
def topics_renew() -> None:
    """Read recreated topics from their start, and keep the messages of the old ones."""
    from dagster_prefs.platform import Platform

    settings = kafka_settings()
    platform = Platform(settings)
    found = [life for life in platform.kafka_topics() if life.state == "recreated"]
    platform.kafka_topics(note=True)
    if settings.engine == "risingwave":
        feeds = platform.dbt.run("run", [f"config.materialized:{FEED_KIND}"])
        if failed := [f"{feed.name}: {feed.message}" for feed in feeds if not feed.ok]:
            raise PrefsError("; ".join(failed))
    for life in found:
        console.print(f"{life.kafka_topic}: generation {life.generation + 1} is read from its start")
    if not found:
        console.print("no topic was recreated")


@cli.command()
@click.argument("topic")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["json", "avro"]),
    default="json",
    show_default=True,
    help="Of the schema.",
)
def schema(topic: str, kind: str) -> None:
    """Print the schema of a TOPIC for its producers.

    A message that satisfies the JSON Schema is accepted. Messages are read as JSON: the Avro schema has the same
    fields, for a registry and for other consumers.
    """
    from dagster_prefs.events.messages import topics_of
    from dagster_prefs.events.schema import avro_schema, json_schema

    registry = load_settings().registry()
    found = topics_of(registry)[registry.topic(topic).name]
    print_json(json_schema(found) if kind == "json" else avro_schema(found, registry.project))


@cli.command()
@click.option("--topic", help="Only this topic.")
@click.option("--follow", is_flag=True, help="Continue with new messages until Ctrl-C; needs --topic.")
def consume(topic: str | None, follow: bool) -> None:
    """Read Kafka topics into the embedded engine.

    A run continues where the last one ended.
    """
    from dagster_prefs.events.kafka import ingest_topic
    from dagster_prefs.events.raw import Batches
    from dagster_prefs.platform import Platform

    settings = kafka_settings()
    if settings.engine != "local":
        raise PrefsError("on RisingWave the feeds read Kafka: run `dbt run` in dbt_project/")
    if follow and topic is None:
        raise PrefsError("--follow reads one topic at a time: name it with --topic")
    registry = settings.registry()
    topics = [registry.topic(topic)] if topic else list(registry.topics.values())
    platform = Platform(settings)
    lives, kafka = {life.kafka_topic: life for life in platform.kafka_topics(note=True)}, platform.kafka
    for declared in topics:
        with progress_bar(declared.name) as advance:
            report = ingest_topic(
                EngineConfiguration.of(settings),
                kafka,
                declared,
                generation=lives[kafka.topics[declared.name]].generation,
                # Until Ctrl-C.
                stop=threading.Event() if follow else None,
                batches=Batches(progress=advance),
            )
        console.print(
            f"{declared.name}: {report.accepted} messages of {report.source} ({report.seconds:.1f} s)"
        )
    console.print(
        "the follower of `prefs up` applies them; `prefs refresh` waits for it, or applies them itself"
    )


def kafka_settings() -> Settings:
    """Load the settings, which must name Kafka brokers."""
    settings = load_settings()
    if not settings.kafka_bootstrap:
        raise PrefsError("PREFS_KAFKA_BOOTSTRAP names no brokers: set it to their host:port list")
    return settings


@cli.group(invoke_without_command=True)
@click.option("--topic", help="Only this topic.")
@click.option("--reason", help="Only this reason; lists the messages instead of counting them.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--all", "with_replayed", is_flag=True, help="Include messages that were replayed.")
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
    """Count rejected messages, or list those of a topic or reason.

    Personal values are masked; `prefs rejected export` writes the messages as they are.
    """
    if context.invoked_subcommand is not None:
        return
    from dagster_prefs.declarations.masking import masked_message
    from dagster_prefs.events.rejected import rejected_counts, rejected_events

    settings = load_settings()
    engine, registry = EngineConfiguration.of(settings), settings.registry()
    topic = topic and registry.topic(topic).name
    open_only = not with_replayed
    if topic or reason:
        events = [
            replace(event, payload=masked_message(registry, registry.topics.get(event.topic), event.payload))
            for event in rejected_events(engine, topic, reason, limit, open_only=open_only)
        ]
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
    """Write the open rejected messages to a new JSON-lines file, to be corrected and replayed.

    The messages are as they came, with personal values; only the owner may read the file.
    """
    from dagster_prefs.events.replay import export_rejected

    settings = load_settings()
    topic = topic and settings.registry().topic(topic).name
    written = export_rejected(EngineConfiguration.of(settings), file, topic, reason)
    console.print(f"{file}: {written} messages; correct each payload, then `prefs rejected replay {file}`")


@rejected.command("replay")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--skip-invalid", is_flag=True, help="Send the valid lines, and skip the rest of the file.")
@click.option(
    "--unchanged", is_flag=True, help="Without a file: send messages again, unchanged, that are now valid."
)
@click.option("--topic", help="With --unchanged: only this topic.")
@click.option("--reason", help="With --unchanged: only this reason.")
def rejected_replay(
    file: Path | None, skip_invalid: bool, unchanged: bool, topic: str | None, reason: str | None
) -> None:
    """Send the corrected messages of an exported file.

    Messages that were replayed before are skipped.
    """
    from dagster_prefs.events.replay import ReplayError, replay_file, replay_unchanged

    if (file is None) != unchanged or (file is not None and (topic or reason)):
        raise click.UsageError("give either a FILE of corrections, or --unchanged with --topic or --reason")
    settings = load_settings()
    engine, registry, deliver = (
        EngineConfiguration.of(settings),
        settings.registry(),
        kafka_delivery(settings),
    )
    topic = topic and registry.topic(topic).name
    now = datetime.now(UTC)
    if file is None:
        from dagster_prefs.events.kafka import decoder
        from dagster_prefs.platform import Platform

        kafka = Platform(settings).kafka
        decoders: dict[str, Callable[[bytes], bytes]] = {}

        def decode(found: Topic, message: bytes) -> bytes:
            if found.name not in decoders:
                decoders[found.name] = decoder(found, kafka)
            return decoders[found.name](message)

        report = replay_unchanged(
            engine,
            registry,
            topic,
            reason,
            now=now,
            deliver=deliver,
            decode=decode,
        )
    else:
        try:
            report = replay_file(engine, registry, file, now=now, skip_invalid=skip_invalid, deliver=deliver)
        except ReplayError as error:
            for line, why in error.problems:
                console.print(f"{file}, line {line}: {why}")
            raise
    console.print(f"{report.sent} messages sent, {report.already_replayed} were replayed before")
    for why, count in report.left_out.items():
        console.print(f"{count} left out: {why}")
    if settings.engine == "local" and report.sent:
        console.print(
            "the follower of `prefs up` applies them; `prefs refresh` waits for it, or applies them itself"
        )


@cli.command()
@click.option(
    "--events",
    default=320_000,
    show_default=True,
    type=click.IntRange(0),
    help="Approximate number of events.",
)
@click.option(
    "--entities",
    default=5_000,
    show_default=True,
    type=click.IntRange(1),
    help="Number of active ids per entity (viewers, users …).",
)
@click.option("--days", default=35, show_default=True, type=click.IntRange(1, 3650))
@click.option("--seed", default=7, show_default=True, help="The same seed generates the same events.")
@click.option("--to", "target", default="engine", show_default=True, help="engine, kafka, or a folder.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Events per second at most.")
@click.option("--follow", is_flag=True, help="Send current events continuously, until Ctrl-C.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="With --follow: stop after this time."
)
@click.option("--once", is_flag=True, help="Send nothing to Kafka if it already holds events.")
def simulate(
    events: int,
    entities: int,
    days: int,
    seed: int,
    target: str,
    rate: float | None,
    follow: bool,
    seconds: float | None,
    once: bool,
) -> None:
    """Generate events into the engine, Kafka, or files.

    Events of the example's topics follow a scenario; messages of other topics are generated from their
    fields.
    """
    from dagster_prefs.platform import Platform
    from dagster_prefs.tools import simulator
    from dagster_prefs.tools.scenario import scenario_plan

    settings = load_settings()
    registry, kafka = settings.registry(), Platform(settings).kafka
    plan = simulator.fitted(
        registry, scenario_plan(datetime.now(UTC), seed=seed, days=days, entities=entities, events=events)
    )
    if target == "kafka" and not settings.kafka_bootstrap:
        raise PrefsError("--to kafka needs PREFS_KAFKA_BOOTSTRAP, the brokers' host:port list: set it")
    if once:
        from dagster_prefs.events.kafka import holds_messages

        if target != "kafka":
            raise PrefsError(
                "--once is for --to kafka: the engine and files recognise repetitions by themselves"
            )
        if any(
            holds_messages(settings.kafka_bootstrap or "", name, client=kafka.client)
            for name in kafka.topics.values()
        ):
            console.print("Kafka holds events already: nothing was sent")
            return
    engine = EngineConfiguration.of(settings)
    with progress_bar("events") as advance:
        if follow and target == "engine":
            counts = simulator.follow_to_engine(
                engine, registry, plan, rate=rate or 20.0, seconds=seconds, progress=advance
            )
        elif follow and target == "kafka":
            counts = simulator.follow(
                simulator.KafkaSink(settings.kafka_bootstrap or "", kafka.topics, kafka.client),
                plan,
                rate=rate or 20.0,
                seconds=seconds,
                progress=advance,
            )
        elif follow:
            raise PrefsError("--follow writes to engine or kafka: leave it out to write files")
        elif target == "engine":
            reports = simulator.simulate_to_engine(engine, registry, plan, rate=rate, progress=advance)
            counts = {report.topic: report.accepted for report in reports}
        elif target == "kafka":
            counts = simulator.simulate_to_kafka(
                settings.kafka_bootstrap or "",
                plan,
                names=kafka.topics,
                client=kafka.client,
                rate=rate,
                progress=advance,
            )
        else:
            files = simulator.simulate_to_files(Path(target), plan, compress=True, progress=advance)
            console.print("\n".join(f"{topic}: {path}" for topic, path in files.items()))
            return
    for topic, count in counts.items():
        console.print(f"{topic}: {count:,} messages")
