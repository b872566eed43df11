"""The composition root: builds engine, dbt, DynamoDB and Iceberg from the settings, and the operations on all of them.

It does not depend on Dagster: commands use it where Dagster is not installed, and Dagster's definitions are thin
declarations over it. Each operation imports its own dependencies, so that a read command starts within a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from dagster_prefs.declarations.contract import (
    Contract,
    ContractError,
    Domain,
    build_contract,
    check_version,
    deployed_contract,
    diff_contracts,
    parse_contract,
)
from dagster_prefs.declarations.registry import Entity, Registry, TopicDeclaration
from dagster_prefs.dynamodb.tables import TableReport, dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import Id, id_parts
from dagster_prefs.settings import Settings, kafka_variable

if TYPE_CHECKING:
    import psycopg
    from pydantic import SecretStr
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table

    from dagster_prefs.declarations.lineage import Lineage
    from dagster_prefs.deploy.plan import ContractReview, Plan
    from dagster_prefs.dynamodb.store import DomainStore
    from dagster_prefs.engine.spreads import Spreads
    from dagster_prefs.events.bootstrap import BootstrapState, History, Part
    from dagster_prefs.events.brokers import KafkaSecurity, KafkaSource
    from dagster_prefs.events.columnar import TableBatch
    from dagster_prefs.events.ingest import FileOptions
    from dagster_prefs.events.inputs import Input
    from dagster_prefs.events.raw import Batches
    from dagster_prefs.events.topics import TopicGeneration
    from dagster_prefs.freshness.canary import Probe
    from dagster_prefs.freshness.drift import DriftMemo
    from dagster_prefs.freshness.exports_memo import ExportsMemo
    from dagster_prefs.freshness.status import Sources
    from dagster_prefs.iceberg.catalog import Tables
    from dagster_prefs.iceberg.event_export import EventsReport, TopicExport
    from dagster_prefs.iceberg.exporter import Exporter
    from dagster_prefs.iceberg.tables import TileTable
    from dagster_prefs.live.follower import Follower, Work
    from dagster_prefs.open_lineage import Places
    from dagster_prefs.training.parity import ParityReport
    from dagster_prefs.training.skew import SkewReport
    from dagster_prefs.training.windows import Features
    from dagster_prefs.values.drift import Cause
    from dagster_prefs.values.statistics import Statistics

# The prefix that distinguishes an Iceberg table from a file of the same name.
ICEBERG = "iceberg:"
# How long `prefs refresh` waits for a follower, in seconds.
REFRESH_SECONDS = 600.0
# Messages that are restored from the lake in one transaction.
RESTORED_AT_ONCE = 10_000
# How often the follower checks whether the DynamoDB tables are still the same, in seconds.
TABLE_SECONDS = 30.0


class Platform:
    """Engine, dbt, DynamoDB and Iceberg for these settings; each connects on first use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = EngineConfiguration.of(settings)

    @property
    def sources(self) -> Sources:
        """The sources of the freshness and lag measures."""
        from dagster_prefs.freshness.drift import DriftReadings
        from dagster_prefs.freshness.status import Sources

        settings = self.settings
        return Sources(
            engine=self.engine,
            data_dir=settings.data_dir,
            declared=settings.registry,
            kafka=lambda: self.kafka,
            connect=self.dynamodb,
            catalog=self._tables_to_read,
            table_prefix=settings.table_prefix,
            namespace=settings.iceberg_namespace,
            export_start=settings.export_start_date,
            publishes=settings.publishes,
            follows=settings.follows,
            by_sink=settings.export == "sink",
            events_export_seconds=settings.events_export_seconds,
            # Nobody else writes the tables of the local AWS server, which goes through all items for each page.
            strangers=not settings.uses_local_aws,
            memo=self._exports_memo,
            drift=DriftReadings(self.drift, settings.registry, self._drift_memo),
        )

    @property
    def _exports_memo(self) -> ExportsMemo | None:
        from dagster_prefs.freshness.exports_memo import ExportsMemo

        settings, catalog = self.settings, self._sqlite_catalog
        if catalog is None:
            return None
        return ExportsMemo(
            settings.state_dir / "exports-seen.json",
            catalog,
            settings.iceberg_namespace,
            settings.export_start_date,
        )

    @property
    def _drift_memo(self) -> DriftMemo | None:
        from dagster_prefs.freshness.drift import DriftMemo

        settings, catalog = self.settings, self._sqlite_catalog
        if catalog is None:
            return None
        return DriftMemo(settings.state_dir / "drift-seen.json", catalog, settings.iceberg_namespace)

    @property
    def _sqlite_catalog(self) -> Path | None:
        """The file of the SQLite catalog, None where another catalog is used."""
        from dagster_prefs.files import catalog_file, local_folder

        folder = local_folder(self.settings.warehouse)
        if self.settings.iceberg_catalog != "sqlite" or folder is None:
            return None
        return catalog_file(folder.absolute())

    @property
    def kafka(self) -> KafkaSource:
        """The source of events; without brokers if none are configured."""
        from dagster_prefs.events.brokers import KafkaSource, client_properties
        from dagster_prefs.events.schema_registry import RegistryAddress

        settings = self.settings
        return KafkaSource(
            bootstrap=settings.kafka_bootstrap,
            topics=settings.kafka_topics,
            start=settings.kafka_start,
            client=client_properties(kafka_security(settings)),
            group=settings.consumer_group,
            schemas=None
            if settings.schema_registry_url is None
            else RegistryAddress(
                settings.schema_registry_url,
                settings.schema_registry_user,
                _secret(settings.schema_registry_password),
            ),
        )

    @cached_property
    def dbt(self) -> Dbt:
        """dbt for this engine; its artifacts are in the data directory."""
        return Dbt(
            self.engine,
            self.settings.project,
            self.settings.state_dir / "dbt" / self.engine.kind,
            {
                "PREFS_EXPIRY_SPREAD_SECONDS": str(self.settings.expiry_spread_seconds),
                "PREFS_ENVIRONMENT": self.settings.environment or "",
                "PREFS_TABLE_PREFIX": self.settings.table_prefix,
                "PREFS_KAFKA_BOOTSTRAP": self.settings.kafka_bootstrap or "",
                "PREFS_KAFKA_START": self.settings.kafka_start,
                **{kafka_variable(topic): name for topic, name in self.settings.kafka_topics.items()},
                "PREFS_SINK_ROLE_ARN": self.settings.sink_role_arn or "",
                "PREFS_PUBLISH": self.settings.publish,
                "PREFS_CHANGEFEED_RETENTION_HOURS": str(self.settings.changefeed_retention_hours),
                "PREFS_EXPORT": self.settings.export,
                "PREFS_ICEBERG_CATALOG": self.settings.iceberg_catalog,
                "PREFS_ICEBERG_WAREHOUSE": self.settings.iceberg_warehouse or "",
                "PREFS_ICEBERG_URI": self.settings.iceberg_uri or "",
                "PREFS_ICEBERG_NAMESPACE": self.settings.iceberg_namespace,
                "AWS_REGION": self.settings.aws_region,
            },
            given=self.settings.given,
        )

    @property
    def registry(self) -> Registry:
        """The project's declarations."""
        return self.settings.registry()

    @cached_property
    def lineage(self) -> Lineage:
        """Where the project's columns come from. Raises LineageError if it is missing or stale."""
        from dagster_prefs.declarations.lineage import load_lineage

        return load_lineage(self.settings.project, self.registry)

    @property
    def contract(self) -> Contract:
        """The serving contract."""
        return self.registry.contract

    def dynamodb(self) -> Any:
        """Return a DynamoDB client for the configured endpoint."""
        return dynamodb_client(self.settings.aws_endpoint, self.settings.aws_region)

    def provision(self, client: Any) -> dict[str, TableReport]:
        """Create or verify the table of each entity, depending on the owner of the tables in the settings."""
        return provision(
            client,
            self.contract,
            prefix=self.settings.table_prefix,
            mode=self.settings.provisioning,
            environment=self.settings.environment,
        )

    def stores(self) -> list[DomainStore]:
        """Return the store of each domain, after `provision`."""
        from dagster_prefs.dynamodb.store import domain_stores

        client = self.dynamodb()
        return domain_stores(self.engine, client, self.contract, self.provision(client))

    def kafka_topics(self, *, note: bool = False) -> list[TopicGeneration]:
        """Return the stored and the current generation of every topic; empty without Kafka.

        With `note` the engine stores the generations that the brokers report now, and a recreated topic enters its next
        generation. Raises KafkaUnavailable for brokers that do not answer and a topic they do not have, NotDeployed
        before the first `dbt run`.
        """
        if self.settings.kafka_bootstrap is None:
            return []
        from dagster_prefs.events.contact import KafkaUnavailable
        from dagster_prefs.events.topics import broker_ids, note_topics, topic_generations

        kafka, bootstrap = self.kafka, self.settings.kafka_bootstrap
        names = list(kafka.topics.values())
        ids = broker_ids(bootstrap, names, client=kafka.client)
        if missing := [name for name in names if name not in ids]:
            raise KafkaUnavailable(
                f"Kafka at {bootstrap} has no topic {', '.join(missing)}: create it, or set its name in Kafka "
                "with PREFS_KAFKA_TOPIC_…"
            )
        with self.engine.connect() as session:
            if note:
                note_topics(session, self.engine, ids, now=datetime.now(UTC))
            return list(topic_generations(session, self.engine, ids).values())

    def catalog(self) -> Catalog:
        """The Iceberg catalog. Raises OfflineError if it does not answer."""
        from dagster_prefs.iceberg.catalog import open_catalog

        settings = self.settings
        return open_catalog(
            settings.iceberg_catalog,
            settings.warehouse,
            uri=settings.iceberg_uri,
            credential=_secret(settings.iceberg_credential),
            region=settings.aws_region,
            endpoint_url=settings.aws_endpoint_url,
        )

    def _tables_to_read(self) -> Tables:
        """The tables of the Iceberg catalog, as fast as they can be opened. Raises OfflineError."""
        from dagster_prefs.iceberg.catalog import LocalTables

        return self.catalog() if self._sqlite_catalog is None else LocalTables(self._sqlite_catalog)

    def inputs(self, given: str) -> Iterator[Input]:
        """Yield what `prefs ingest` is to read: a file, a folder's files, objects in S3, or an Iceberg table's files.

        Raises EventFileError or OfflineError naming what was given.
        """
        from dagster_prefs.events.inputs import S3, ObjectStore, local_inputs, table_inputs

        settings = self.settings
        if given.startswith(S3):
            return ObjectStore(settings.aws_region, settings.aws_endpoint_url).inputs(given)
        if given.startswith(ICEBERG):
            from dagster_prefs.iceberg.history import history_files

            return table_inputs(history_files(self.catalog(), given.removeprefix(ICEBERG)))
        return local_inputs(Path(given))

    def bootstrap(
        self,
        topic: str,
        given: str,
        options: FileOptions,
        *,
        progress: Callable[[BootstrapState], None] = lambda state: None,
        batches: Batches | None = None,
    ) -> BootstrapState:
        """Read a topic's history, and return how far it is; see `run_parts`.

        The embedded engine reads what `prefs ingest` reads. RisingWave reads an Iceberg table of the platform's catalog
        itself. Raises PrefsError for a history or an option that the engine cannot read, and what its parts raise.
        """
        from dagster_prefs.events.bootstrap import History, run_parts

        declared = self.registry.topic(topic)
        options = replace(options, topic=declared.name)
        history = History(declared.name, given, _options_of(options))
        if self.engine.kind == "local":
            return run_parts(self.engine, history, self._history_parts(given, options, batches), progress)
        return self._engine_bootstrap(history, options, progress)

    def bootstraps(self, topic: str) -> list[BootstrapState]:
        """Return how far the bootstraps of a topic are. Raises EngineUnavailable, RegistryError."""
        from dagster_prefs.events.bootstrap import bootstrap_states

        with self.engine.connect() as connection:
            return bootstrap_states(connection, self.engine, self.registry.topic(topic).name)

    def history_end(self, topic: str, offsets: Mapping[int, int]) -> datetime:
        """Return the instant (UTC) from which Kafka holds all that happened, if it is read from these offsets.

        That is the latest time among their messages: of an event that happened at or after it, the message came later
        too. Raises PrefsError without brokers, or if no partition has a message there; Unmeasurable if they do not
        answer.
        """
        from dagster_prefs.freshness.ingestion import Broker

        kafka, name = self.kafka, self.registry.topic(topic).name
        if kafka.bootstrap is None:
            raise PrefsError(
                "--until with offsets asks Kafka for the times of their messages, and PREFS_KAFKA_BOOTSTRAP names no "
                "brokers: set it, or write a time"
            )
        kafka_topic = kafka.topics.get(name, name)
        with Broker(kafka.bootstrap, client=kafka.client, group=kafka.group) as broker:
            marks = broker.watermarks(kafka_topic)
            if unknown := [partition for partition in offsets if partition not in marks]:
                there = ", ".join(map(str, sorted(marks)))
                raise PrefsError(
                    f"--until names partition {unknown[0]}, and {kafka_topic} has {there}: name one of these"
                )
            if missing := [partition for partition in sorted(marks) if partition not in offsets]:
                raise PrefsError(
                    f"--until names no offset of partition {missing[0]} of {kafka_topic}: name one of each partition"
                )
            owed = {
                partition: offset for partition, offset in offsets.items() if offset < marks[partition][1]
            }
            times = broker.first_messages(kafka_topic, owed)
        known = [moment for moment in times.values() if moment is not None]
        if len(known) < len(times) or not known:
            raise PrefsError(
                f"{kafka_topic} has no message with a time at these offsets: write a time instead"
            )
        return max(known)

    def _history_parts(self, given: str, options: FileOptions, batches: Batches | None) -> list[Part]:
        from dagster_prefs.events.bootstrap import Part
        from dagster_prefs.events.inputs import ingest_input
        from dagster_prefs.events.raw import Batches

        def part(source: Input) -> Part:
            def read() -> int:
                report = ingest_input(
                    self.engine, self.registry, source, options, batches=batches or Batches()
                )
                return report.lines

            # A local file may be another one by now, which only reading it tells.
            name = " version ".join(filter(None, (source.name, source.version)))
            return Part(name, read, is_fixed=source.version is not None)

        return [part(source) for source in self.inputs(given)]

    def _engine_bootstrap(
        self, history: History, options: FileOptions, progress: Callable[[BootstrapState], None]
    ) -> BootstrapState:
        from dagster_prefs.events.bootstrap import resumed_version, run_parts
        from dagster_prefs.events.columnar import Table
        from dagster_prefs.events.engine_history import EngineHistory
        from dagster_prefs.events.table_ingest import columns_of, table_topic
        from dagster_prefs.iceberg.history import history_snapshot

        given = history.name
        if not given.startswith(ICEBERG):
            raise PrefsError(
                f"RisingWave reads a history itself from Iceberg, and {given} is none: write "
                f"{ICEBERG}NAMESPACE.TABLE (files become a table with `add_files` of pyiceberg), or send it through "
                "Kafka with `prefs ingest`"
            )
        if self.settings.iceberg_catalog == "sqlite":
            raise PrefsError(
                "RisingWave cannot read the SQLite catalog of this machine: set PREFS_ICEBERG_CATALOG to `glue` or "
                "`rest`"
            )
        for option, value in (("--where", options.where), ("--rate", options.rate)):
            if value is not None:
                raise PrefsError(
                    f"{option} is for the embedded engine: RisingWave reads the table itself; leave the option out, or "
                    "write the rows that you want to a table of their own"
                )
        resumed = resumed_version(self.engine, history)
        name = given.removeprefix(ICEBERG)
        snapshot = history_snapshot(self.catalog(), name, int(resumed) if resumed else None)
        table = Table(given, name, str(snapshot.snapshot_id), snapshot.schema, snapshot.rows, _unread)
        topic = table_topic(table, self.registry, options)
        columns = columns_of(options)
        column = next((one for one in table.schema.names if columns.field_of(one) == topic.time), None)
        source = EngineHistory(
            f"history_of_{topic.relation}",
            snapshot.snapshot_id,
            table,
            columns,
            snapshot.span(column) if column is not None else None,
        )
        parts = source.parts(self.engine, topic)
        namespace, _, stored = name.rpartition(".")
        self.dbt.operate(
            "create_history_source", {"relation": source.relation, "namespace": namespace, "table": stored}
        )
        try:
            source.check_arrivals(self.engine)
            pinned = replace(history, version=str(snapshot.snapshot_id))
            return run_parts(self.engine, pinned, parts, progress)
        finally:
            # Its definition may hold credentials, so that it stays no longer than it is read.
            with suppress(PrefsError):
                source.drop(self.engine)

    @cached_property
    def training_tables(self) -> dict[str, TileTable]:
        """The training tables by name, one per declared tile."""
        from dagster_prefs.iceberg.tables import tile_tables

        return tile_tables(self.registry)

    @property
    def exporter(self) -> Exporter:
        """The export of the training tables."""
        from dagster_prefs.iceberg.exporter import Exporter

        settings = self.settings
        return Exporter(
            engine=self.engine,
            catalog=self.catalog,
            tables=self.training_tables,
            namespace=settings.iceberg_namespace,
            start=settings.export_start_date,
            by_sink=settings.export == "sink",
            kept=timedelta(days=settings.snapshots_kept_days),
            report=self._report_exported,
        )

    def event_exports(self) -> dict[str, TopicExport]:
        """Return the export of each topic's events to the lake, by the topic's name. Raises DeclarationRefused."""
        from dagster_prefs.iceberg.event_export import TopicExport
        from dagster_prefs.iceberg.event_tables import event_tables

        settings, registry = self.settings, self.registry
        days = settings.events_kept_days
        found = {}
        for name, tables in event_tables(registry).items():
            entity = tables.typed.entity
            found[name] = TopicExport(
                engine=self.engine,
                catalog=self.catalog,
                tables=tables,
                subject_kind=registry.family(entity.name)[0].name if entity and entity.erasable else None,
                unread=partial(self._unread_since, registry.topics[name]),
                namespace=settings.iceberg_namespace,
                kept=None if days is None else timedelta(days=days),
                raw_by_sink=settings.raw_by_sink,
            )
        return found

    def export_events(self, only: Sequence[str] = ()) -> list[EventsReport]:
        """Export the events of these topics to the lake, of all by default, and apply the retention of raw messages.

        On the embedded engine messages leave that are older than the retention and in the lake; RisingWave deletes by
        itself. Raises OfflineError, EngineUnavailable, RegistryError for an unknown topic.
        """
        from dagster_prefs.events.progress import note_exported
        from dagster_prefs.events.retention import let_leave

        names = [self.registry.topic(name).name for name in only]
        retention, now = self.settings.raw_retention_seconds, datetime.now(UTC)
        reports = []
        for name, export in self.event_exports().items():
            if names and name not in names:
                continue
            report = export.run(now)
            if retention is not None and self.engine.kind == "local" and report.complete_until is not None:
                before = min(report.complete_until, now - timedelta(seconds=retention))
                report.left = let_leave(
                    self.engine, self.registry.topics[name], before, export.exported_hours()
                )
            if report.complete_until is not None:
                with self.engine.connect() as connection:
                    note_exported(
                        connection, self.engine, self.registry.topics[name], report.complete_until, now
                    )
            reports.append(report)
        return reports

    def _unread_since(self, topic: TopicDeclaration) -> datetime | None:
        """Return the earliest arrival of a topic's messages that the embedded engine's views may not have read."""
        from dagster_prefs.events.progress import unread
        from dagster_prefs.live.presence import is_pending

        if self.engine.kind != "local":
            return None
        with self.engine.connect() as connection:
            if is_pending(connection, self.engine, topic.parsed):
                # It will be rebuilt, from messages of any time.
                return datetime.fromtimestamp(0, UTC)
            found = unread(connection, self.engine, topic)
        return found.since if found else None

    def prepare_training_tables(self) -> list[Table]:
        """Prepare the tables that RisingWave's sinks write: those of tiles, and of raw messages where they do.

        Raises OfflineError or EngineUnavailable.
        """
        from dagster_prefs.iceberg.event_tables import event_tables
        from dagster_prefs.iceberg.tables import ensure_layout
        from dagster_prefs.iceberg.verify import prepare_for_sink

        catalog, namespace = self.catalog(), self.settings.iceberg_namespace
        topics = event_tables(self.registry).values() if self.settings.raw_by_sink else ()
        return [
            *(
                prepare_for_sink(self.engine, catalog, spec, namespace=namespace)
                for spec in self.training_tables.values()
            ),
            *(ensure_layout(catalog, namespace, tables.raw.layout) for tables in topics),
        ]

    def parity(self, features: Features, *, now: datetime, share: float | None = None) -> ParityReport:
        """Compare the served values of an entity with the same values computed from the training tables.

        `share` of its ids are compared, PREFS_PARITY_SHARE by default; `now` is UTC. Raises like `check_parity`.
        """
        from dagster_prefs.training.parity import ParityOptions, check_parity, served_items

        table = f"{self.settings.table_prefix}{features.entity.table}"
        return check_parity(
            self.engine,
            self.catalog(),
            served_items(self.dynamodb(), self.contract, table, features),
            features=features,
            now=now,
            options=ParityOptions(
                share=self.settings.parity_share if share is None else share,
                spread_seconds=self.settings.expiry_spread_seconds,
                namespace=self.settings.iceberg_namespace,
            ),
        )

    def collect_statistics(self, *, now: datetime, days: int | None = None) -> list[tuple[str, date]]:
        """Describe the values of the last `days` complete days that changed, and of the rolling views as they are now.

        `now` is UTC; `days` reaches back five weeks by default. Returns the relations and days that were described.
        Raises DaysNotDescribed, once all others are described, another OfflineError, EngineUnavailable, ViewUnreadable.
        """
        from dagster_prefs.values.collect import (
            DAYS_DESCRIBED,
            DaysNotDescribed,
            collect_tiles,
            collect_views,
        )

        catalog, namespace = self.catalog(), self.settings.iceberg_namespace
        failure: DaysNotDescribed | None = None
        described: list[tuple[str, date]] = []
        try:
            described += collect_tiles(
                catalog,
                self.registry,
                namespace,
                now=now,
                days=days or DAYS_DESCRIBED,
                empty=self._quiet_days(now),
            ).described
        except DaysNotDescribed as error:
            # It prevents no view.
            failure = error
        described += collect_views(catalog, self.registry, self.engine, namespace, now=now).described
        if failure is not None:
            raise failure
        return described

    def _quiet_days(self, now: datetime) -> dict[str, set[date]]:
        """Tile → the complete days since its first one of which neither engine nor training table has rows."""
        exports = self.exporter.look(now)
        found: dict[str, set[date]] = {}
        for spec in self.training_tables.values():
            days = {
                day
                for group in (exports.stale, exports.foreign, exports.current)
                for name, day in group
                if name == spec.name
            }
            first = min(days, default=now.date())
            found[spec.tile] = {
                first + timedelta(days=place) for place in range((now.date() - first).days)
            } - days
        return found

    def statistics(self) -> dict[str, dict[str, Statistics]]:
        """The newest statistics of every attribute: relation → attribute → statistics. Raises OfflineError."""
        from dagster_prefs.values.store import latest_statistics

        return latest_statistics(self._tables_to_read(), self.settings.iceberg_namespace)

    def drift(self, day: date | None = None) -> list[Cause]:
        """What drifted on a day (UTC), or on the newest day with statistics of each tile, by cause.

        Raises OfflineError.
        """
        from dagster_prefs.values.drift import causes_on

        return causes_on(self._tables_to_read(), self.registry, self.settings.iceberg_namespace, day=day)

    def spreads(self) -> Spreads:
        """Return the expiry spreads that were in force over time, by domain. Raises EngineUnavailable."""
        from dagster_prefs.engine.spreads import spreads_in_force

        return spreads_in_force(
            self.engine, self.contract.domains.values(), default=self.settings.expiry_spread_seconds
        )

    def skew(self, log: Iterable[Path], *, since: datetime | None = None) -> SkewReport:
        """Compare the served log in these files or folders with values as served from the lake.

        With `since` only the rows that were served from then on. Raises LogUnreadable, BadRow, EngineUnavailable, or
        OfflineError.
        """
        from dagster_prefs.served_rows import read_log
        from dagster_prefs.training.skew import measure_skew
        from dagster_prefs.training.skew_evidence import lake_evidence

        evidence = lake_evidence(
            self.catalog(),
            self.registry,
            spreads=self.spreads(),
            erased=self._erased_ids(),
            namespace=self.settings.iceberg_namespace,
        )
        return measure_skew(self.registry, read_log(log, since=since), evidence)

    def _erased_ids(self) -> Callable[[Entity, Id], bool]:
        """Return a function that tells whether an id of an entity was erased. Raises EngineUnavailable."""
        from psycopg import sql

        with self.engine.connect() as connection:
            rows = connection.execute(
                sql.SQL("select subject_kind, subject_id from {}").format(
                    sql.Identifier(self.engine.schema, "erased_subjects")
                )
            ).fetchall()
        erased = {(kind, id_) for kind, id_ in rows}

        def is_erased(entity: Entity, id_: Id) -> bool:
            return (self.registry.family(entity.name)[0].name, str(id_parts(id_)[0])) in erased

        return is_erased

    def is_deployed(self) -> bool:
        """Return whether any model of the project was ever deployed. Raises EngineUnavailable."""
        with self.engine.connect() as connection:
            row = connection.execute(
                "select 1 from information_schema.tables where table_schema = %s and table_name = 'deployments'",
                [self.engine.schema],
            ).fetchone()
        return row is not None

    def follower(self, say: Callable[[str], None] = lambda line: None) -> Follower:
        """Return the follower of the embedded engine, which keeps its views and their items current.

        It sends the canary. If brokers are configured, it reads their topics too.
        """
        from dagster_prefs.dynamodb.changefeed import process_label
        from dagster_prefs.live.follower import Follower

        def declared() -> Work:
            platform = Platform(self.settings.reread())
            platform.engine = self.engine
            return platform._work()

        return Follower(
            self.engine,
            declared,
            process=process_label(),
            applied=lambda: self._applied.read_text() if self._applied.is_file() else "",
            say=say,
        )

    def _work(self) -> Work:
        from dagster_prefs.freshness.prober import Prober
        from dagster_prefs.live.follower import Work

        topics = self.registry.topics.values() if self.settings.kafka_bootstrap else ()
        return Work(
            self.registry,
            DomainPublisher(self),
            {
                **{f"Kafka topic {topic.name}": partial(self._consume, topic) for topic in topics},
                "canary": Prober(self.engine, self.registry, self.probe, self.settings.state_dir).run,
            },
        )

    def probe(self, clients: ExitStack, session: psycopg.Connection[Any] | None = None) -> Probe:
        """Return the probe that times canaries from their topic to the reader, with clients that it opens in the stack.

        It reads views over the session if there is one, or else over a new connection per read. Raises PrefsError if
        the clients of DynamoDB cannot be created.
        """
        from dagster_prefs.declarations.reserved import canary_id
        from dagster_prefs.freshness.canary import (
            Probe,
            canary_paths,
            canary_views,
            read_domains,
            read_views,
            send_canary,
        )
        from dagster_prefs.serving.profiles import ProfileClient

        settings, registry = self.settings, self.registry
        readers: list[Callable[[], Mapping[str, int | None]]] = []
        for entity in registry.entities.values():
            if entity.table is None:
                continue
            profiles = clients.enter_context(
                ProfileClient(
                    registry,
                    entity=entity.name,
                    endpoint_url=settings.aws_endpoint,
                    region=settings.aws_region,
                    table_prefix=settings.table_prefix,
                )
            )
            readers.append(partial(read_domains, profiles, canary_id(registry, entity)))
        views = canary_views(registry)
        return Probe(
            send=lambda moment: send_canary(
                self.engine,
                registry,
                moment,
                bootstrap=settings.kafka_bootstrap,
                kafka_topics=settings.kafka_topics,
                client=self.kafka.client,
            ),
            readers=[*readers, lambda: read_views(self.engine, registry, views, session)],
            paths=canary_paths(registry),
            thresholds=registry.contract.freshness.canary,
        )

    def _consume(self, topic: TopicDeclaration, stop: threading.Event) -> None:
        from dagster_prefs.events.kafka import ingest_topic

        generations = {found.kafka_topic: found.generation for found in self.kafka_topics(note=True)}
        kafka = self.kafka
        ingest_topic(self.engine, kafka, topic, generation=generations[kafka.topics[topic.name]], stop=stop)

    def refresh(self, say: Callable[[str], None] = lambda line: None) -> str:
        """Apply and publish all that has arrived on the embedded engine, or wait until its follower has done so.

        Returns a sentence that says which process did it, and how much. Raises NotDeployed before the first `prefs
        apply`, FollowerProblem, PublishError, EngineUnavailable.
        """
        from dagster_prefs.live.presence import FollowedElsewhere, wait_until_applied

        try:
            messages = self.follower(say).catch_up()
        except FollowedElsewhere:
            wait_until_applied(self.engine, seconds=REFRESH_SECONDS)
            return "the follower has applied and published everything that had arrived"
        return f"{messages:,} messages applied; every view is current and every change is published"

    def rebuild(
        self, target: str, *, from_lake: bool, say: Callable[[str], None] = lambda line: None
    ) -> list[str]:
        """Rebuild a view, or all (`all`), with all that it is made from, and return their names.

        With `from_lake` the raw messages that have left the engine are stored again first, each at its place and with
        its time of arrival, so that the same deliveries win. The views serve meanwhile; what arrives meanwhile is
        neither missed nor counted twice. The embedded engine changes them by the difference alone, when it is known;
        RisingWave builds others and swaps them, with all that reads them. Safe to repeat after any failure. Raises
        PrefsError for an unknown view, OfflineError, and what `refresh` raises, or on RisingWave `apply`.
        """
        from dagster_prefs.live.rebuild import mark_rebuilt, plan_rebuild

        if self.engine.kind == "risingwave":
            return self._rebuild_streaming(target, from_lake, say)
        with self.engine.connect() as connection:
            plan = plan_rebuild(connection, self.engine, self.registry, target)
        if from_lake:
            for topic in plan.topics:
                say(f"{topic.name}: {self._restore(topic):,} messages restored from the lake")
        with self.engine.connect() as connection:
            missing = mark_rebuilt(connection, self.engine, plan)
        if missing:
            names = ", ".join(topic.name for topic in missing)
            remedy = "" if from_lake else ": with --from-lake they are restored first"
            say(f"{names}: what was read from messages that have left the engine stays as it is{remedy}")
        say(self.refresh(say))
        return list(plan.views)

    def _rebuild_streaming(self, target: str, from_lake: bool, say: Callable[[str], None]) -> list[str]:
        from dagster_prefs.deploy.apply import apply_plan
        from dagster_prefs.deploy.plan import deletes_by_age
        from dagster_prefs.deploy.rebuild import Rebuild, Successor, views_behind

        views = views_behind(self.dbt.manifest(), target)
        topics = [topic for topic in self.registry.topics.values() if topic.parsed in views]
        with self.engine.connect() as connection:
            forgetful = [topic for topic in topics if deletes_by_age(connection, self.engine, topic.raw)]
        successors: list[Successor] = []
        for topic in topics if from_lake else ():
            if topic in forgetful:
                successors.append(Successor(topic, partial(self._restore, topic)))
            else:
                say(f"{topic.name}: {self._restore(topic):,} messages restored from the lake")
        if not from_lake and forgetful:
            names = [topic.parsed for topic in forgetful]
            views = [view for view in views if view not in names]
            say(
                f"{', '.join(names)}: stays as it is, because RisingWave deletes its messages by age: with --from-lake "
                "they are restored first"
            )
        models = frozenset((*views, *(one.topic.raw for one in successors)))
        if views:
            apply_plan(
                self.engine,
                self.dbt,
                partial(review_contract, self.contract),
                ProfileStore(self),
                on_step=say,
                rebuild=Rebuild(models, tuple(successors)),
            )
        return views

    def _restore(self, topic: TopicDeclaration, relation: str = "") -> int:
        """Store the messages of a topic that the lake holds in a relation, by default its raw table.

        Returns how many are new there; on RisingWave, which does not tell, how many the lake holds.
        """
        from dagster_prefs.events.raw import RawStore, StoredMessage
        from dagster_prefs.iceberg.event_reader import all_events
        from dagster_prefs.iceberg.event_tables import event_tables

        spec = event_tables(self.registry)[topic.name].raw
        restored = 0
        with RawStore(self.engine) as store:
            for batch in all_events(
                self.catalog(), spec, StoredMessage._fields, namespace=self.settings.iceberg_namespace
            ):
                columns = (column.to_pylist() for column in batch.columns)
                rows = [StoredMessage(*row) for row in zip(*columns, strict=True)]
                for start in range(0, len(rows), RESTORED_AT_ONCE):
                    restored += store.restore(topic, rows[start : start + RESTORED_AT_ONCE], relation)
        return restored

    def plan(self, *, drop_orphans: bool = False) -> Plan:
        """Return the changes that an apply would make now; see `make_plan`.

        Raises UnreadableTopic for a topic in Avro that RisingWave would have to read from Kafka.
        """
        from dagster_prefs.deploy.plan import make_plan
        from dagster_prefs.events.schema_registry import refuse_avro

        if self.engine.kind == "risingwave" and self.settings.kafka_bootstrap is not None:
            refuse_avro(self.registry.topics.values())
        return make_plan(
            self.engine, self.dbt, partial(review_contract, self.contract), drop_orphans=drop_orphans
        )

    def apply(
        self, *, drop_orphans: bool = False, on_step: Callable[[str], None] = lambda step: None
    ) -> Plan:
        """Apply the plan; see `apply_plan`."""
        from dagster_prefs.deploy.apply import apply_plan

        applied = self.dbt.fingerprint()
        done = apply_plan(
            self.engine,
            self.dbt,
            partial(review_contract, self.contract),
            ProfileStore(self),
            drop_orphans=drop_orphans,
            on_step=on_step,
        )
        self._applied.write_text(applied)
        self._report_applied()
        return done

    def _report_applied(self) -> None:
        from dagster_prefs import open_lineage

        if open_lineage.is_on():
            registry = self.registry
            open_lineage.send(
                "apply",
                registry.project,
                lambda: open_lineage.applied_datasets(registry, self.lineage, self._places()),
            )

    def _report_exported(self, spec: TileTable) -> None:
        from dagster_prefs import open_lineage

        if open_lineage.is_on():
            registry = self.registry
            open_lineage.send(
                "export",
                registry.project,
                lambda: [open_lineage.exported_dataset(registry, spec.tile, self._places())],
            )

    def _places(self) -> Places:
        from dagster_prefs.open_lineage import Places

        settings, engine = self.settings, self.engine
        return Places(
            engine=f"postgres://{engine.host}:{engine.port}",
            engine_prefix=f"{engine.database}.{engine.schema}.",
            kafka=f"kafka://{(settings.kafka_bootstrap or 'none').split(',')[0]}",
            kafka_topics=settings.kafka_topics,
            dynamodb=f"dynamodb://{settings.aws_region}",
            table_prefix=settings.table_prefix,
            iceberg=settings.iceberg_uri or settings.warehouse,
            iceberg_prefix=f"{settings.iceberg_namespace}.",
        )

    def bring_out(self, on_step: Callable[[str], None] = lambda step: None) -> None:
        """Apply the project's declarations, unless they were the last ones applied from this data folder.

        The comparison saves time: an apply without changes takes seconds, because it compiles every model. Raises like
        `apply`.
        """
        stamp = self._applied.read_text() if self._applied.is_file() else ""
        if stamp != self.dbt.fingerprint() or not self.is_deployed():
            self.apply(on_step=on_step)

    @property
    def _applied(self) -> Path:
        """Return the file with the fingerprint of the project and settings last applied from this folder."""
        return self.dbt.target_dir / "applied.sha256"


def _options_of(options: FileOptions) -> str:
    """Return the options that decide which messages a history has, as a bootstrap is recorded with them."""
    told = [] if options.until is None else [f"until {options.until.isoformat(timespec='seconds')}"]
    if options.is_selective or options.renamed or options.arrived_at:
        chosen = [
            sorted(options.renamed.items()),
            options.where,
            options.arrived_at,
            options.until and options.until.isoformat(),
        ]
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        told.append(f"options {digest[:8]}")
    return " ".join(told)


def _unread(first: int, columns: Sequence[str] | None) -> Iterator[TableBatch]:
    """Read nothing of a table that the engine reads itself."""
    return iter(())


def kafka_security(settings: Settings) -> KafkaSecurity:
    """Return how the brokers let our clients in, from the settings."""
    from dagster_prefs.events.brokers import KafkaSecurity

    return KafkaSecurity(
        protocol=settings.kafka_security_protocol,
        mechanism=settings.kafka_sasl_mechanism,
        username=settings.kafka_sasl_username,
        password=_secret(settings.kafka_sasl_password),
        tls={
            "ssl.ca.location": settings.kafka_ssl_ca_location,
            "ssl.ca.pem": settings.kafka_ssl_ca_pem,
            "ssl.certificate.location": settings.kafka_ssl_certificate_location,
            "ssl.certificate.pem": settings.kafka_ssl_certificate_pem,
            "ssl.key.location": settings.kafka_ssl_key_location,
            "ssl.key.pem": _secret(settings.kafka_ssl_key_pem),
            "ssl.key.password": _secret(settings.kafka_ssl_key_password),
        },
        msk_region=settings.kafka_msk_region or settings.aws_region,
        msk_role_arn=settings.kafka_msk_role_arn,
    )


def _secret(given: SecretStr | None) -> str | None:
    return None if given is None else given.get_secret_value()


def review_contract(
    shipped: Contract, fragments: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> ContractReview:
    """Return the models' changes to the deployed contract, and the reason to refuse them, None if there is none.

    A breaking change without a higher version is refused, and so is a `shipped` contract that differs from the models'.
    """
    from dagster_prefs.deploy.plan import ContractChange, ContractReview

    written = parse_contract(build_contract(manifest))
    if written != shipped:
        return ContractReview(
            refusal="the registry's contract differs from the models: run `prefs generate` and commit what it writes"
        )
    deployed = deployed_contract(fragments)
    if deployed is None:
        return ContractReview()
    changes = tuple(
        ContractChange(change.kind, change.path, change.what) for change in diff_contracts(deployed, written)
    )
    try:
        check_version(deployed, written)
    except ContractError as error:
        return ContractReview(changes, str(error))
    return ContractReview(changes)


class DomainPublisher:
    """Publishes domains of the embedded engine for its follower; notices when a table is replaced by another."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._stores: dict[str, DomainStore] = {}
        self._looked_at = -math.inf

    def __call__(
        self, domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection[Any]
    ) -> None:
        """Publish these keys of a domain, or all keys if the table is not the one that was written last time."""
        from dagster_prefs.dynamodb.publisher import PublishError, publish_domain, publish_keys

        before = self._stores.get(domain.key)
        if monotonic() - self._looked_at > TABLE_SECONDS:
            self._stores = {store.domain.key: store for store in self._platform.stores()}
            self._looked_at = monotonic()
        store = self._stores[domain.key]
        try:
            if keys is None or before is None or before.table.table_id != store.table.table_id:
                publish_domain(store)
            else:
                publish_keys(store, keys, connection)
        except PublishError:
            self._looked_at = -math.inf
            raise


class ProfileStore:
    """The DynamoDB tables behind the rolling views, during an apply."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    @cached_property
    def _stores(self) -> dict[str, DomainStore]:
        return {store.domain.relation: store for store in self._platform.stores()}

    def prepare(self) -> None:
        """Create or verify the tables, including the Iceberg tables if RisingWave's sinks write them."""
        _ = self._stores
        if self._platform.settings.export == "sink":
            self._platform.prepare_training_tables()

    def reconcile(self, relation: str) -> str:
        """Make the domain's items equal to the rows of its rolling view: published here, or reconciled behind a sink.

        With a changefeed, only the holder of its lease writes: this process, or a running follower.
        """
        from dagster_prefs.dynamodb.publisher import publish_domain
        from dagster_prefs.freshness.reconcile import reconcile_domain

        settings, store = self._platform.settings, self._stores[relation]
        name = store.domain.name
        if settings.publishes:
            done = publish_domain(store)
            return f"{name}: {done.upserts} upserts, {done.deletes} deletes"
        if settings.follows:
            told = catch_up(store, settings.changefeed_lease_seconds)
            return told.get("publisher") or f"{name}: {told['upserts']} upserts, {told['deletes']} deletes"
        found = reconcile_domain(store, now=datetime.now(UTC))
        return f"{name}: {found.missing} missing, {found.different} stale, {found.extra} extra repaired"


def catch_up(store: DomainStore, lease_seconds: float) -> dict[str, Any]:
    """Publish the pending changes, unless a follower is running.

    Returns counts of what was published, or `publisher` (the follower) with `token_at`, the time of its last progress
    in seconds since 1970, if it is known.
    """
    from dagster_prefs.dynamodb.changefeed import PublishedElsewhere, process_label, publish_changes
    from dagster_prefs.dynamodb.lease import read_lease

    try:
        (report,) = publish_changes(
            [store],
            mode="once",
            stop=threading.Event(),
            label=process_label(),
            lease_seconds=lease_seconds,
        )
    except PublishedElsewhere as error:
        state = read_lease(store.items, store.domain)
        token = None if state is None or state.token is None else state.token / 1000
        return {"publisher": str(error)} | ({} if token is None else {"token_at": token})
    return {
        "upserts": report.upserts,
        "deletes": report.deletes,
        "compared_whole_view": bool(report.resyncs),
        "retries": report.retries,
        "seconds": report.seconds,
    }
