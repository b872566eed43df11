"""The module applied for real, to a local AWS server: what came of it, and who may do what."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import pyarrow as pa
import pytest
from iam_policy import ALLOWED, EXPLICITLY_DENIED, NOT_ALLOWED, decide
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from shipped import GENRE, INTERACTIONS, SHORT, WATCH
from terraform_harness import CREDENTIALS, REGISTRY, ROOT, Applied, clean_environment, recorded_requests
from warm import Warm

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.access import ItemAccess
from dagster_prefs.dynamodb.tables import TableError, TableReport, dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.erasure.items import EntityItems
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.tables import arrow_schema, ensure_table
from dagster_prefs.serving.profiles import ClientOptions, ProfileClient
from dagster_prefs.settings import known_variables

ACTORS = ("sink-writer", "exporter", "serving-reader", "freshness-reader", "provisioner", "eraser")
ACCOUNT = "123456789012"
REGION = "eu-central-1"
TABLE = f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/staging-viewer_profiles"
OTHER_TABLE = f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/prod-viewer_profiles"
BUCKET = f"arn:aws:s3:::staging-prefs-lake-{ACCOUNT}-{REGION}"
OTHER_BUCKET = f"arn:aws:s3:::prod-prefs-lake-{ACCOUNT}-{REGION}"
TILES = f"{BUCKET}/warehouse/staging_training.db/viewer_watch_daily"
GLUE = f"arn:aws:glue:{REGION}:{ACCOUNT}"
KEY = "the customer key"
# Of the rows that tests write by themselves: before the first day that the platform exports.
DAY = date(2020, 1, 2)
READERS = {"serving-reader", "freshness-reader"}
DESCRIBERS = {"sink-writer", "freshness-reader", "provisioner", "eraser"}
KEYS_ONLY = {
    "dynamodb:Attributes": ["viewer_id", "domain_key"],
    "dynamodb:Select": "SPECIFIC_ATTRIBUTES",
}
VIA_DYNAMODB = {"kms:ViaService": f"dynamodb.{REGION}.amazonaws.com"}
VIA_S3 = {"kms:ViaService": f"s3.{REGION}.amazonaws.com"}


def test_second_plan_is_empty(applied: Applied) -> None:
    plan = applied.terraform.run("plan", "-no-color", "-detailed-exitcode", *applied.variables, check=False)
    assert plan.returncode == 0, plan.stdout[-4000:] + plan.stderr


def test_env_is_what_the_platform_reads(applied: Applied, tmp_path: Path) -> None:
    env = applied.terraform.run("output", "-raw", "env").stdout
    written = dict(line.split("=", 1) for line in env.splitlines())
    assert set(written) <= set(known_variables())
    (tmp_path / ".env").write_text(env)
    script = (
        "import sys, pathlib; from dagster_prefs.settings import load_settings; "
        "print(load_settings(pathlib.Path(sys.argv[1])).model_dump_json())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / ".env")],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)
    expected = {
        "aws_endpoint_url": applied.endpoint,
        "aws_region": REGION,
        "engine": "local",
        "engine_port": int(written["PREFS_ENGINE_PORT"]),
        "provisioning": "verify",
        "table_prefix": "staging-",
        "iceberg_catalog": "glue",
        "iceberg_warehouse": f"{BUCKET.replace('arn:aws:s3:::', 's3://')}/warehouse",
        "iceberg_namespace": "staging_training",
    }
    assert {name: settings[name] for name in expected} == expected


# Small, but with something in every domain; yesterday is the newest day, because today's is not exported yet.
SMALL = (
    "--viewers", "15", "--view-events", "200", "--shop-events", "60", "--interactions", "80", "--days", "2",
    "--until", (datetime.now(UTC).date() - timedelta(days=1)).isoformat(),
)  # fmt: skip
# One process that does everything plays these; docs/operations.md says so.
PLAYED = ("provisioner", "sink-writer", "exporter", "freshness-reader", "serving-reader")


def test_demo_runs_against_what_was_applied(
    applied: Applied,
    policies: dict[str, list[dict[str, Any]]],
    local_credentials: None,
    tmp_path: Path,
    warm: Warm,
) -> None:
    """`terraform output -raw env > .env` is all that the platform is told, and its roles allow all that it asks."""
    env_file = tmp_path / ".env"
    env_file.write_text(applied.terraform.run("output", "-raw", "env").stdout)
    environment = clean_environment() | CREDENTIALS | {
        "PREFS_ENV_FILE": str(env_file), "PREFS_DATA_DIR": str(tmp_path / "state"),
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false", "DAGSTER_DISABLE_TELEMETRY": "yes",
    }  # fmt: skip

    def prefs(*arguments: str) -> str:
        done = warm.run(["prefs", *arguments], environment=environment)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    try:
        with recorded_requests(applied.endpoint) as requests:
            outcome = json.loads(prefs("demo", "--json", *SMALL))
    finally:
        prefs("down", "--delete-state")

    # DynamoDB: one item per row of each rolling view, and the client reads what the demo showed.
    published = Counter(
        item["domain_key"]["S"]
        for page in applied.client("dynamodb")
        .get_paginator("scan")
        .paginate(TableName=applied.outputs["table_names"]["viewer"])
        for item in page["Items"]
        # The follower, which runs on after the demo, sends canaries.
        if int(item["viewer_id"]["N"]) >= 0
    )
    contract = load_contract(ROOT / REGISTRY)
    rows = {key: outcome["rows"][domain.relation] for key, domain in contract.domains.items()}
    assert published == rows
    assert min(rows.values()) > 0
    with profile_client(applied) as client:
        profile = client.get(outcome["id"])
    served = {name: read["attributes"] for name, read in profile.as_dict()["domains"].items()}
    assert json.loads(json.dumps(served, default=str)) == outcome["items"]

    # Iceberg: each table's snapshot in the Glue catalog holds every tile, in files of the lake.
    catalog = lake_catalog(applied)
    for spec, relation in (
        (WATCH, "viewer_watch_metrics_1d"),
        (GENRE, "viewer_genre_metrics_1d"),
        (INTERACTIONS, "viewer_interactions_1d"),
    ):
        table = catalog.load_table(spec.identifier(applied.outputs["iceberg_namespace"]))
        assert table.scan().count() == outcome["rows"][relation] > 0
        files = table.inspect.files()["file_path"].to_pylist()
        assert all(name.startswith(f"{applied.outputs['iceberg_warehouse']}/") for name in files)

    together = [document for actor in PLAYED for document in policies[actor]]
    assert_allowed(together, requests)


@pytest.fixture
def local_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for the local AWS server, and nothing that leads to another one."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "local")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "local")


def test_table_passes_verification(applied: Applied, local_credentials: None) -> None:
    client = dynamodb_client(applied.endpoint, REGION)
    contract = load_contract(ROOT / REGISTRY)
    report = provision(client, contract, prefix="staging-", mode="verify")["viewer"]
    assert (report.name, report.status, report.created) == ("staging-viewer_profiles", "ACTIVE", False)
    assert (report.billing_mode, report.encryption) == ("PAY_PER_REQUEST", "KMS")
    assert (report.point_in_time_recovery, report.deletion_protection) == (True, True)
    tags = client.list_tags_of_resource(ResourceArn=report.arn)["Tags"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {
        "prefs:contract-version": str(contract.version),
        "prefs:environment": "staging",
        "prefs:managed-by": "terraform",
        "team": "engagement",
    }
    newer = replace(contract, version=contract.version + 1)
    with pytest.raises(TableError, match="a contract newer than the deployed table; terraform apply"):
        provision(client, newer, prefix="staging-", mode="verify")
    with pytest.raises(TableError, match="nowhere-viewer_profiles is missing"):
        provision(client, contract, prefix="nowhere-", mode="verify")


def test_lake_is_closed_versioned_and_encrypted(applied: Applied) -> None:
    s3, bucket = applied.client("s3"), applied.outputs["lake_bucket"]
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    assert all(s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values())
    encryption = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert encryption["ApplyServerSideEncryptionByDefault"] == {
        "SSEAlgorithm": "aws:kms",
        "KMSMasterKeyID": applied.outputs["encryption_key_arn"],
    }
    rules = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert {rule["ID"]: rule["Status"] for rule in rules} == {
        "old-versions": "Enabled",
        "unfinished-uploads": "Enabled",
    }
    assert all("Days" not in rule.get("Expiration", {}) for rule in rules), (
        "a rule deletes current objects by age"
    )
    key = applied.client("kms").get_key_rotation_status(KeyId=applied.outputs["encryption_key_arn"])
    assert key["KeyRotationEnabled"]


def test_lake_demands_modern_tls(applied: Applied) -> None:
    """The local server has no TLS, so the policy is not in force there: its document stands in the state."""
    state = json.loads((applied.terraform.folder / "terraform.tfstate").read_text())
    (document,) = [
        instance["attributes"]
        for resource in state["resources"]
        if (resource["mode"], resource["type"], resource["name"])
        == ("data", "aws_iam_policy_document", "lake")
        for instance in resource["instances"]
    ]
    policy = json.loads(document["json"])
    caller = ("AWS", f"arn:aws:iam::{ACCOUNT}:role/staging-prefs-exporter")
    for action, resource in (("s3:GetObject", f"{BUCKET}/warehouse/x"), ("s3:ListBucket", BUCKET)):
        answers = [
            decide(
                [policy], action, resource, {"aws:SecureTransport": secure, "s3:TlsVersion": version}, caller
            )
            for secure, version in (("false", "0"), ("true", "1.1"), ("true", "1.2"), ("true", "1.3"))
        ]
        assert answers == [EXPLICITLY_DENIED, EXPLICITLY_DENIED, NOT_ALLOWED, NOT_ALLOWED]


def test_training_tables_live_in_the_lake(applied: Applied, local_credentials: None) -> None:
    """The offline store, with the settings of the outputs, writes tiles to the lake and reads them back."""
    table = offline_table(applied)
    tiles = pa.Table.from_pylist([tile(viewer) for viewer in (1, 2, 3)], schema=arrow_schema(table))
    table.append(tiles)
    written = offline_table(applied).scan(row_filter=f"watch_date = '{DAY}' and viewer_id < 9")
    assert written.to_arrow().sort_by("viewer_id").to_pylist() == tiles.to_pylist()
    # The exporter's and the freshness reader's policies name these folders.
    assert table.location() == TILES.replace("arn:aws:s3:::", "s3://")
    assert table.metadata_location.startswith(table.location() + "/metadata/")


def offline_table(applied: Applied) -> Table:
    """The tile table of the applied lake, made where missing."""
    return ensure_table(lake_catalog(applied), applied.outputs["iceberg_namespace"], WATCH)


def lake_catalog(applied: Applied) -> Catalog:
    """The Glue catalog of the applied lake."""
    return open_catalog(
        "glue", applied.outputs["iceberg_warehouse"], region=REGION, endpoint_url=applied.endpoint
    )


def tile(viewer_id: int) -> dict[str, Any]:
    """One viewer's day with the same small count in every number of it."""
    plain = {"long": viewer_id, "int": viewer_id, "date": DAY}
    moment = datetime(DAY.year, DAY.month, DAY.day, tzinfo=UTC)
    return {
        field.name: plain.get(
            str(field.field_type), moment if "timestamp" in str(field.field_type) else Decimal(0)
        )
        for field in WATCH.schema.fields
    }


def test_alarms_and_dashboard(applied: Applied) -> None:
    cloudwatch = applied.client("cloudwatch")
    alarms = {alarm["AlarmName"]: alarm for alarm in cloudwatch.describe_alarms()["MetricAlarms"]}
    watched = {}
    for name, alarm in alarms.items():
        parts = [entry["MetricStat"]["Metric"] for entry in alarm.get("Metrics", []) if "MetricStat" in entry]
        watched[name] = {part["MetricName"] for part in parts} or {alarm["MetricName"]}
    assert watched == {
        "staging-prefs-read-throttles-viewer": {"ReadThrottleEvents"},
        "staging-prefs-write-throttles-viewer": {"WriteThrottleEvents"},
        "staging-prefs-system-errors-viewer": {"SystemErrors"},
        "staging-prefs-rejected-writes": {"UserErrors"},
        "staging-prefs-read-latency-getitem-viewer": {"SuccessfulRequestLatency"},
        "staging-prefs-read-latency-batchgetitem-viewer": {"SuccessfulRequestLatency"},
    }
    for alarm in alarms.values():
        assert alarm["AlarmActions"] == alarm["OKActions"] == [f"arn:aws:sns:{REGION}:{ACCOUNT}:prefs-alarms"]
    body = json.loads(cloudwatch.get_dashboard(DashboardName="staging-prefs")["DashboardBody"])
    shown = next(widget for widget in body["widgets"] if widget["type"] == "alarm")["properties"]["alarms"]
    assert (
        set(shown) == {alarm["AlarmArn"] for alarm in alarms.values()} == set(applied.outputs["alarm_arns"])
    )


def test_state_holds_no_secret(applied: Applied) -> None:
    state = (applied.terraform.folder / "terraform.tfstate").read_text()
    assert "staging-viewer_profiles" in state
    assert "the-secret-of-the-terraform-tests" not in state
    assert "AKIATERRAFORMTEST" not in state


# --- who may do what ----------------------------------------------------------------------------------

# Every request once: (action, resource, condition keys) and the actors that may make it. All others may not.
REQUESTS: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("dynamodb:DescribeTable", TABLE, {}, DESCRIBERS),
    ("dynamodb:DescribeContinuousBackups", TABLE, {}, DESCRIBERS),
    ("dynamodb:BatchWriteItem", TABLE, {"dynamodb:LeadingKeys": ["7"]}, {"sink-writer"}),
    ("dynamodb:PutItem", TABLE, {"dynamodb:LeadingKeys": ["7"]}, {"sink-writer"}),
    ("dynamodb:DeleteItem", TABLE, {"dynamodb:LeadingKeys": ["7"]}, {"sink-writer", "eraser"}),
    ("dynamodb:Query", TABLE, {"dynamodb:LeadingKeys": ["7"]}, {"eraser"}),
    ("dynamodb:GetItem", TABLE, {"dynamodb:LeadingKeys": ["7"]}, {"serving-reader"}),
    ("dynamodb:BatchGetItem", TABLE, {"dynamodb:LeadingKeys": ["7", "-8"]}, READERS),
    ("dynamodb:Scan", TABLE, KEYS_ONLY, {"freshness-reader"}),
    ("dynamodb:Scan", TABLE, KEYS_ONLY | {"dynamodb:Attributes": ["viewer_id", f"watch_minutes_{SHORT}d"]}, set()),
    ("dynamodb:Scan", TABLE, KEYS_ONLY | {"dynamodb:Select": "ALL_ATTRIBUTES"}, set()),
    ("dynamodb:Scan", TABLE, {"dynamodb:Attributes": ["viewer_id"]}, {"freshness-reader"}),
    ("dynamodb:Scan", TABLE, {"dynamodb:Select": "ALL_ATTRIBUTES"}, set()),
    ("dynamodb:Scan", TABLE, {}, set()),
    *[
        (f"dynamodb:{action}", TABLE, {"dynamodb:LeadingKeys": ["7"]}, set())
        for action in ("UpdateItem", "PartiQLSelect", "PartiQLUpdate")
    ],
    ("dynamodb:DescribeTimeToLive", TABLE, {}, DESCRIBERS),
    ("dynamodb:ListTagsOfResource", TABLE, {}, DESCRIBERS),
    *[
        (f"dynamodb:{action}", TABLE, {}, set())
        for action in ("CreateTable", "DeleteTable", "UpdateTable", "UpdateContinuousBackups",
                       "UpdateTimeToLive", "TagResource", "PutResourcePolicy", "ExportTableToPointInTime",
                       "RestoreTableToPointInTime")
    ],
    *[
        (f"dynamodb:{action}", OTHER_TABLE, {"dynamodb:LeadingKeys": ["-7"]}, set())
        for action in ("DescribeTable", "BatchWriteItem", "GetItem", "Scan", "DescribeContinuousBackups")
    ],
    ("dynamodb:Query", f"{TABLE}/index/by_domain", {"dynamodb:LeadingKeys": ["-7"]}, set()),
    ("s3:GetObject", f"{TILES}/metadata/1.metadata.json", {}, {"exporter", "freshness-reader"}),
    ("s3:GetObject", f"{TILES}/data/1.parquet", {}, {"exporter"}),
    ("s3:PutObject", f"{TILES}/data/1.parquet", {}, {"exporter"}),
    ("s3:PutObject", f"{TILES}/metadata/2.metadata.json", {}, {"exporter"}),
    ("s3:DeleteObject", f"{TILES}/data/1.parquet", {}, {"exporter"}),
    ("s3:AbortMultipartUpload", f"{TILES}/data/1.parquet", {}, {"exporter"}),
    ("s3:DeleteObjectVersion", f"{TILES}/data/1.parquet", {}, set()),
    ("s3:PutObjectAcl", f"{TILES}/data/1.parquet", {}, set()),
    ("s3:GetObject", f"{BUCKET}/elsewhere/metadata/1", {}, set()),
    ("s3:PutObject", f"{BUCKET}/warehouse2/1", {}, set()),
    ("s3:GetObject", f"{OTHER_BUCKET}/warehouse/staging_training.db/t/metadata/1", {}, set()),
    ("s3:PutObject", f"{OTHER_BUCKET}/warehouse/1", {}, set()),
    ("s3:ListBucket", BUCKET, {"s3:prefix": "warehouse/staging_training.db/"}, {"exporter"}),
    ("s3:ListBucket", BUCKET, {"s3:prefix": ""}, set()),
    ("s3:ListBucket", BUCKET, {}, set()),
    ("s3:ListBucket", OTHER_BUCKET, {"s3:prefix": "warehouse/"}, set()),
    ("s3:GetBucketLocation", BUCKET, {}, {"exporter"}),
    *[
        (f"s3:{action}", BUCKET, {}, set())
        for action in ("DeleteBucket", "PutBucketPolicy", "PutBucketVersioning", "PutLifecycleConfiguration",
                       "PutEncryptionConfiguration", "PutBucketPublicAccessBlock")
    ],
    *[
        (f"glue:{action}", f"{GLUE}:{resource}", {}, {"exporter", "freshness-reader"})
        for action in ("GetDatabase", "GetTable", "GetTables")
        for resource in ("catalog", "database/staging_training", "table/staging_training/tiles")
    ],
    ("glue:CreateTable", f"{GLUE}:table/staging_training/tiles", {}, {"exporter"}),
    ("glue:UpdateTable", f"{GLUE}:table/staging_training/tiles", {}, {"exporter"}),
    ("glue:DeleteTable", f"{GLUE}:table/staging_training/tiles", {}, set()),
    ("glue:DeleteDatabase", f"{GLUE}:database/staging_training", {}, set()),
    ("glue:CreateDatabase", f"{GLUE}:database/other", {}, set()),
    ("glue:GetDatabases", f"{GLUE}:catalog", {}, {"exporter", "freshness-reader"}),
    ("glue:GetDatabase", f"{GLUE}:database/prod_training", {}, set()),
    ("glue:GetTable", f"{GLUE}:table/prod_training/tiles", {}, set()),
    ("glue:UpdateTable", f"{GLUE}:table/prod_training/tiles", {}, set()),
    ("kms:Decrypt", KEY, VIA_DYNAMODB, {"sink-writer", "serving-reader", "freshness-reader", "eraser"}),
    ("kms:Decrypt", KEY, VIA_S3, {"exporter", "freshness-reader"}),
    ("kms:Decrypt", KEY, {"kms:ViaService": "s3.us-east-1.amazonaws.com"}, set()),
    ("kms:Decrypt", KEY, {}, set()),
    ("kms:Encrypt", KEY, VIA_DYNAMODB, {"sink-writer", "eraser"}),
    ("kms:GenerateDataKey", KEY, VIA_S3, {"exporter"}),
    ("kms:GenerateDataKey", KEY, VIA_DYNAMODB, {"sink-writer", "eraser"}),
    ("kms:GenerateDataKey", KEY, {}, set()),
    ("kms:Decrypt", f"arn:aws:kms:{REGION}:{ACCOUNT}:key/another", VIA_DYNAMODB, set()),
    *[
        (f"kms:{action}", KEY, VIA_DYNAMODB, set())
        for action in ("ScheduleKeyDeletion", "PutKeyPolicy", "DisableKey", "CreateGrant")
    ],
    ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/staging-prefs-exporter", {}, set()),
    ("sts:AssumeRole", f"arn:aws:iam::{ACCOUNT}:role/staging-prefs-exporter", {}, set()),
    ("cloudwatch:PutMetricData", "*", {}, set()),
    ("ec2:RunInstances", "*", {}, set()),
]  # fmt: skip


@pytest.fixture(scope="module")
def policies(applied: Applied) -> dict[str, list[dict[str, Any]]]:
    """Every policy document in force for each actor's role, as IAM has it."""
    iam = applied.client("iam")
    documents: dict[str, list[dict[str, Any]]] = {}
    for actor in ACTORS:
        role = applied.outputs["role_arns"][actor].rsplit("/", 1)[1]
        attached = iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
        assert [policy["PolicyArn"] for policy in attached] == [applied.outputs["policy_arns"][actor]]
        assert iam.list_role_policies(RoleName=role)["PolicyNames"] == []
        arn = attached[0]["PolicyArn"]
        version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
        documents[actor] = [
            iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
        ]
    return documents


@pytest.mark.parametrize("actor", ACTORS)
def test_actor_may_do_its_part_and_nothing_else(
    applied: Applied, policies: dict[str, list[dict[str, Any]]], actor: str
) -> None:
    key = applied.outputs["encryption_key_arn"]
    wrong = []
    for action, resource, context, allowed in REQUESTS:
        answer = decide(policies[actor], action, key if resource == KEY else resource, context)
        if answer != (ALLOWED if actor in allowed else NOT_ALLOWED):
            wrong.append(f"{action} on {resource} with {context} is {answer}")
    assert wrong == []


@pytest.mark.parametrize("actor", ACTORS)
def test_every_permission_is_named_and_asked_for(
    policies: dict[str, list[dict[str, Any]]], actor: str
) -> None:
    """No wildcard stands for an action, and the requests above cover what the policy grants."""
    statements = policies[actor][0]["Statement"]
    granted = {
        action
        for statement in (statements if isinstance(statements, list) else [statements])
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    assert not [action for action in granted if "*" in action or "?" in action]
    covered = {action for action, _, _, allowed in REQUESTS if actor in allowed}
    # Companions of what is covered, which their service asks for beside it.
    companions = {"kms:DescribeKey", "kms:ReEncryptFrom", "kms:ReEncryptTo", "s3:ListMultipartUploadParts"}
    assert granted - companions == covered


# What each actor does through the platform's own code, on what was applied.
PARTS: dict[str, Callable[[Applied], object]] = {
    "provisioner": lambda applied: verified(applied),
    "sink-writer": lambda applied: (verified(applied), write_an_item(applied)),
    "serving-reader": lambda applied: read_profiles(applied),
    "freshness-reader": lambda applied: (verified(applied), sample_items(applied), read_metadata(applied)),
    "eraser": lambda applied: (verified(applied), withdraw_items(applied)),
    "exporter": lambda applied: offline_table(applied).append(
        pa.Table.from_pylist([tile(9)], schema=arrow_schema(offline_table(applied)))
    ),
}


def verified(applied: Applied) -> dict[str, TableReport]:
    client = dynamodb_client(applied.endpoint, REGION)
    return provision(client, load_contract(ROOT / REGISTRY), prefix="staging-", mode="verify")


def write_an_item(applied: Applied) -> None:
    # Taken away again, because the platform must find no item that it did not publish.
    item = {"viewer_id": {"N": "-7"}, "domain_key": {"S": "engagement#watch"}}
    client = dynamodb_client(applied.endpoint, REGION)
    for write in ({"PutRequest": {"Item": item}}, {"DeleteRequest": {"Key": item}}):
        client.batch_write_item(RequestItems={applied.outputs["table_names"]["viewer"]: [write]})


def withdraw_items(applied: Applied) -> None:
    items = EntityItems(
        dynamodb_client(applied.endpoint, REGION), load_contract(ROOT / REGISTRY),
        "viewer", applied.outputs["table_names"]["viewer"], -8, datetime.now(UTC),
    )  # fmt: skip
    with_sinks = EngineConfiguration("127.0.0.1", 1, "dev", "root", kind="risingwave")
    assert items.withdraw(with_sinks, sink_seconds=0) == 1
    assert items.keys() == []


def read_profiles(applied: Applied) -> None:
    with profile_client(applied) as client:
        client.get(7, domains=["watch"])
        client.get(7)


def profile_client(applied: Applied) -> ProfileClient:
    """The recommendation service's client, patient, because the local AWS server takes its time."""
    return ProfileClient(
        ROOT / REGISTRY,
        endpoint_url=applied.endpoint, region=REGION, table_prefix="staging-",
        options=ClientOptions(30, connect_timeout_seconds=10, read_timeout_seconds=10),
    )  # fmt: skip


def sample_items(applied: Applied) -> None:
    client = dynamodb_client(applied.endpoint, REGION)
    table = load_contract(ROOT / REGISTRY).tables["viewer"]
    items = ItemAccess(client, table, applied.outputs["table_names"]["viewer"])
    items.get("engagement#watch", [7, 8])
    items.page("engagement#watch", 5, 7)
    list(items.pages("engagement#watch"))


def read_metadata(applied: Applied) -> list[Any]:
    return list(offline_table(applied).inspect.snapshots().to_pylist())


@pytest.mark.parametrize("actor", sorted(PARTS))
def test_actor_needs_nothing_that_its_policy_withholds(
    applied: Applied, policies: dict[str, list[dict[str, Any]]], local_credentials: None, actor: str
) -> None:
    """Every request that the platform's code sends for an actor, as the server saw it, is allowed to it."""
    offline_table(applied)
    if actor == "eraser":
        item = {"viewer_id": {"N": "-8"}, "domain_key": {"S": "of a former contract"}}
        applied.client("dynamodb").put_item(TableName=applied.outputs["table_names"]["viewer"], Item=item)
    with recorded_requests(applied.endpoint) as requests:
        PARTS[actor](applied)
    assert_allowed(policies[actor], requests)


def assert_allowed(documents: list[dict[str, Any]], requests: list[dict[str, Any]]) -> None:
    """Each of the requests, as the server saw them, is allowed by the policies."""
    asked = {
        (action, resource, json.dumps(context))
        for entry in requests
        for action, resource, context in permissions(entry)
    }
    assert asked
    refused = [
        (action, resource, context)
        for action, resource, context in sorted(asked)
        if decide(documents, action, resource, json.loads(context)) != ALLOWED
    ]
    assert refused == []


def permissions(entry: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The permissions that one recorded request needs: (action, resource, condition keys).

    Raises ValueError for a request whose permission is not known here.
    """
    headers = {name.lower(): value for name, value in entry["headers"].items()}
    body = base64.b64decode(entry["body"]) if entry["body_encoded"] else entry["body"]
    service, _, operation = headers.get("x-amz-target", "").partition(".")
    if service.startswith("DynamoDB"):
        yield from _dynamodb_permissions(operation, json.loads(body))
    elif service == "AWSGlue":
        yield from _glue_permissions(operation, json.loads(body))
    elif "/s3/" in headers.get("authorization", ""):
        yield from _s3_permissions(entry["method"], urlsplit(entry["url"]))
    else:
        raise ValueError(f"a request of an unknown service: {entry['method']} {entry['url']} {headers}")


def _dynamodb_permissions(
    operation: str, request: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if "ResourceArn" in request:
        yield f"dynamodb:{operation}", request["ResourceArn"], {}
        return
    tables = [request["TableName"]] if "TableName" in request else list(request["RequestItems"])
    context: dict[str, Any] = {}
    if operation == "Scan":
        context["dynamodb:Attributes"] = [
            request["ExpressionAttributeNames"].get(name.strip(), name.strip())
            for name in request["ProjectionExpression"].split(",")
        ]
    for table in tables:
        yield f"dynamodb:{operation}", f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{table}", context


def _glue_permissions(operation: str, request: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    database = request.get("DatabaseName") or (request.get("Name") if operation == "GetDatabase" else None)
    table = request.get("TableInput", request).get("Name") if "DatabaseName" in request else None
    resources = ["catalog"]
    if operation == "GetDatabases":
        resources.append("database/any_other")
    if database:
        resources.append(f"database/{database}")
    if table:
        resources.append(f"table/{database}/{table}")
    for resource in resources:
        yield f"glue:{operation}", f"{GLUE}:{resource}", {}


def _s3_permissions(method: str, url: SplitResult) -> Iterator[tuple[str, str, dict[str, Any]]]:
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    objects = {
        "GET": "GetObject",
        "HEAD": "GetObject",
        "PUT": "PutObject",
        "POST": "PutObject",
        "DELETE": "DeleteObject",
    }
    if key:
        action = "AbortMultipartUpload" if method == "DELETE" and "uploadId" in query else objects[method]
        yield f"s3:{action}", f"arn:aws:s3:::{bucket}/{key}", {}
    elif method == "GET" and "list-type" in query:
        yield "s3:ListBucket", f"arn:aws:s3:::{bucket}", {"s3:prefix": query.get("prefix", "")}
    else:
        raise ValueError(f"a request to a bucket that is not covered: {method} {url.geturl()}")


WEB, ROLE = "sts:AssumeRoleWithWebIdentity", "sts:AssumeRole"
PROVIDER = ("Federated", f"arn:aws:iam::{ACCOUNT}:oidc-provider/oidc.example.com/id/ABC123")
EC2 = ("Service", "ec2.amazonaws.com")
DAGSTER = ("AWS", f"arn:aws:iam::{ACCOUNT}:role/dagster")
NEIGHBOUR = ("AWS", f"arn:aws:iam::{ACCOUNT}:role/neighbour")
PARTNER = ("AWS", "arn:aws:iam::210987654321:role/api")
STRANGER = ("AWS", "arn:aws:iam::999999999999:role/api")


def pod(account: str, audience: str = "sts.amazonaws.com") -> dict[str, str]:
    """The condition keys of a Kubernetes service account's token."""
    return {
        "oidc.example.com/id/ABC123:sub": f"system:serviceaccount:{account}",
        "oidc.example.com/id/ABC123:aud": audience,
    }


CALLS: list[tuple[str, tuple[str, str], dict[str, str], set[str]]] = [
    (WEB, PROVIDER, pod("risingwave:compute"), {"sink-writer"}),
    (WEB, PROVIDER, pod("prefs:freshness"), {"freshness-reader"}),
    (WEB, PROVIDER, pod("default:compute"), set()),
    (WEB, PROVIDER, pod("risingwave:compute", audience="elsewhere"), set()),
    (WEB, PROVIDER, {}, set()),
    (WEB, ("Federated", PROVIDER[1].replace("ABC123", "OTHER")), pod("risingwave:compute"), set()),
    (ROLE, EC2, {}, {"exporter"}),
    (ROLE, ("Service", "lambda.amazonaws.com"), {}, set()),
    (ROLE, DAGSTER, {}, {"freshness-reader", "provisioner", "eraser"}),
    (ROLE, NEIGHBOUR, {}, {"provisioner", "eraser"}),
    (ROLE, PARTNER, {"sts:ExternalId": "ranking"}, {"serving-reader"}),
    (ROLE, PARTNER, {"sts:ExternalId": "guess"}, set()),
    (ROLE, PARTNER, {}, set()),
    (ROLE, STRANGER, {"sts:ExternalId": "ranking"}, set()),
]


@pytest.mark.parametrize("actor", ACTORS)
def test_role_is_taken_only_by_whom_it_trusts(applied: Applied, actor: str) -> None:
    role = applied.client("iam").get_role(RoleName=f"staging-prefs-{actor}")["Role"]
    trust = role["AssumeRolePolicyDocument"]
    for action, caller, context, allowed in CALLS:
        answer = decide([trust], action, None, context, caller)
        assert answer == (ALLOWED if actor in allowed else NOT_ALLOWED), (action, caller, context)


def test_only_what_runs_on_instances_has_a_profile(applied: Applied) -> None:
    assert applied.outputs["instance_profiles"] == {"exporter": "staging-prefs-exporter"}
    profile = applied.client("iam").get_instance_profile(InstanceProfileName="staging-prefs-exporter")
    assert [role["RoleName"] for role in profile["InstanceProfile"]["Roles"]] == ["staging-prefs-exporter"]


def test_a_deployment_from_before_tables_had_entities_keeps_its_table(applied: Applied) -> None:
    terraform, address = applied.terraform, 'aws_dynamodb_table.profiles["viewer"]'
    former = terraform.folder / "former.tfstate"
    shutil.copyfile(terraform.folder / "terraform.tfstate", former)
    terraform.run("state", "mv", f"-state={former}", address, "aws_dynamodb_table.profiles")
    planned = terraform.run("plan", "-json", "-refresh=false", f"-state={former}", *applied.variables).stdout
    changes = [
        event["change"]
        for event in map(json.loads, planned.splitlines())
        if event["type"] == "planned_change"
    ]
    # A move alone: with any other change of the table its action would be that.
    assert [
        (change["action"], change["previous_resource"]["addr"])
        for change in changes
        if change["resource"]["addr"] == address
    ] == [("move", "aws_dynamodb_table.profiles")]
    assert not {"delete", "replace"} & {change["action"] for change in changes}


# --- several environments, and the way out ------------------------------------------------------------


def test_environments_stand_side_by_side_and_do_not_fall_while_protected(applied: Applied) -> None:
    """A second environment's stores resist `destroy`; the fixture ends an unprotected one."""
    terraform, dynamodb, s3 = applied.terraform, applied.client("dynamodb"), applied.client("s3")
    table, bucket = "canary-viewer_profiles", f"canary-prefs-lake-{ACCOUNT}-{REGION}"
    arguments = [
        "-no-color", "-auto-approve", "-refresh=false", "-state=canary.tfstate", *applied.variables,
        "-var=environment=canary", "-var=encryption_key=aws",
        "-target=aws_dynamodb_table.profiles", "-target=aws_s3_bucket.lake",
    ]  # fmt: skip
    terraform.run("apply", *arguments)
    dynamodb.put_item(
        TableName=table, Item={"viewer_id": {"N": "1"}, "domain_key": {"S": "engagement#watch"}}
    )
    s3.put_object(Bucket=bucket, Key="warehouse/x", Body=b"x")

    refused = terraform.run("destroy", *arguments, check=False)
    assert refused.returncode != 0
    assert "DeletionProtectionEnabled" in refused.stderr
    assert "BucketNotEmpty" in refused.stderr
    assert dynamodb.scan(TableName=table)["Count"] == 1
    assert s3.get_object(Bucket=bucket, Key="warehouse/x")["Body"].read() == b"x"
    assert dynamodb.describe_table(TableName="staging-viewer_profiles")["Table"]["TableStatus"] == "ACTIVE"
    s3.head_bucket(Bucket=applied.outputs["lake_bucket"])
