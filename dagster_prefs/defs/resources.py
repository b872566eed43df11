"""The platform's own objects, made from the settings once and shared by all definitions."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import dagster as dg

from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.freshness.status import Sources
from dagster_prefs.online.contract import Contract
from dagster_prefs.online.tables import TableReport, dynamodb_client, provision
from dagster_prefs.settings import PROJECT_ROOT, Settings

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table

    from dagster_prefs.events.topics import TopicLife

TABLE_KEY = dg.AssetKey(["dynamodb", "viewer_profiles"])
TRAINING_TABLES_KEY = dg.AssetKey(["training", "tables"])


class Platform:
    """Engine, dbt, DynamoDB and Iceberg as the settings name them; nothing connects before it is used."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sources = Sources(settings)
        self.engine = self.sources.engine

    @cached_property
    def dbt(self) -> Dbt:
        """dbt for this engine; its artifacts lie under the data directory."""
        return Dbt(
            self.engine,
            PROJECT_ROOT / "dbt_project",
            self.settings.data_dir / "dbt" / self.engine.kind,
            {
                "PREFS_EXPIRY_SPREAD_SECONDS": str(self.settings.expiry_spread_seconds),
                "PREFS_TABLE_PREFIX": self.settings.table_prefix,
                "PREFS_KAFKA_BOOTSTRAP": self.settings.kafka_bootstrap or "",
                "PREFS_KAFKA_START": self.settings.kafka_start,
                **{
                    "PREFS_KAFKA_TOPIC_" + topic.replace(".", "_").upper(): name
                    for topic, name in self.settings.kafka_topics.items()
                },
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
        )

    @property
    def contract(self) -> Contract:
        """The serving contract."""
        return self.sources.contract

    def dynamodb(self) -> Any:
        """A DynamoDB client for the endpoint in use."""
        return dynamodb_client(self.settings.aws_endpoint, self.settings.aws_region)

    def provision(self, client: Any) -> TableReport:
        """Make or verify the profile table, as the settings say who owns it."""
        return provision(
            client, self.contract, prefix=self.settings.table_prefix, mode=self.settings.provisioning
        )

    def kafka_topics(self, *, note: bool = False) -> list[TopicLife]:
        """Every topic as the engine remembers it beside what the brokers have now; empty without Kafka.

        With `note` the engine remembers what the brokers have from now on, and a topic that was made anew enters
        its next generation. Raises KafkaUnavailable for brokers that do not answer and a topic they do not have,
        NotDeployed before the first `dbt run`.
        """
        if self.settings.kafka_bootstrap is None:
            return []
        from dagster_prefs.events.brokers import client_properties
        from dagster_prefs.events.contact import KafkaUnavailable
        from dagster_prefs.events.topics import broker_ids, note_topics, topic_lives

        bootstrap, names = self.settings.kafka_bootstrap, list(self.settings.kafka_topics.values())
        ids = broker_ids(bootstrap, names, client=client_properties(self.settings))
        if missing := [name for name in names if name not in ids]:
            raise KafkaUnavailable(
                f"Kafka at {bootstrap} has no topic {', '.join(missing)}: create it, or set the name it has there "
                "with PREFS_KAFKA_TOPIC_…"
            )
        with self.engine.connect() as session:
            if note:
                note_topics(session, self.engine, ids, now=datetime.now(UTC))
            return list(topic_lives(session, self.engine, ids).values())

    def catalog(self) -> Catalog:
        """The Iceberg catalog; raises OfflineError when it does not answer."""
        return self.sources.catalog()

    def prepare_training_tables(self) -> list[Table]:
        """Make the training tables ready for RisingWave's sinks; raises OfflineError, or EngineUnavailable."""
        from dagster_prefs.offline.tables import TILE_TABLES
        from dagster_prefs.offline.verify import prepare_for_sink

        catalog, namespace = self.catalog(), self.settings.iceberg_namespace
        return [
            prepare_for_sink(self.engine, catalog, spec, namespace=namespace) for spec in TILE_TABLES.values()
        ]

    @property
    def default_schedule_status(self) -> dg.DefaultScheduleStatus:
        """Schedules start by themselves only where the environment asks for it."""
        on = self.settings.schedules == "on"
        return dg.DefaultScheduleStatus.RUNNING if on else dg.DefaultScheduleStatus.STOPPED

    @property
    def default_sensor_status(self) -> dg.DefaultSensorStatus:
        """The same for sensors."""
        on = self.settings.schedules == "on"
        return dg.DefaultSensorStatus.RUNNING if on else dg.DefaultSensorStatus.STOPPED
