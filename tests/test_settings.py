"""Settings: what is refused, how it is told, and that `.env.example` documents every one."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from dagster_prefs.declarations.registry import Registry, RegistryError, render_registry
from dagster_prefs.settings import (
    PROJECT_ROOT,
    Settings,
    SettingsError,
    kafka_variable,
    known_variables,
    load_settings,
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in known_variables():
        # Set first, so that what a test's .env exports is taken back as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def refused(**environment: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsError) as caught:
            load_settings()
    message = str(caught.value)
    assert "\n" not in message
    return message


def kafka(**settings: str) -> dict[str, str]:
    """Brokers, and these settings of PREFS_KAFKA_*."""
    return {
        "PREFS_KAFKA_BOOTSTRAP": "b:9094",
        **{f"PREFS_KAFKA_{name}": value for name, value in settings.items()},
    }


def test_the_defaults_run_on_this_machine() -> None:
    settings = load_settings()
    assert (settings.engine, settings.port, settings.database, settings.user) == (
        "local", 54329, "prefs", "prefs",
    )  # fmt: skip
    assert settings.uses_local_aws
    assert settings.aws_endpoint == "http://127.0.0.1:54330"
    assert settings.data_dir == PROJECT_ROOT / ".prefs"
    assert settings.warehouse == (PROJECT_ROOT / ".prefs" / "iceberg").as_uri()


def test_risingwave_has_its_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFS_ENGINE", "risingwave")
    settings = load_settings()
    assert (settings.port, settings.database, settings.user) == (4566, "dev", "root")
    assert settings.aws_endpoint is None
    assert not settings.uses_local_aws


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PREFS_ENGINE_PROT", "did you mean PREFS_ENGINE_PORT?"),
        ("PREFS_KAFKA_BOOTSTRAPS", "did you mean PREFS_KAFKA_BOOTSTRAP?"),
        ("PREFS_ZZZZZZZZ_QQQQQQQQ", "remove it; .env.example lists every setting"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name: str, hint: str) -> None:
    assert refused(**{name: "1"}) == f"unknown setting {name}: {hint}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFS_ENGINE", "oracle"),
        ("PREFS_ENGINE_PORT", "0"),
        ("PREFS_ENGINE_PORT", "65536"),
        ("PREFS_ENGINE_PORT", "five"),
        ("PREFS_LOCAL_AWS_PORT", "-1"),
        ("PREFS_ENGINE_SSLMODE", "maybe"),
        ("PREFS_PROVISIONING", "hope"),
        ("PREFS_TABLE_PREFIX", "a b"),
        ("PREFS_TABLE_PREFIX", "x" * 65),
        ("PREFS_EXPIRY_SPREAD_SECONDS", "86400"),
        ("PREFS_EXPIRY_SPREAD_SECONDS", "-1"),
        ("PREFS_REFRESH_POLL_SECONDS", "4"),
        ("PREFS_SCHEDULES", "sometimes"),
        ("PREFS_EXPORT_START_DATE", "2025-02-30"),
    ],
)
def test_a_bad_value_is_refused_by_its_variables_name(name: str, value: str) -> None:
    message = refused(**{name: value})
    assert message.startswith(f"{name}: ")
    assert message.endswith("(see .env.example)")


@pytest.mark.parametrize(
    "name",
    ["PREFS_TABLE_PREFIX", "PREFS_ENGINE", "AWS_REGION", "PREFS_ENGINE_PORT", "PREFS_ALERT_WEBHOOK"],
)
def test_a_blank_at_an_end_is_told_as_such(name: str) -> None:
    message = refused(**{name: "prod "})
    assert message == f"{name}: the value begins or ends with a blank: remove it (see .env.example)"


def test_a_password_may_end_in_a_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFS_ENGINE_PASSWORD", "open sesame ")
    assert load_settings().engine_password.get_secret_value() == "open sesame "


def test_a_region_that_aws_does_not_have_is_refused_where_aws_is_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = refused(PREFS_ENGINE="risingwave", AWS_REGION="eu-central-9")
    assert message.startswith("AWS_REGION=eu-central-9 is no region with DynamoDB that botocore ")
    assert "did you mean eu-central-" in message
    # A server of one's own may call its region anything.
    monkeypatch.setenv("AWS_REGION", "moon-base-1")
    assert load_settings().aws_region == "moon-base-1"
    monkeypatch.setenv("PREFS_ENGINE", "risingwave")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://dynamodb.internal:8000")
    assert load_settings().aws_region == "moon-base-1"


def test_every_bad_value_is_told_at_once() -> None:
    message = refused(PREFS_ENGINE_PORT="0", PREFS_SCHEDULES="sometimes")
    assert "PREFS_ENGINE_PORT: " in message
    assert "PREFS_SCHEDULES: " in message


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PREFS_PUBLISH": "sink"}, ["PREFS_PUBLISH=sink", "PREFS_ENGINE=risingwave"]),
        (
            {"PREFS_PUBLISH": "changefeed"},
            ["PREFS_PUBLISH=changefeed", "PREFS_ENGINE=risingwave", "publisher"],
        ),
        (
            {"PREFS_ENGINE": "risingwave", "PREFS_PUBLISH": "publisher"},
            ["PREFS_PUBLISH=publisher", "PREFS_ENGINE=local", "changefeed"],
        ),
        (
            {"PREFS_ICEBERG_CATALOG": "rest", "PREFS_ICEBERG_WAREHOUSE": "s3://lake"},
            ["PREFS_ICEBERG_CATALOG=rest", "PREFS_ICEBERG_URI"],
        ),
        ({"PREFS_ICEBERG_CATALOG": "glue"}, ["PREFS_ICEBERG_CATALOG=glue", "PREFS_ICEBERG_WAREHOUSE"]),
        ({"PREFS_ENGINE_HOST": "db.example"}, ["PREFS_ENGINE=local", "PREFS_ENGINE_HOST"]),
        (
            {"PREFS_KAFKA_SECURITY_PROTOCOL": "SSL"},
            ["PREFS_KAFKA_SECURITY_PROTOCOL", "PREFS_KAFKA_BOOTSTRAP"],
        ),
        (kafka(SECURITY_PROTOCOL="SASL_SSL"), ["PROTOCOL=SASL_SSL", "PREFS_KAFKA_SASL_MECHANISM"]),
        (
            kafka(SASL_MECHANISM="PLAIN"),
            ["MECHANISM=PLAIN", "PREFS_KAFKA_SECURITY_PROTOCOL=SASL_SSL", "PLAINTEXT"],
        ),
        (
            kafka(SECURITY_PROTOCOL="SASL_PLAINTEXT", SASL_MECHANISM="AWS_MSK_IAM"),
            ["MECHANISM=AWS_MSK_IAM", "PREFS_KAFKA_SECURITY_PROTOCOL=SASL_SSL", "SASL_PLAINTEXT"],
        ),
        (
            kafka(SECURITY_PROTOCOL="SASL_SSL", SASL_MECHANISM="PLAIN", SASL_USERNAME="u"),
            ["MECHANISM=PLAIN", "PREFS_KAFKA_SASL_USERNAME", "PREFS_KAFKA_SASL_PASSWORD"],
        ),
        (
            kafka(SECURITY_PROTOCOL="SASL_SSL", SASL_MECHANISM="AWS_MSK_IAM", SASL_PASSWORD="p"),
            ["PREFS_KAFKA_SASL_PASSWORD", "PREFS_KAFKA_SASL_MECHANISM=PLAIN"],
        ),
        (kafka(MSK_ROLE_ARN="arn:aws:iam::1:role/r"), ["PREFS_KAFKA_MSK_ROLE_ARN", "AWS_MSK_IAM"]),
        (
            kafka(SECURITY_PROTOCOL="SSL", SSL_CA_LOCATION="/ca.pem", SSL_CA_PEM="-----BEGIN"),
            ["PREFS_KAFKA_SSL_CA_LOCATION", "_PEM", "unset one"],
        ),
        (kafka(SSL_CA_LOCATION="/ca.pem"), ["PREFS_KAFKA_SSL_CA_LOCATION", "PROTOCOL=SSL", "PLAINTEXT"]),
        (
            kafka(SECURITY_PROTOCOL="SASL_SSL", SASL_MECHANISM="AWS_MSK_IAM", SSL_CA_PEM="-----BEGIN"),
            ["PREFS_KAFKA_SSL_CA_PEM", "AWS_MSK_IAM"],
        ),
        (
            kafka(SECURITY_PROTOCOL="SSL", SSL_CERTIFICATE_PEM="-----BEGIN"),
            ["PREFS_KAFKA_SSL_CERTIFICATE", "PREFS_KAFKA_SSL_KEY"],
        ),
        (
            kafka(SECURITY_PROTOCOL="SSL", SSL_KEY_PASSWORD="p"),
            ["PREFS_KAFKA_SSL_KEY_PASSWORD", "PREFS_KAFKA_SSL_KEY_PEM"],
        ),
    ],
)
def test_contradictions_name_both_sides(environment: dict[str, str], named: list[str]) -> None:
    message = refused(**environment)
    assert all(name in message for name in named), message


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.env"
    file.write_text("PREFS_ENGINE_PORT=6001\nPREFS_LOCAL_AWS_PORT=6002\nAWS_REGION=us-east-1\n")
    monkeypatch.setenv("PREFS_ENGINE_PORT", "7001")
    settings = load_settings(file)
    assert (settings.engine_port, settings.local_aws_port, settings.aws_region) == (7001, 6002, "us-east-1")
    # dbt and botocore read these themselves.
    assert os.environ["AWS_REGION"] == "us-east-1"
    assert os.environ["PREFS_ENGINE_PORT"] == "7001"


def test_another_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.env"
    file.write_text("PREFS_ENGINE_PORT=6001\n")
    monkeypatch.setenv("PREFS_ENV_FILE", str(file))
    assert load_settings().port == 6001


def test_a_mistake_in_the_file_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.env"
    file.write_text("PREFS_ENGIN=local\n")
    monkeypatch.setenv("PREFS_ENGIN", "")
    monkeypatch.delenv("PREFS_ENGIN")
    with pytest.raises(
        SettingsError, match=re.escape("unknown setting PREFS_ENGIN: did you mean PREFS_ENGINE?")
    ):
        load_settings(file)


def test_an_empty_value_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in known_variables():
        monkeypatch.setenv(name, "")
    assert load_settings() == Settings.model_construct()


def test_the_registry_is_that_of_the_project_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = PROJECT_ROOT / "dbt_project"
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(example))
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.registry().project == "dagster_prefs"
    assert settings.registry() is settings.registry()
    assert settings == load_settings(), "reading it changes no setting"
    monkeypatch.delenv("PREFS_PROJECT_DIR")
    with pytest.raises(RegistryError, match=r"no dbt project in .* set PREFS_PROJECT_DIR"):
        load_settings().registry()
    monkeypatch.chdir(example / "models")
    assert load_settings().registry() == settings.registry()


def test_the_password_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2-very-secret"
    monkeypatch.setenv("PREFS_ENGINE_PASSWORD", secret)
    settings = load_settings()
    assert settings.engine_password.get_secret_value() == secret
    assert all(secret not in shown for shown in (repr(settings), str(settings), settings.model_dump_json()))
    assert secret not in refused(PREFS_ENGINE_PORT="0")


def test_the_example_lists_every_setting_with_its_description_and_default(registry: Registry) -> None:
    lines = (PROJECT_ROOT / ".env.example").read_text().splitlines()
    listed = {
        line[1:].split("=", 1)[0]: number for number, line in enumerate(lines) if re.match(r"#[A-Z_]+=", line)
    }
    topics = {kafka_variable(topic): topic for topic in registry.topics}
    assert set(listed) == {*known_variables(), *topics}
    # Those of the example stand for every project's.
    for variable, topic in topics.items():
        assert lines[listed[variable] - 1] == f"# Name of topic {topic} in Kafka."
        assert lines[listed[variable]] == f"#{variable}={topic}"
    assert f"# {Settings.model_fields['kafka_topic_names'].description}" in lines
    assert all(line == "" or line.startswith("#") for line in lines), "every value is commented"
    for variable, name in known_variables().items():
        field = Settings.model_fields[name]
        number = listed[variable]
        assert any(lines[number - back] == f"# {field.description}" for back in (1, 2)), variable
        default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        # The default folder depends on where the project lies.
        shown = "" if default in (None, ()) or name == "data_dir" else str(default)
        assert lines[number] == f"#{variable}={shown}"


def test_every_variable_that_dbt_reads_is_a_setting() -> None:
    project = PROJECT_ROOT / "dbt_project"
    files = [*project.rglob("*.sql"), *project.glob("*.yml")]
    read = {
        name
        for path in files
        if "target" not in path.relative_to(project).parts
        for name in re.findall(r"env_var\(['\"](PREFS_[A-Z_]+)['\"]\s*[,)]", path.read_text())
    }
    assert read
    assert read <= known_variables().keys()


def test_hosts_of_the_ui_are_a_list_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFS_UI_HOSTS", "Dagster.example.com,localhost:3001")
    assert load_settings().ui_hosts == ("dagster.example.com", "localhost:3001")
    assert "PREFS_UI_HOSTS: 'https://x' is no host name" in refused(PREFS_UI_HOSTS="https://x")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PREFS_KAFKA_TOPIC_USER_EVENTS", "user'events"),
        ("PREFS_KAFKA_TOPIC_ITEMS", "${AWS_SECRET_ACCESS_KEY}"),
        ("PREFS_KAFKA_TOPIC_ITEMS", "x" * 250),
        ("AWS_REGION", "eu-central-1', aws.endpoint_url = 'http://evil"),
        ("PREFS_SINK_ROLE_ARN", "arn:aws:iam::123456789012:role/x' , y = 'z"),
        ("PREFS_ENGINE_SCHEMA", "public; drop schema public"),
        ("PREFS_ICEBERG_NAMESPACE", "a.b"),
    ],
)
def test_a_name_that_becomes_part_of_a_statement_is_checked(variable: str, value: str) -> None:
    message = refused(**{variable: value})
    assert message.startswith(f"{variable}: {value[:100]!r} is not a")


def test_each_topic_of_the_project_may_have_another_name_in_kafka(
    registry: Registry, courses: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFS_KAFKA_TOPIC_USER_EVENTS", "shop.v2")
    monkeypatch.setenv("PREFS_KAFKA_TOPIC_ITEMS", "")
    names = {topic: topic for topic in registry.topics}
    assert load_settings().kafka_topics == names | {"user.events": "shop.v2"}
    monkeypatch.setenv("PREFS_KAFKA_TOPIC_VEIW_EVENTS", "views")
    with pytest.raises(SettingsError, match="did you mean PREFS_KAFKA_TOPIC_VIEW_EVENTS"):
        load_settings()
    # The settings of the one project are none of another.
    (tmp_path / "dbt_project.yml").write_text("name: courses")
    (tmp_path / "registry.json").write_text(render_registry(courses))
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(tmp_path))
    with pytest.raises(SettingsError, match="unknown setting PREFS_KAFKA_TOPIC_USER_EVENTS"):
        load_settings()
    monkeypatch.delenv("PREFS_KAFKA_TOPIC_USER_EVENTS")
    monkeypatch.delenv("PREFS_KAFKA_TOPIC_VEIW_EVENTS")
    monkeypatch.delenv("PREFS_KAFKA_TOPIC_ITEMS")
    monkeypatch.setenv("PREFS_KAFKA_TOPIC_LESSON_EVENTS", "lessons")
    assert load_settings().kafka_topics == {"lesson_events": "lessons"}
    # A service that has no project cannot tell, and needs no topic.
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(tmp_path / "none"))
    assert load_settings().kafka_topic_names == {"LESSON_EVENTS": "lessons"}


def test_a_name_in_kafka_that_two_topics_would_take_is_refused(registry: Registry) -> None:
    settings = Settings(kafka_topic_names={"A_B": "x"})
    topic = registry.topics["items"]
    settings.__dict__["_registry"] = replace(registry, topics={"a.b": topic, "a_b": topic})
    with pytest.raises(SettingsError, match=r"PREFS_KAFKA_TOPIC_A_B means topic a\.b and topic a_b"):
        _ = settings.kafka_topics


REST = {"PREFS_ICEBERG_CATALOG": "rest", "PREFS_ICEBERG_WAREHOUSE": "s3://lake/tables"}


@pytest.mark.parametrize(
    "environment",
    [
        {"PREFS_ICEBERG_URI": "http://catalog.internal:8181", "PREFS_ICEBERG_CREDENTIAL": "me:hunter2"},
        {"PREFS_ICEBERG_URI": "HTTP://me:hunter2@catalog.internal:8181"},
        {"PREFS_ICEBERG_URI": "http://me@10.0.0.7/catalog"},
    ],
)
def test_a_catalogs_credential_needs_tls_off_this_machine(environment: dict[str, str]) -> None:
    message = refused(**REST, **environment)
    assert "PREFS_ICEBERG_URI sends its credential to" in message
    assert "without TLS: use https://" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "environment",
    [
        {"PREFS_ICEBERG_URI": "http://catalog.internal:8181"},
        {
            "PREFS_ICEBERG_URI": "https://me:hunter2@catalog.internal",
            "PREFS_ICEBERG_CREDENTIAL": "me:hunter2",
        },
        {"PREFS_ICEBERG_URI": "http://localhost:8181", "PREFS_ICEBERG_CREDENTIAL": "me:hunter2"},
        {"PREFS_ICEBERG_URI": "http://[::1]:8181", "PREFS_ICEBERG_CREDENTIAL": "me:hunter2"},
    ],
)
def test_a_catalog_with_tls_or_here_or_without_a_credential_is_taken(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (REST | environment).items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.iceberg_uri == environment["PREFS_ICEBERG_URI"]
    assert "hunter2" not in repr(settings)


def test_a_sink_never_gets_an_address_with_a_password() -> None:
    message = refused(
        **REST,
        PREFS_ENGINE="risingwave",
        PREFS_EXPORT="sink",
        PREFS_ICEBERG_URI="https://me:hunter2@catalog.internal",
        AWS_REGION="eu-central-1",
    )
    assert "PREFS_ICEBERG_URI holds a password" in message
    assert "PREFS_ICEBERG_CREDENTIAL" in message
    assert "hunter2" not in message


def test_an_address_that_is_none_is_refused_without_repeating_it() -> None:
    message = refused(**REST, PREFS_ICEBERG_URI="https://me:hunter2@[::1")
    assert "PREFS_ICEBERG_URI is no address of a catalog" in message
    assert "hunter2" not in message
