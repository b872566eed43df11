"""Every knob of the platform, typed, from the environment or `.env`."""

from __future__ import annotations

import difflib
import os
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dagster_prefs.errors import PrefsError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
PREFIX = "PREFS_"
# Not a setting itself, because it says where settings are read from: one file per environment.
ENV_FILE = "PREFS_ENV_FILE"


class SettingsError(PrefsError):
    """A setting is unknown, malformed, or contradicts another one."""


class Settings(BaseSettings):
    """All settings; the defaults run everything on one machine.

    Each field is read from `PREFS_<FIELD>` unless its alias says otherwise. Every field must be
    documented in `.env.example`, which a test compares with this class.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        populate_by_name=True,
        # `NAME=` in .env, and an unset variable that a shell or compose file passes on, mean the default.
        env_ignore_empty=True,
    )

    engine: Literal["local", "risingwave"] = Field(
        "local", description="Streaming engine: `local` (embedded PostgreSQL) or `risingwave`."
    )
    engine_host: str = Field("127.0.0.1", description="Host of the engine.")
    engine_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port of the engine; empty means 54329 (local) or 4566 (risingwave).",
    )
    engine_database: str | None = Field(
        None, description="Database of the engine; empty means prefs (local) or dev (risingwave)."
    )
    engine_user: str | None = Field(
        None, description="User of the engine; empty means prefs (local) or root (risingwave)."
    )
    engine_password: SecretStr = Field(SecretStr(""), description="Password of the engine.")
    engine_sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = Field(
        "prefer", description="TLS mode of the engine connection, as libpq spells it."
    )
    engine_schema: str = Field("public", description="Schema that holds every relation.")

    data_dir: Path = Field(
        PROJECT_ROOT / ".prefs",
        description=(
            "Folder for all local state: embedded services, Dagster home, Iceberg files. "
            "Empty means .prefs beside the project."
        ),
    )
    local_aws_port: int = Field(54330, ge=1, le=65535, description="Port of the local AWS server.")

    aws_endpoint_url: str | None = Field(
        None,
        alias="AWS_ENDPOINT_URL",
        description="AWS endpoint; empty means the local AWS server on the local engine, AWS itself "
        "otherwise.",
    )
    aws_region: str = Field("eu-central-1", alias="AWS_REGION", description="AWS region.")
    provisioning: Literal["create", "verify"] = Field(
        "create",
        description="`create` makes missing DynamoDB tables, `verify` only checks them (Terraform "
        "owns them).",
    )
    table_prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.-]{0,64}$",
        description="Prefix of every DynamoDB table name, for several environments.",
    )
    publish: Literal["auto", "publisher", "sink"] = Field(
        "auto",
        description="Who writes DynamoDB: `publisher` (this platform), `sink` (RisingWave); auto "
        "picks by engine.",
    )

    kafka_bootstrap: str | None = Field(
        None, description="Kafka brokers, host:port,host:port; empty means no Kafka."
    )
    kafka_start: Literal["earliest", "latest"] = Field(
        "earliest", description="Where a new Kafka reader starts; `earliest` loses no event."
    )

    kafka_topic_user_events: str = Field("user.events", description="Name of topic user.events in Kafka.")
    kafka_topic_view_events: str = Field("view_events", description="Name of topic view_events in Kafka.")
    kafka_topic_content_interactions: str = Field(
        "content_interactions", description="Name of topic content_interactions in Kafka."
    )
    kafka_topic_items: str = Field("items", description="Name of topic items in Kafka.")
    sink_role_arn: str | None = Field(
        None,
        description="IAM role that RisingWave's DynamoDB sinks assume; empty means the engine's own identity.",
    )
    alert_webhook: SecretStr | None = Field(
        None,
        description="Slack-compatible webhook (https) that freshness alerts go to; empty means they are logged.",
    )

    iceberg_catalog: Literal["sqlite", "glue", "rest"] = Field("sqlite", description="Iceberg catalog kind.")
    iceberg_warehouse: str | None = Field(
        None, description="Iceberg warehouse URI, s3://… or file://…; empty means <data dir>/iceberg."
    )
    iceberg_uri: str | None = Field(None, description="URI of the REST catalog.")
    iceberg_namespace: str = Field("training", description="Iceberg namespace of the training tables.")

    export_start_date: date = Field(
        date(2025, 1, 1),
        description="First UTC day that is exported to Iceberg; older tiles stay in the engine only.",
    )

    expiry_spread_seconds: int = Field(
        0,
        ge=0,
        lt=86_400,
        description="Seconds after midnight UTC over which windows roll over, per viewer; 0 is the "
        "exact day boundary.",
    )
    refresh_poll_seconds: int = Field(30, ge=5, description="Seconds between looks for new events (sensor).")
    schedules: Literal["on", "off"] = Field(
        "off", description="Whether schedules and sensors run as soon as the Dagster daemon does."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _without_blanks(cls, value: Any, info: ValidationInfo) -> Any:
        # A file that docker reads, or a line of YAML, keeps the blank that a shell and dotenv would drop, and a
        # name with one is another name. Only a password may well end in a blank.
        if isinstance(value, str) and value != value.strip() and info.field_name != "engine_password":
            # Without the value, which may be a secret.
            raise ValueError("the value begins or ends with a blank: remove it")
        return value

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine == "local" and self.publish == "sink":
            raise ValueError(
                "PREFS_PUBLISH=sink needs PREFS_ENGINE=risingwave: the local engine has no "
                "sinks; use publisher"
            )
        if self.engine == "risingwave" and self.publish == "publisher":
            raise ValueError(
                "PREFS_PUBLISH=publisher needs PREFS_ENGINE=local: on RisingWave its own sinks write DynamoDB; use sink"
            )
        if self.iceberg_catalog == "rest" and not self.iceberg_uri:
            raise ValueError("PREFS_ICEBERG_CATALOG=rest needs PREFS_ICEBERG_URI, the address of the catalog")
        if self.iceberg_catalog != "sqlite" and not self.iceberg_warehouse:
            raise ValueError(
                f"PREFS_ICEBERG_CATALOG={self.iceberg_catalog} needs PREFS_ICEBERG_WAREHOUSE, "
                f"e.g. s3://bucket/path"
            )
        if self.engine == "local" and self.engine_host not in ("127.0.0.1", "localhost"):
            raise ValueError(
                "PREFS_ENGINE=local runs on this machine only: unset PREFS_ENGINE_HOST or set "
                "PREFS_ENGINE=risingwave"
            )
        if self.aws_endpoint is None:
            self._check_region()
        return self

    def _check_region(self) -> None:
        import botocore
        import botocore.session

        session = botocore.session.get_session()
        known = {
            region
            for partition in session.get_available_partitions()
            for region in session.get_available_regions("dynamodb", partition)
        }
        if self.aws_region not in known:
            near = difflib.get_close_matches(self.aws_region, sorted(known), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"AWS_REGION={self.aws_region} is no region with DynamoDB that botocore {botocore.__version__} "
                f"knows: {hint}correct it, or upgrade boto3 for a newer region"
            )

    @property
    def port(self) -> int:
        """The engine's port, with the default of the chosen engine."""
        return self.engine_port or (54329 if self.engine == "local" else 4566)

    @property
    def database(self) -> str:
        """The engine's database, with the default of the chosen engine."""
        return self.engine_database or ("prefs" if self.engine == "local" else "dev")

    @property
    def user(self) -> str:
        """The engine's user, with the default of the chosen engine."""
        return self.engine_user or ("prefs" if self.engine == "local" else "root")

    @property
    def kafka_topics(self) -> dict[str, str]:
        """Topic of this platform → its name in Kafka."""
        return {
            "user.events": self.kafka_topic_user_events,
            "view_events": self.kafka_topic_view_events,
            "content_interactions": self.kafka_topic_content_interactions,
            "items": self.kafka_topic_items,
        }

    @property
    def publishes(self) -> bool:
        """Whether this platform writes DynamoDB itself, rather than a RisingWave sink."""
        return self.publish == "publisher" or (self.publish == "auto" and self.engine == "local")

    @property
    def aws_endpoint(self) -> str | None:
        """The endpoint every AWS client uses; None means AWS itself."""
        if self.aws_endpoint_url or self.engine != "local":
            return self.aws_endpoint_url
        return f"http://127.0.0.1:{self.local_aws_port}"

    @property
    def uses_local_aws(self) -> bool:
        """Whether the local AWS server is the one in use (and so must be started)."""
        return self.engine == "local" and self.aws_endpoint_url is None

    @property
    def warehouse(self) -> str:
        """URI of the Iceberg warehouse."""
        return self.iceberg_warehouse or (self.data_dir / "iceberg").as_uri()


def known_variables() -> dict[str, str]:
    """Environment variable → field name, for every setting."""
    return {field.alias or PREFIX + name.upper(): name for name, field in Settings.model_fields.items()}


def load_settings(env_file: Path | None = None) -> Settings:
    """Read the environment over `.env` and return validated settings.

    `env_file` defaults to the file that PREFS_ENV_FILE names, else to `.env` beside the project. Its
    variables are exported into this process's environment where unset, because dbt and botocore read
    them there.

    Raises SettingsError naming the variable, the rule and the remedy: for a `PREFS_*` name that no
    setting has, a value out of its domain, or settings that contradict each other.
    """
    env_file = env_file or Path(os.environ.get(ENV_FILE) or PROJECT_ROOT / ".env")
    if env_file.is_file():
        for name, value in dotenv_values(env_file).items():
            if value is not None:
                os.environ.setdefault(name, value)
    known = known_variables()
    # These belong to the test suites that reach a server, not to the product's settings.
    suite = {ENV_FILE, "PREFS_RISINGWAVE_URL", "PREFS_BENCH_SCALE"}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and name not in suite:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it; .env.example lists every setting"
            raise SettingsError(f"unknown setting {name}: {hint}")
    try:
        return Settings()
    except ValidationError as error:
        variables = {field: variable for variable, field in known.items()}
        problems = []
        for problem in error.errors(include_input=False, include_url=False):
            place = str(problem["loc"][0]) if problem["loc"] else ""
            name = variables.get(place, place)
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {message}" if name else message)
        raise SettingsError("; ".join(problems) + " (see .env.example)") from None
