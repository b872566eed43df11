"""The DynamoDB tables of the contract, one per entity: created or checked, never altered, never deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

from dagster_prefs.addresses import is_loopback
from dagster_prefs.declarations.contract import Contract, Table
from dagster_prefs.environment import ENVIRONMENT_TAG
from dagster_prefs.errors import PrefsError
from dagster_prefs.pauses import Pauses

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# Written when the table is created, by `create` here or by the Terraform module. Never lowered, because code of an
# older contract may run on a table of a newer one, but not the reverse.
CONTRACT_VERSION_TAG = "prefs:contract-version"


class TableError(PrefsError):
    """A DynamoDB table is missing or unreachable, or differs from the contract."""


@dataclass(frozen=True)
class TableReport:
    """The table of one entity, ACTIVE and as the contract declares it.

    A recreated table has another `table_id`, which tells an emptied table from the one that was published to.
    """

    entity: str
    name: str
    table_id: str
    arn: str
    status: str
    created: bool
    billing_mode: str
    point_in_time_recovery: bool | None
    encryption: str
    deletion_protection: bool


def dynamodb_client(
    endpoint_url: str | None = None, region: str | None = None, *, pool_size: int = 32
) -> DynamoDBClient:
    """Return a DynamoDB client with bounded time-outs (2 s to connect, 10 s to read) and standard retries.

    Credentials come from botocore's chain. Without any, and with an endpoint on this machine, fixed local
    ones are used, because a local server accepts any.
    """
    import botocore.session
    from botocore.config import Config

    session = botocore.session.get_session()
    session.register_component("data_loader", _model_loader(session.get_config_variable("data_path")))
    if session.get_credentials() is None and is_loopback(endpoint_url):
        session.set_credentials("local", "local")
    client: Any = session.create_client(
        "dynamodb",
        region_name=region,
        endpoint_url=endpoint_url,
        config=Config(
            connect_timeout=2,
            read_timeout=10,
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=pool_size,
            tcp_keepalive=True,
            # It takes as long as the rest of a write. Items come from `ItemEncoder`, and DynamoDB validates them too.
            parameter_validation=False,
        ),
    )
    client.meta.events.register("provide-client-params.dynamodb.BatchWriteItem", _encode_requests)
    client.meta.events.register("before-call.dynamodb.BatchWriteItem", _send_encoded)
    return cast("DynamoDBClient", client)


# botocore visits each element of each list of an item, for values that are the API's JSON already: most of the time of
# a write.


def _encode_requests(params: dict[str, Any], context: dict[str, Any], **_: Any) -> dict[str, Any]:
    context["prefs_body"] = json.dumps(params).encode()
    return {**params, "RequestItems": {table: [] for table in params["RequestItems"]}}


def _send_encoded(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    params["body"] = context.pop("prefs_body")


@cache
def _model_loader(data_path: str | None) -> Any:
    """Return the loader of botocore's description of DynamoDB; a loader per client would cost 0.2 s each."""
    import botocore.loaders

    return botocore.loaders.create_loader(data_path)


def provision(
    client: DynamoDBClient,
    contract: Contract,
    *,
    prefix: str = "",
    mode: Literal["create", "verify"] = "create",
    environment: str | None = None,
    timeout_seconds: float = 60.0,
) -> dict[str, TableReport]:
    """Ensure that each table of the contract exists, is ACTIVE and has the contract's keys; return them by entity.

    `create` creates a missing table (on demand, encrypted with DynamoDB's own key) and raises the table's
    contract version tag to the contract's. `verify` never creates or tags anything, and also requires that
    tag, point-in-time recovery and deletion protection, as the Terraform module sets them. An existing table
    is never altered except for the tag, and never deleted. With an `environment`, a created table has its name
    as another tag, and a table of another environment is refused. Idempotent, also when it runs twice at the same
    time.

    Raises TableError with the remedy for every difference (including a contract that is newer than the
    table's tag), a missing table (`verify`), a table that is not ACTIVE within `timeout_seconds`, or a
    refused request, naming the missing permission.
    """
    return {
        entity: _provision(
            client,
            entity,
            contract,
            prefix + table.name,
            mode=mode,
            environment=environment,
            timeout_seconds=timeout_seconds,
        )
        for entity, table in contract.tables.items()
    }


def _provision(
    client: DynamoDBClient,
    entity: str,
    contract: Contract,
    name: str,
    *,
    mode: Literal["create", "verify"],
    environment: str | None,
    timeout_seconds: float,
) -> TableReport:
    from botocore.exceptions import BotoCoreError, ClientError

    table = contract.tables[entity]
    try:
        created = False
        description = _describe(client, name)
        if description is None:
            if mode == "verify":
                raise TableError(
                    f"table {name} is missing: apply the Terraform module, or set PREFS_PROVISIONING=create"
                )
            tags = {CONTRACT_VERSION_TAG: str(contract.version)}
            created = _create(
                client, table, name, tags | ({ENVIRONMENT_TAG: environment} if environment else {})
            )
        description = _wait_until_active(client, name, timeout_seconds)
        if created and table.ttl_attribute:
            client.update_time_to_live(
                TableName=name,
                TimeToLiveSpecification={"Enabled": True, "AttributeName": table.ttl_attribute},
            )
        ttl = _ttl_difference(client, name, table.ttl_attribute)
        recovery = _point_in_time_recovery(client, name)
        differences = _key_differences(description, table)
        if environment is not None and not created:
            differences += _environment_differences(client, description, environment)
        if mode == "verify":
            differences += _version_differences(client, description, contract.version)
        elif not created and not differences:
            _raise_version(client, description, contract.version)
    except ClientError as error:
        raise TableError(refusal(name, error)) from None
    except BotoCoreError as error:
        raise TableError(
            f"table {name} cannot be reached: {error}: check endpoint, region and credentials"
        ) from None
    if ttl:
        differences.append(ttl)
    protected = bool(description.get("DeletionProtectionEnabled", False))
    encryption = str(description.get("SSEDescription", {}).get("SSEType", "AWS_OWNED"))
    if mode == "verify":
        if recovery is None:
            differences.append(
                "point-in-time recovery cannot be read; allow dynamodb:DescribeContinuousBackups"
            )
        elif not recovery:
            differences.append("point-in-time recovery is off; turn it on (terraform apply does)")
        if not protected:
            differences.append("deletion protection is off; turn it on (terraform apply does)")
        sse = description.get("SSEDescription", {}).get("Status")
        if sse not in ("ENABLED", "UPDATING"):
            differences.append("encryption with a KMS key is off; turn it on (terraform apply does)")
    if differences:
        raise TableError(f"table {name} is not as the contract says: " + "; ".join(differences))
    return TableReport(
        entity=entity,
        name=name,
        # Some servers give no TableId; the creation time tells a re-made table just as well.
        table_id=str(description.get("TableId") or description["CreationDateTime"]),
        arn=str(description["TableArn"]),
        status=str(description["TableStatus"]),
        created=created,
        billing_mode=str(description.get("BillingModeSummary", {}).get("BillingMode", "PROVISIONED")),
        point_in_time_recovery=recovery,
        encryption=encryption,
        deletion_protection=protected,
    )


def _describe(client: DynamoDBClient, name: str) -> Any | None:
    try:
        return client.describe_table(TableName=name)["Table"]
    except client.exceptions.ResourceNotFoundException:
        return None


def _create(client: DynamoDBClient, table: Table, name: str, tags: Mapping[str, str]) -> bool:
    try:
        client.create_table(
            TableName=name,
            KeySchema=[
                {"AttributeName": table.partition_key.name, "KeyType": "HASH"},
                {"AttributeName": table.sort_key.name, "KeyType": "RANGE"},
            ],
            AttributeDefinitions=[
                {"AttributeName": key.name, "AttributeType": key.type}
                for key in (table.partition_key, table.sort_key)
            ],
            BillingMode="PAY_PER_REQUEST",
            Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
        )
    except client.exceptions.ResourceInUseException:
        # Another process made it between our look and our request.
        return False
    return True


def _wait_until_active(client: DynamoDBClient, name: str, timeout_seconds: float) -> Any:
    deadline = time.monotonic() + timeout_seconds
    pauses = Pauses(0.05, 2.0)
    while True:
        description = _describe(client, name)
        status = "missing" if description is None else str(description["TableStatus"])
        if description is not None and status in ("ACTIVE", "UPDATING"):
            return description
        if time.monotonic() >= deadline:
            raise TableError(
                f"table {name} is {status} and did not become ACTIVE within {timeout_seconds:g} s: "
                "look at it in the AWS console and run again"
            )
        time.sleep(pauses.next())


def _ttl_difference(client: DynamoDBClient, name: str, wanted: str | None) -> str | None:
    from botocore.exceptions import ClientError

    try:
        ttl = client.describe_time_to_live(TableName=name)["TimeToLiveDescription"]
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "AccessDeniedException":
            raise
        # A role that only publishes need not see it, as long as the contract does not ask for one.
        return "time to live cannot be read; allow dynamodb:DescribeTimeToLive" if wanted else None
    enabled = ttl.get("TimeToLiveStatus") in ("ENABLED", "ENABLING")
    found = ttl.get("AttributeName") if enabled else None
    if found == wanted:
        return None
    return (
        f"its time to live is on {found or 'no attribute'} and should be on {wanted or 'none'}; "
        "set it with UpdateTimeToLive (terraform apply does)"
    )


def _point_in_time_recovery(client: DynamoDBClient, name: str) -> bool | None:
    from botocore.exceptions import ClientError

    try:
        answer = client.describe_continuous_backups(TableName=name)
    except ClientError as error:
        # DynamoDB Local has no such operation, and making a table does not need the permission to ask.
        if error.response.get("Error", {}).get("Code") in (
            "UnknownOperationException",
            "NotImplemented",
            "AccessDeniedException",
        ):
            return None
        raise
    recovery = answer["ContinuousBackupsDescription"].get("PointInTimeRecoveryDescription", {})
    return recovery.get("PointInTimeRecoveryStatus") == "ENABLED"


def _deployed_version(client: DynamoDBClient, description: Any) -> str | None:
    """Return the value of the table's contract version tag; None without one."""
    return _tags(client, description["TableArn"]).get(CONTRACT_VERSION_TAG)


def _tags(client: DynamoDBClient, arn: str) -> dict[str, str]:
    # The local AWS server keeps a tag's former values before its present one.
    found: dict[str, str] = {}
    token: dict[str, Any] = {}
    while True:
        answer = client.list_tags_of_resource(ResourceArn=arn, **token)
        found |= {tag["Key"]: tag["Value"] for tag in answer.get("Tags", [])}
        if not answer.get("NextToken"):
            return found
        token = {"NextToken": answer["NextToken"]}


def table_environment(client: DynamoDBClient, arn: str) -> str | None:
    """Return the name of the environment that a table's tag names; None without a tag, or where none can be read."""
    from botocore.exceptions import ClientError

    try:
        tag = _tags(client, arn).get(ENVIRONMENT_TAG)
    except ClientError as error:
        # DynamoDB Local has no tags.
        if error.response.get("Error", {}).get("Code") not in (
            "UnknownOperationException",
            "NotImplemented",
            "AccessDeniedException",
        ):
            raise
        return None
    # Terraform writes hyphens, which a name of ours does not have.
    return None if tag is None else tag.replace("-", "_")


def _environment_differences(client: DynamoDBClient, description: Any, environment: str) -> list[str]:
    found = table_environment(client, description["TableArn"])
    if found in (None, environment):
        return []
    return [f"it belongs to environment {found}, not to {environment}; choose another PREFS_ENVIRONMENT"]


def _version_differences(client: DynamoDBClient, description: Any, version: int) -> list[str]:
    from botocore.exceptions import ClientError

    try:
        deployed = _deployed_version(client, description)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "AccessDeniedException":
            raise
        return ["its contract version cannot be read; allow dynamodb:ListTagsOfResource"]
    if deployed is None or not deployed.isdecimal():
        shown = "no" if deployed is None else f"the malformed value {deployed!r} of the"
        return [f"it has {shown} tag {CONTRACT_VERSION_TAG}; set it (terraform apply does)"]
    if version > int(deployed):
        return [
            f"it was deployed for version {deployed} of the contract and this code has version {version}, a "
            "contract newer than the deployed table; terraform apply with this version's module first"
        ]
    return []


def _raise_version(client: DynamoDBClient, description: Any, version: int) -> None:
    from botocore.exceptions import ClientError

    try:
        deployed = _deployed_version(client, description)
        if deployed is None or not deployed.isdecimal() or int(deployed) < version:
            client.tag_resource(
                ResourceArn=description["TableArn"],
                Tags=[{"Key": CONTRACT_VERSION_TAG, "Value": str(version)}],
            )
    except ClientError as error:
        # DynamoDB Local has no tags at all; there `create` owns the table, and only `verify` reads them.
        if error.response.get("Error", {}).get("Code") not in ("UnknownOperationException", "NotImplemented"):
            raise


def _key_differences(description: Any, table: Table) -> list[str]:
    types = {entry["AttributeName"]: entry["AttributeType"] for entry in description["AttributeDefinitions"]}
    found = {entry["KeyType"]: entry["AttributeName"] for entry in description["KeySchema"]}
    differences = []
    for kind, label, key in (
        ("HASH", "partition key", table.partition_key),
        ("RANGE", "sort key", table.sort_key),
    ):
        name = found.get(kind)
        shown = f"{name} ({types[name]})" if name else "none"
        if (name, types.get(name)) != (key.name, key.type):
            differences.append(
                f"its {label} is {shown} and should be {key.name} ({key.type}); keys cannot be altered: "
                "use another PREFS_TABLE_PREFIX, or delete the table yourself"
            )
    return differences


def refusal(name: str, error: Any) -> str:
    """Translate an error of a request about a table: the reason and the remedy."""
    code = error.response.get("Error", {}).get("Code", "unknown")
    message = error.response.get("Error", {}).get("Message", "")
    if code == "AccessDeniedException":
        return f"DynamoDB refused access to table {name}: allow dynamodb:{error.operation_name} on it ({message})"
    if code in ("UnrecognizedClientException", "ExpiredTokenException", "InvalidSignatureException"):
        return (
            f"DynamoDB does not accept the AWS credentials for table {name} ({code}): renew or correct them"
        )
    return f"DynamoDB refused a request about table {name} ({code}): {message}"
