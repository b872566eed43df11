"""All settings of the platform, typed, from the environment or `.env`."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dagster_prefs.access import Entrance, Tokens
from dagster_prefs.addresses import is_loopback
from dagster_prefs.declarations.registry import (
    PROJECT_FOLDER,
    Registry,
    RegistryError,
    find_project,
    load_registry,
    project_home,
)
from dagster_prefs.environment import CONSUMER_GROUP, Environment, EnvironmentNameError
from dagster_prefs.errors import PrefsError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
PREFIX = "PREFS_"
# Not a setting itself, because it names the file that settings are read from: one per environment.
ENV_FILE = "PREFS_ENV_FILE"


# Omits the value, which may be a secret.
_BLANK = "the value begins or ends with a blank: remove it"

# Part of a setting's name → the pattern of its values, and the rule in words. The values become parts of
# statements.
_NAMES = {
    "_region": (r"[a-z0-9-]{1,64}", "an AWS region, e.g. eu-central-1"),
    "_role_arn": (
        r"arn:[a-z-]+:iam::[0-9]+:role/[\w+=,.@/-]{1,512}",
        "a role, e.g. arn:aws:iam::123456789012:role/x",
    ),
    "engine_schema": (r"[a-z_][a-z0-9_]{0,62}", "a schema: lower-case letters, digits and `_`, at most 63"),
    "served_log": (
        r"files:.+|kafka:[A-Za-z0-9._-]{1,249}|firehose:[A-Za-z0-9._-]{1,64}",
        "files:<folder>, kafka:<topic> or firehose:<stream>",
    ),
    "iceberg_namespace": (r"[A-Za-z0-9_]{1,255}", "an Iceberg namespace: letters, digits and `_`"),
}

# Former names of settings, which would otherwise be ignored or taken for a misspelling.
_RENAMED = {"PREFS_CONSOLE_TOKENS": "PREFS_TOKENS, with hashes as `prefs token` prints them"}

# The prefix of variables that name topics in Kafka; the topic's own name follows in capitals
# (`kafka_variable`).
KAFKA_TOPIC = "PREFS_KAFKA_TOPIC_"


class SettingsError(PrefsError):
    """A setting is unknown, malformed, or contradicts another one."""


def _kafka_name(given: str) -> str:
    if given != given.strip():
        raise ValueError(_BLANK)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", given):
        raise ValueError(
            f"{given[:100]!r} is not a Kafka topic: letters, digits, `.`, `_` and `-`, at most 249"
        )
    return given


def _parts(named: Environment) -> dict[str, str]:
    """Return the settings that an environment's name gives."""
    return {
        "engine_schema": named.schema,
        "table_prefix": named.table_prefix,
        "iceberg_namespace": named.namespace,
    }


def _kafka_names() -> dict[str, str]:
    found = os.environ.items()
    return {
        name.removeprefix(KAFKA_TOPIC): value
        for name, value in found
        if name.startswith(KAFKA_TOPIC) and value
    }


def find_home(project_dir: Path | None = None) -> Path:
    """Return the folder with a project's `.env`, `.prefs` and `workspace.yaml`.

    It is that of the project named or around the working folder; without a project the checkout of the package,
    or the working folder.
    """
    with suppress(RegistryError):
        return project_home(find_project(named=project_dir))
    return PROJECT_ROOT if (PROJECT_ROOT / PROJECT_FOLDER).is_dir() else Path.cwd()


def kafka_variable(topic: str) -> str:
    """Return the environment variable with this topic's name in Kafka; dbt spells it the same way."""
    return KAFKA_TOPIC + re.sub("[.-]", "_", topic).upper()


class Settings(BaseSettings):
    """All settings; the defaults run everything on one machine.

    Each field is read from `PREFS_<FIELD>` unless its alias says otherwise. Every field must be documented in
    `.env.example`, which a test compares with this class.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        populate_by_name=True,
        # `NAME=` in .env, and an unset variable that a shell or compose file passes on as empty, mean the
        # default.
        env_ignore_empty=True,
    )

    environment: str | None = Field(
        None,
        description="Environment, e.g. dev_anna, pr_123, staging or production: names the schema, DynamoDB tables, "
        "Iceberg namespace, Kafka consumer group and local state, so that several share one engine, Kafka and AWS "
        "account. Empty means none; settings that name one of these differently are refused.",
    )
    # The variables given in place of the environment's; a child process gets them in its environment.
    _given: dict[str, str] = PrivateAttr(default_factory=dict)

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
    engine_sslmode: Literal["disable", "require", "verify-ca", "verify-full"] | None = Field(
        None,
        description="TLS to the engine, in libpq's terms; empty means `require`, or on loopback TLS if offered.",
    )
    engine_schema: str = Field("public", description="Schema that holds every relation.")

    project_dir: Path | None = Field(
        None,
        description="Folder of the dbt project; empty means the first from the working folder upwards that declares "
        "entities, or that has such a folder dbt_project.",
    )

    data_dir: Path = Field(
        default_factory=lambda given: find_home(given.get("project_dir")) / ".prefs",
        description=(
            "Folder for all local state: embedded services, Dagster home, Iceberg files. "
            "Empty means .prefs next to the project."
        ),
    )
    local_users: Literal["own", "any"] = Field(
        "own",
        description="Users of this machine whose programs may reach the UI and the feature server over loopback: "
        "`own` (this user and root) or `any`.",
    )
    ui_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names of the Dagster UI and the console in addition to loopback's, with a port unless it is "
        "80 or 443, separated by commas; requests with another Host are refused.",
    )
    tokens: SecretStr | None = Field(
        None,
        description="Tokens of the feature server and the console, needed off loopback: name:scope+scope:sha256:hash, "
        "separated by commas, as `prefs token` prints them; scopes are domains, shop, inspect and send.",
    )
    tokens_file: Path | None = Field(
        None,
        description="File with further tokens, one a line; it is read again when it changes, so that tokens are "
        "rotated without a restart.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="File with the certificate chain (PEM) of the feature server and the console, which then serve "
        "HTTPS; needs PREFS_TLS_KEY.",
    )
    tls_key: Path | None = Field(
        None, description="File with the private key of that certificate (PEM, without a passphrase)."
    )
    console_send: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the console may send events: `on`, `off`, or `auto`, on the embedded engine with a demo's "
        "events only. Where DynamoDB is AWS's own or Terraform owns its tables, `on` is refused.",
    )
    training_dir: Path | None = Field(
        None,
        description="Folder for the training sets of runs started in Dagster; empty means <data dir>/training-sets.",
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
        description="`create` creates missing DynamoDB tables, `verify` only checks them (Terraform owns them).",
    )
    table_prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.-]{0,64}$",
        description="Prefix of every DynamoDB table name, for several environments.",
    )
    publish: Literal["auto", "publisher", "sink", "changefeed"] = Field(
        "auto",
        description="Who writes DynamoDB: `publisher` (this platform, local engine), `sink` (RisingWave's own, "
        "licensed), `changefeed` (`prefs publish --follow`, from RisingWave's subscriptions); auto is publisher or "
        "sink, depending on the engine.",
    )
    served_log: str | None = Field(
        None,
        description="Where `prefs serve` logs a sample of the profiles that it serves: `files:<folder>`, "
        "`kafka:<topic>` or `firehose:<stream>`; empty means nowhere.",
    )
    served_log_share: float = Field(
        0.01, ge=0, le=1, description="Share of all ids (0…1) whose served profiles are logged."
    )
    changefeed_retention_hours: int = Field(
        24,
        ge=1,
        le=24 * 30,
        description="Hours that RisingWave retains changes for `prefs publish --follow`; after a longer absence it "
        "compares whole views.",
    )
    changefeed_lease_seconds: float = Field(
        10.0,
        ge=1,
        le=600,
        description="Seconds without a renewed lease after which another `prefs publish --follow` takes over.",
    )

    kafka_bootstrap: str | None = Field(
        None, description="Kafka brokers, host:port,host:port; empty means no Kafka."
    )
    kafka_start: Literal["earliest", "latest"] = Field(
        "earliest", description="Where a new Kafka reader starts; `earliest` loses no event."
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Protocol of the brokers: TLS, SASL, both or neither."
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "AWS_MSK_IAM"] | None = Field(
        None,
        description="SASL mechanism; AWS_MSK_IAM signs with AWS credentials, needs no password and "
        "trusts the system's certificate authorities.",
    )
    kafka_sasl_username: str | None = Field(None, description="User of PLAIN or SCRAM.")
    kafka_sasl_password: SecretStr | None = Field(None, description="Password of PLAIN or SCRAM.")
    kafka_ssl_ca_location: str | None = Field(
        None,
        description="File of certificate authorities, on RisingWave's machines too; empty means the system's.",
    )
    kafka_ssl_ca_pem: str | None = Field(None, description="The authorities themselves, instead of a file.")
    kafka_ssl_certificate_location: str | None = Field(
        None, description="File of the client's certificate, on RisingWave's machines too."
    )
    kafka_ssl_certificate_pem: str | None = Field(
        None, description="The certificate itself, instead of a file."
    )
    kafka_ssl_key_location: str | None = Field(
        None, description="File of the client's private key, on RisingWave's machines too."
    )
    kafka_ssl_key_pem: SecretStr | None = Field(
        None, description="The private key itself, instead of a file."
    )
    kafka_ssl_key_password: SecretStr | None = Field(None, description="Passphrase of the private key.")
    kafka_msk_region: str | None = Field(
        None, description="Region of the MSK cluster; empty means AWS_REGION."
    )
    kafka_msk_role_arn: str | None = Field(
        None, description="IAM role assumed for AWS_MSK_IAM; empty means the process's own identity."
    )
    schema_registry_url: str | None = Field(
        None,
        description="Schema registry (Confluent's API) of topics with `format: avro`; https if a password is sent to "
        "another machine. Empty means none.",
    )
    schema_registry_user: str | None = Field(None, description="User of the schema registry.")
    schema_registry_password: SecretStr | None = Field(None, description="Password of the schema registry.")
    kafka_lateness_seconds: int | None = Field(
        None,
        ge=1,
        description="Lateness bound of a watermark on the Kafka timestamp (RisingWave): messages further behind "
        "the newest one are dropped before they are stored. Empty drops nothing.",
    )
    raw_retention_seconds: int | None = Field(
        None,
        ge=3600,
        lt=2**32,
        description="Age at which raw messages leave the engine: RisingWave deletes them by itself, the embedded "
        "engine those that `prefs export events` has exported. Views keep what they counted; "
        "`prefs rebuild --from-lake` rebuilds them. Empty keeps all.",
    )

    kafka_topic_names: Annotated[dict[str, Annotated[str, AfterValidator(_kafka_name)]], NoDecode] = Field(
        default_factory=_kafka_names,
        validate_default=True,
        # No variable of its own: each topic of the project has one, which `_kafka_names` reads.
        alias=KAFKA_TOPIC,
        description="Name of a topic in Kafka, if it differs there: PREFS_KAFKA_TOPIC_ and the topic's name in "
        "capitals, with `_` for `.` and `-`. Each topic of the project has such a setting.",
    )
    sink_role_arn: str | None = Field(
        None,
        description="IAM role that RisingWave's DynamoDB sinks assume; empty means the engine's own identity.",
    )
    sink_batch_items: int | None = Field(
        None, ge=1, le=25, description="Items per request of a DynamoDB sink; empty means RisingWave's 25."
    )
    sink_parallel_requests: int | None = Field(
        None, ge=1, description="Concurrent requests of a DynamoDB sink; empty means RisingWave's 256."
    )
    sink_retries: int | None = Field(
        None,
        ge=0,
        description="Retries of a sink after DynamoDB throttles it; empty means RisingWave's own.",
    )
    sink_retry_backoff_ms: int | None = Field(
        None, ge=1, description="Milliseconds before the first retry; empty means RisingWave's own."
    )
    risingwave_secrets: Literal["off", "on"] = Field(
        "off",
        description="`on` stores credentials as RisingWave secrets (licensed), to which options refer; `off` passes "
        "plain values, which anyone who may read RisingWave's catalog sees.",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="Log of processes that run on, on stderr: `json` (an object a line), `text`, or `auto`, which is "
        "text on a terminal and JSON elsewhere.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level of the platform's own lines in that log."
    )
    alert_webhook: SecretStr | None = Field(
        None,
        description="Slack-compatible webhooks (https) for alerts, separated by commas; empty means that they are "
        "logged.",
    )

    iceberg_catalog: Literal["sqlite", "glue", "rest"] = Field("sqlite", description="Iceberg catalog kind.")
    iceberg_warehouse: str | None = Field(
        None, description="Iceberg warehouse URI, s3://… or file://…; empty means <data dir>/iceberg."
    )
    iceberg_uri: str | None = Field(
        None,
        repr=False,
        description="URI of the REST catalog; https if a credential is sent to another machine.",
    )
    iceberg_credential: SecretStr | None = Field(
        None, description="Client id and secret of the REST catalog (OAuth2), as id:secret; empty means none."
    )
    iceberg_namespace: str = Field("training", description="Iceberg namespace of the training tables.")

    export: Literal["platform", "sink"] = Field(
        "platform",
        description="Who writes the training tables: `platform` (the export assets) or `sink` (RisingWave's Iceberg "
        "sinks; the assets then verify, audit and tag). With PREFS_RAW_RETENTION_SECONDS `sink` writes raw messages "
        "to the lake too.",
    )
    export_start_date: date = Field(
        date(2025, 1, 1),
        description="First UTC day that is exported to Iceberg; older tiles stay in the engine only.",
    )

    events_export_seconds: int = Field(
        3600,
        ge=60,
        description="Seconds between exports of raw messages and typed events to Iceberg (Dagster).",
    )
    events_kept_days: int | None = Field(
        None,
        ge=1,
        description="Days of arrival that the Iceberg tables of messages and events keep; empty keeps all.",
    )
    snapshots_kept_days: int = Field(
        30,
        ge=1,
        description="Days that snapshots of the training tables are kept; tagged ones stay. Training sets as known "
        "at a label's time need them.",
    )
    parity_share: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Share of all viewers (0…1) whose items the parity check recomputes from Iceberg.",
    )

    expiry_spread_seconds: int = Field(
        0,
        ge=0,
        lt=86_400,
        description="Seconds after midnight UTC over which windows roll over, per viewer; 0 is the "
        "exact day boundary.",
    )
    refresh_poll_seconds: int = Field(30, ge=5, description="Seconds between checks for new events (sensor).")
    readings_kept_days: int = Field(
        14, ge=1, description="Days that Dagster keeps runs of recurring jobs, such as freshness readings."
    )
    readings_kept_runs: int | None = Field(
        None,
        ge=1,
        description="Runs of each recurring job that Dagster keeps at most; empty means 300 on the embedded engine and "
        "5000 on RisingWave.",
    )
    schedules: Literal["on", "off"] = Field(
        "off", description="Whether schedules and sensors run as soon as the Dagster daemon does."
    )
    schedule_crons: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Times (cron, UTC) of schedules that differ from their defaults, as JSON: "
        '{"parity_daily": "0 6 * * *"}.',
    )
    asset_prefix: str = Field(
        "",
        pattern=r"^([a-z][a-z0-9_]*(/[a-z0-9_]+)*)?$",
        description="Prefix of every asset key in Dagster, e.g. `shop` or `team/shop`, and of the names of jobs, "
        "schedules and sensors: one per platform of a code location.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _without_blanks(cls, value: Any, info: ValidationInfo) -> Any:
        # A file that docker reads, or a line of YAML, keeps a trailing blank that a shell and dotenv would
        # drop, and a name with a blank is another name. Only a password or a PEM text may legitimately end in
        # one.
        kept = str(info.field_name).endswith(("_password", "_pem"))
        if isinstance(value, str) and value != value.strip() and not kept:
            raise ValueError(_BLANK)
        return value

    @field_validator("project_dir", "data_dir", "training_dir", "tokens_file", "tls_certificate", "tls_key")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and value.expanduser().absolute()

    @field_validator("*")
    @classmethod
    def _well_formed(cls, value: Any, info: ValidationInfo) -> Any:
        for ending, (pattern, rule) in _NAMES.items():
            named = str(info.field_name).startswith(ending) or str(info.field_name).endswith(ending)
            if named and isinstance(value, str) and not re.fullmatch(pattern, value):
                raise ValueError(f"{value[:100]!r} is not {rule}")
        return value

    @field_validator("environment")
    @classmethod
    def _an_environment(cls, value: str | None) -> str | None:
        if value is not None:
            Environment(value)
        return value

    @field_validator("ui_hosts", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("schedule_crons", mode="before")
    @classmethod
    def _decoded(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(
                f'the value is not JSON ({error}): write e.g. {{"parity_daily": "0 6 * * *"}}'
            ) from None

    @field_validator("ui_hosts")
    @classmethod
    def _host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?", name):
                raise ValueError(f"{name!r} is no host name: write e.g. dagster.example.com,localhost:3000")
        return tuple(name.lower() for name in value)

    @model_validator(mode="after")
    def _named_by_environment(self) -> Self:
        if self.environment is None:
            return self
        named = Environment(self.environment)
        for field, name in _parts(named).items():
            given = getattr(self, field)
            if field in self.model_fields_set and given != name:
                raise ValueError(
                    f"{PREFIX}{field.upper()}={given} contradicts PREFS_ENVIRONMENT={named.name}, which gives {name}: "
                    "unset one of the two"
                )
            setattr(self, field, name)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine == "local" and self.publish == "sink":
            raise ValueError(
                "PREFS_PUBLISH=sink needs PREFS_ENGINE=risingwave: the local engine has no "
                "sinks; use publisher"
            )
        if self.engine == "risingwave" and self.publish == "publisher":
            raise ValueError(
                "PREFS_PUBLISH=publisher needs PREFS_ENGINE=local: on RisingWave use sink, "
                "or changefeed without a licence"
            )
        if self.engine == "local" and self.publish == "changefeed":
            raise ValueError(
                "PREFS_PUBLISH=changefeed needs PREFS_ENGINE=risingwave: the local engine has no subscriptions; use "
                "publisher"
            )
        if self.iceberg_catalog == "rest" and not self.iceberg_uri:
            raise ValueError("PREFS_ICEBERG_CATALOG=rest needs PREFS_ICEBERG_URI, the address of the catalog")
        if self.iceberg_uri:
            self._check_iceberg_uri(self.iceberg_uri)
        if self.iceberg_catalog != "sqlite" and not self.iceberg_warehouse:
            raise ValueError(
                f"PREFS_ICEBERG_CATALOG={self.iceberg_catalog} needs PREFS_ICEBERG_WAREHOUSE, "
                f"e.g. s3://bucket/path"
            )
        if self.export == "sink" and (self.engine != "risingwave" or self.iceberg_catalog == "sqlite"):
            raise ValueError(
                "PREFS_EXPORT=sink needs PREFS_ENGINE=risingwave and PREFS_ICEBERG_CATALOG=glue or rest, which "
                "RisingWave can reach: use platform, or set both"
            )
        if self.engine == "local" and self.engine_host not in ("127.0.0.1", "localhost"):
            raise ValueError(
                "PREFS_ENGINE=local runs on this machine only: unset PREFS_ENGINE_HOST or set "
                "PREFS_ENGINE=risingwave"
            )
        if (self.served_log or "").startswith("kafka:") and not self.kafka_bootstrap:
            raise ValueError(f"PREFS_SERVED_LOG={self.served_log} needs PREFS_KAFKA_BOOTSTRAP: set it")
        if self.console_send == "on" and (why := self.production):
            raise ValueError(
                f"PREFS_CONSOLE_SEND=on is refused in production, and this is production because {why}: unset it"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("PREFS_TLS_CERTIFICATE and PREFS_TLS_KEY need each other: set both, or neither")
        self._check_kafka()
        self._check_schema_registry()
        if self.aws_endpoint is None:
            self._check_region()
        return self

    def _check_iceberg_uri(self, uri: str) -> None:
        # Omits the address, which may contain a password.
        try:
            address = urlsplit(uri)
            host = address.hostname or ""
        except ValueError as error:
            raise ValueError(f"PREFS_ICEBERG_URI is no address of a catalog ({error}): correct it") from None
        secret = self.iceberg_credential is not None or bool(address.username or address.password)
        if address.scheme.lower() == "http" and secret and not is_loopback(uri):
            raise ValueError(
                f"PREFS_ICEBERG_URI sends its credential to {host} without TLS: use https://, or a catalog on this "
                "machine"
            )
        if self.export == "sink" and (address.username or address.password):
            raise ValueError(
                "PREFS_ICEBERG_URI holds a password, which RisingWave's catalog would show to its readers: remove "
                "it from the address and set PREFS_ICEBERG_CREDENTIAL"
            )

    def _check_kafka(self) -> None:
        protocol, mechanism = self.kafka_security_protocol, self.kafka_sasl_mechanism
        if not self.kafka_bootstrap and (protocol != "PLAINTEXT" or mechanism):
            raise ValueError(
                "PREFS_KAFKA_SECURITY_PROTOCOL and PREFS_KAFKA_SASL_MECHANISM need PREFS_KAFKA_BOOTSTRAP"
            )
        if protocol.startswith("SASL") and not mechanism:
            raise ValueError(f"PREFS_KAFKA_SECURITY_PROTOCOL={protocol} needs PREFS_KAFKA_SASL_MECHANISM")
        if mechanism and not protocol.startswith("SASL"):
            raise ValueError(
                f"PREFS_KAFKA_SASL_MECHANISM={mechanism} needs PREFS_KAFKA_SECURITY_PROTOCOL=SASL_SSL, not {protocol}"
            )
        if mechanism == "AWS_MSK_IAM" and protocol != "SASL_SSL":
            raise ValueError(
                f"PREFS_KAFKA_SASL_MECHANISM=AWS_MSK_IAM needs PREFS_KAFKA_SECURITY_PROTOCOL=SASL_SSL, not {protocol}"
            )
        password = self.kafka_sasl_password is not None
        if mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
            if not (self.kafka_sasl_username and password):
                raise ValueError(
                    f"PREFS_KAFKA_SASL_MECHANISM={mechanism} needs PREFS_KAFKA_SASL_USERNAME and "
                    "PREFS_KAFKA_SASL_PASSWORD"
                )
        elif self.kafka_sasl_username or password:
            raise ValueError(
                "PREFS_KAFKA_SASL_USERNAME and PREFS_KAFKA_SASL_PASSWORD need PREFS_KAFKA_SASL_MECHANISM=PLAIN or "
                "SCRAM: unset them, or set it"
            )
        if mechanism != "AWS_MSK_IAM" and (self.kafka_msk_role_arn or self.kafka_msk_region):
            raise ValueError(
                "PREFS_KAFKA_MSK_REGION and PREFS_KAFKA_MSK_ROLE_ARN need PREFS_KAFKA_SASL_MECHANISM=AWS_MSK_IAM: "
                "unset them, or set it"
            )
        tls = {
            name: value
            for name in ("ca", "certificate", "key")
            for value in [
                (getattr(self, f"kafka_ssl_{name}_location"), getattr(self, f"kafka_ssl_{name}_pem"))
            ]
        }
        for name, (location, pem) in tls.items():
            variable = f"PREFS_KAFKA_SSL_{name.upper()}"
            if location and pem:
                raise ValueError(f"{variable}_LOCATION and {variable}_PEM contradict each other: unset one")
            if (location or pem) and not protocol.endswith("SSL"):
                raise ValueError(
                    f"{variable}_{'LOCATION' if location else 'PEM'} needs PREFS_KAFKA_SECURITY_PROTOCOL=SSL or "
                    f"SASL_SSL, not {protocol}"
                )
            if (location or pem) and mechanism == "AWS_MSK_IAM":
                raise ValueError(
                    f"{variable}_{'LOCATION' if location else 'PEM'} contradicts "
                    "PREFS_KAFKA_SASL_MECHANISM=AWS_MSK_IAM, where the system's authorities and the AWS identity are "
                    "used: unset it"
                )
        if any(tls["certificate"]) != any(tls["key"]):
            given, missing = ("CERTIFICATE", "KEY") if any(tls["certificate"]) else ("KEY", "CERTIFICATE")
            raise ValueError(
                f"PREFS_KAFKA_SSL_{given} needs PREFS_KAFKA_SSL_{missing} as well: set both (each _LOCATION or _PEM), "
                "or neither"
            )
        if self.kafka_ssl_key_password is not None and not any(tls["key"]):
            raise ValueError(
                "PREFS_KAFKA_SSL_KEY_PASSWORD needs PREFS_KAFKA_SSL_KEY_LOCATION or PREFS_KAFKA_SSL_KEY_PEM"
            )

    def _check_schema_registry(self) -> None:
        url, user, password = (
            self.schema_registry_url,
            self.schema_registry_user,
            self.schema_registry_password,
        )
        if (user is None) != (password is None):
            raise ValueError(
                "PREFS_SCHEMA_REGISTRY_USER and PREFS_SCHEMA_REGISTRY_PASSWORD need each other: set both, or neither"
            )
        if url is None:
            if user is not None:
                raise ValueError("PREFS_SCHEMA_REGISTRY_USER needs PREFS_SCHEMA_REGISTRY_URL")
            return
        # No message has the address, which may contain a password.
        try:
            address = urlsplit(url)
            host = address.hostname or ""
        except ValueError as error:
            raise ValueError(f"PREFS_SCHEMA_REGISTRY_URL is no URL ({error}): correct it") from None
        if address.scheme not in ("http", "https") or not host:
            raise ValueError(
                "PREFS_SCHEMA_REGISTRY_URL must be an http or https URL, e.g. https://registry.example.com"
            )
        if address.username or address.password:
            raise ValueError(
                "PREFS_SCHEMA_REGISTRY_URL holds credentials: remove them from it, and set "
                "PREFS_SCHEMA_REGISTRY_USER and PREFS_SCHEMA_REGISTRY_PASSWORD"
            )
        if password is not None and address.scheme == "http" and not is_loopback(url):
            raise ValueError(
                f"PREFS_SCHEMA_REGISTRY_URL sends its password to {host} without TLS: use https://, or a registry on "
                "this machine"
            )

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
    def named(self) -> Environment | None:
        """The environment with the names of its parts, None without PREFS_ENVIRONMENT."""
        return None if self.environment is None else Environment(self.environment)

    @property
    def consumer_group(self) -> str:
        """The Kafka consumer group of the platform's readers."""
        return self.named.consumer_group if self.named else CONSUMER_GROUP

    @property
    def dagster_tags(self) -> dict[str, str]:
        """The tags of the environment's assets, jobs and runs in Dagster; empty without PREFS_ENVIRONMENT."""
        return self.named.dagster_tags if self.named else {}

    @property
    def state_dir(self) -> Path:
        """The folder of the state that is one environment's: dbt's artifacts, what was seen, and Dagster's home.

        It is the data folder without an environment. The embedded services and the Iceberg files, which several
        environments share, are always in the data folder itself.
        """
        return self.data_dir / "environments" / self.environment if self.environment else self.data_dir

    @property
    def home(self) -> Path:
        """The folder that holds what belongs to the project beside its models."""
        return find_home(self.project_dir)

    @cached_property
    def project(self) -> Path:
        """The folder of the dbt project. Raises RegistryError naming the searched folders."""
        return find_project(named=self.project_dir)

    def registry(self) -> Registry:
        """The project's declarations, read once. Raises RegistryError naming the file and the remedy."""
        return self._registry

    @cached_property
    def _registry(self) -> Registry:
        return load_registry(self.project)

    def reread(self) -> Settings:
        """Return the same settings, whose `registry` reads the project's declarations again."""
        again = self.model_copy()
        again.__dict__.pop("_registry", None)
        return again

    def of_environment(self, name: str) -> Settings:
        """Return the same settings for another environment. Raises SettingsError if it cannot be one."""
        try:
            named = Environment(name)
        except EnvironmentNameError as error:
            raise SettingsError(str(error)) from None
        return self.model_copy(update={"environment": named.name, **_parts(named)})

    def entrance(self) -> Entrance:
        """Return how the feature server and the console let clients in. Raises AccessError for malformed tokens."""
        text = self.tokens.get_secret_value() if self.tokens else ""
        return Entrance(Tokens(text, self.tokens_file), self.tls_certificate, self.tls_key)

    @property
    def secrets(self) -> list[str]:
        """The values that no log may show: those of secret settings, and of the AWS credentials in the environment."""
        given = [getattr(self, name) for name in type(self).model_fields]
        found = [value.get_secret_value() for value in given if isinstance(value, SecretStr)]
        found += self.alert_webhooks
        found += [os.environ.get(name, "") for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")]
        return [value for value in found if value]

    @property
    def raw_by_sink(self) -> bool:
        """Whether RisingWave's sink writes raw messages to the lake: only where its raw tables are append-only."""
        return self.export == "sink" and self.raw_retention_seconds is not None

    @property
    def served_log_place(self) -> tuple[str, str] | None:
        """The kind and the name of the place of the served log, None without one."""
        if self.served_log is None:
            return None
        kind, _, name = self.served_log.partition(":")
        return kind, name

    @property
    def served_log_folders(self) -> tuple[Path, ...]:
        """The folder of the served log; none if it is not in files of this machine."""
        place = self.served_log_place
        return (Path(place[1]).expanduser(),) if place is not None and place[0] == "files" else ()

    @property
    def given(self) -> Mapping[str, str]:
        """The variables that were given in place of the environment's (`settings_with`); they may hold secrets."""
        return self._given

    @property
    def alert_webhooks(self) -> tuple[str, ...]:
        """The URLs that receive alerts."""
        given = self.alert_webhook.get_secret_value() if self.alert_webhook else ""
        return tuple(filter(None, (url.strip() for url in given.split(","))))

    @property
    def asset_prefix_path(self) -> list[str]:
        """The parts of the asset keys' prefix."""
        return self.asset_prefix.split("/") if self.asset_prefix else []

    def dagster_name(self, name: str) -> str:
        """Return the name of a job, op, schedule, sensor or pool among those of other platforms in Dagster."""
        return "_".join([*self.asset_prefix_path, name])

    @property
    def port(self) -> int:
        """The engine's port, by default that of the chosen engine."""
        return self.engine_port or (54329 if self.engine == "local" else 4566)

    @property
    def kept_runs(self) -> int:
        """The number of runs of each recurring job that Dagster keeps, by default that of the chosen engine."""
        return self.readings_kept_runs or (300 if self.engine == "local" else 5000)

    @property
    def database(self) -> str:
        """The engine's database, by default that of the chosen engine."""
        return self.engine_database or ("prefs" if self.engine == "local" else "dev")

    @property
    def user(self) -> str:
        """The engine's user, by default that of the chosen engine."""
        return self.engine_user or ("prefs" if self.engine == "local" else "root")

    @property
    def engine_passfile(self) -> Path | None:
        """The password file of the embedded engine; None if a password is set, or for another engine."""
        if self.engine != "local" or self.engine_password.get_secret_value():
            return None
        return self.data_dir / "pgpass"

    @property
    def training_folder(self) -> Path:
        """The folder to which runs started in Dagster may write training sets."""
        return self.training_dir or self.state_dir / "training-sets"

    @property
    def kafka_topics(self) -> dict[str, str]:
        """Return the names in Kafka of the project's topics.

        Raises RegistryError, and SettingsError for a variable that names no topic of the project, or two.
        """
        variables = {topic: kafka_variable(topic) for topic in self.registry().topics}
        for given in sorted(KAFKA_TOPIC + name for name in self.kafka_topic_names):
            named = [topic for topic, variable in variables.items() if variable == given]
            if len(named) > 1:
                raise SettingsError(f"{given} means topic {' and topic '.join(named)}: rename one of them")
            if not named:
                known = {**known_variables(), **dict.fromkeys(variables.values(), "")}
                raise _unknown_setting(given, known, f"topics are {', '.join(variables)}")
        return {
            topic: self.kafka_topic_names.get(variable.removeprefix(KAFKA_TOPIC), topic)
            for topic, variable in variables.items()
        }

    @property
    def publishes(self) -> bool:
        """Whether this platform writes DynamoDB itself, rather than a RisingWave sink."""
        return self.publish == "publisher" or (self.publish == "auto" and self.engine == "local")

    @property
    def follows(self) -> bool:
        """Whether this platform writes DynamoDB from RisingWave's subscriptions."""
        return self.publish == "changefeed"

    @property
    def aws_endpoint(self) -> str | None:
        """The endpoint of every AWS client; None means AWS itself."""
        if self.aws_endpoint_url or self.engine != "local":
            return self.aws_endpoint_url
        return f"http://127.0.0.1:{self.local_aws_port}"

    @property
    def uses_local_aws(self) -> bool:
        """Whether the local AWS server is in use, and so must be started."""
        return self.engine == "local" and self.aws_endpoint_url is None

    @property
    def production(self) -> str | None:
        """Why these settings are of a production, where nothing sends events to look at; None if they are not."""
        if self.named and self.named.is_production:
            return f"PREFS_ENVIRONMENT is {self.environment}"
        if self.aws_endpoint is None:
            return "DynamoDB is AWS's own (AWS_ENDPOINT_URL is not set)"
        return "PREFS_PROVISIONING is verify" if self.provisioning == "verify" else None

    @property
    def warehouse(self) -> str:
        """URI of the Iceberg warehouse."""
        return self.iceberg_warehouse or (self.data_dir / "iceberg").as_uri()


def known_variables() -> dict[str, str]:
    """Return the field name of every environment variable, without those of the topics' names in Kafka."""
    named = {field.alias or PREFIX + name.upper(): name for name, field in Settings.model_fields.items()}
    return {variable: name for variable, name in named.items() if variable != KAFKA_TOPIC}


def _unknown_setting(name: str, known: Iterable[str], remedy: str) -> SettingsError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else remedy
    return SettingsError(f"unknown setting {name}: {hint}")


def load_settings(env_file: Path | None = None) -> Settings:
    """Return validated settings from the environment and `.env`; the environment takes precedence.

    `env_file` defaults to the file that PREFS_ENV_FILE names, else to `.env` next to the project. Its
    variables are exported into this process's environment if unset there, because dbt and botocore read them
    from it.

    Raises SettingsError naming the variable, the rule and the remedy: for a `PREFS_*` name that no setting
    has, an invalid value, or settings that contradict each other.
    """
    named = os.environ.get(f"{PREFIX}PROJECT_DIR")
    env_file = env_file or Path(
        os.environ.get(ENV_FILE) or find_home(Path(named).expanduser() if named else None) / ".env"
    )
    if env_file.is_file():
        for name, value in dotenv_values(env_file).items():
            if value is not None:
                os.environ.setdefault(name, value)
    known = known_variables()
    # These configure test suites that use a server; they are no settings of the product.
    suite = {ENV_FILE, "PREFS_RISINGWAVE_URL", "PREFS_BENCH_SCALE"}
    for name in sorted(os.environ):
        listed = name in known or name in suite or name.startswith(KAFKA_TOPIC)
        if name in _RENAMED and os.environ[name]:
            raise SettingsError(f"{name} is now {_RENAMED[name]}: rename it")
        if name.startswith(PREFIX) and not listed:
            raise _unknown_setting(name, known, "remove it; .env.example lists every setting")
    settings = _validated({}, known)
    if settings.kafka_topic_names:
        # A service that only reads profiles has no project and reads no topic.
        with suppress(RegistryError):
            _ = settings.kafka_topics
    return settings


def settings_with(given: Mapping[str, str]) -> Settings:
    """Return validated settings for one of several projects in a process: `given` by variable, else the environment.

    No `.env` is read, because two projects have one each. Names of topics in Kafka that the environment has for another
    project are left out. Raises SettingsError like `load_settings`, and RegistryError if there is no project.
    """
    known = known_variables()
    for name in sorted(given):
        if name not in known and not name.startswith(KAFKA_TOPIC):
            raise _unknown_setting(name, known, "remove it; .env.example lists every setting")
    settings = _validated(given, known)
    variables = {kafka_variable(topic) for topic in settings.registry().topics}
    names = {name: value for name, value in given.items() if name.startswith(KAFKA_TOPIC)}
    for name, value in settings.kafka_topic_names.items():
        if KAFKA_TOPIC + name in variables:
            names.setdefault(KAFKA_TOPIC + name, value)
    settings = _validated({**given, **names}, known, kafka_topic_names=names)
    _ = settings.kafka_topics
    return settings


def _validated(
    given: Mapping[str, str], known: Mapping[str, str], kafka_topic_names: Mapping[str, str] | None = None
) -> Settings:
    # By alias, under which the environment's value would otherwise win.
    fields: dict[str, Any] = {
        Settings.model_fields[known[name]].alias or known[name]: value
        for name, value in given.items()
        if name in known and value
    }
    if kafka_topic_names is not None:
        fields[KAFKA_TOPIC] = {
            name.removeprefix(KAFKA_TOPIC): value for name, value in kafka_topic_names.items()
        }
    try:
        settings = Settings(**fields)
    except ValidationError as error:
        variables = {field: variable for variable, field in known.items()}
        problems = []
        for problem in error.errors(include_input=False, include_url=False):
            if problem["type"] == "default_factory_not_called":
                # A default that depends on other settings, one of which is invalid and is named by itself.
                continue
            place = str(problem["loc"][0]) if problem["loc"] else ""
            name = variables.get(place, place)
            if place == "kafka_topic_names":
                name = KAFKA_TOPIC + str(problem["loc"][-1])
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {message}" if name else message)
        raise SettingsError("; ".join(problems) + " (see .env.example)") from None
    settings._given = dict(given)
    return settings
