"""Authentication of our Kafka clients: TLS, SASL and MSK's IAM."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import botocore.session
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, ClientError

from dagster_prefs.environment import CONSUMER_GROUP
from dagster_prefs.events.schema_registry import RegistryAddress

TOKEN_SECONDS = 900


@dataclass(frozen=True)
class KafkaSecurity:
    """How to authenticate to the brokers. `tls` holds librdkafka's `ssl.…` properties and is left out of the repr."""

    protocol: str
    mechanism: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    msk_region: str = ""
    msk_role_arn: str | None = None


@dataclass(frozen=True)
class KafkaSource:
    """The source of events: brokers, the topics' names in Kafka, the start of a new consumer, its properties and group.

    `bootstrap` is None without Kafka. `client` holds secrets and is left out of the repr. `schemas` is the address of
    the schema registry, None if there is none.
    """

    bootstrap: str | None = None
    topics: Mapping[str, str] = field(default_factory=dict)
    start: Literal["earliest", "latest"] = "earliest"
    client: Mapping[str, Any] | None = field(default=None, repr=False)
    group: str = CONSUMER_GROUP
    schemas: RegistryAddress | None = None


def client_properties(security: KafkaSecurity) -> dict[str, Any]:
    """Return the librdkafka properties that authenticate a client, without the addresses; empty for plain text.

    The values hold secrets: pass them to a client only, never to a log or an error.
    """
    if security.protocol == "PLAINTEXT":
        return {}
    if security.mechanism == "AWS_MSK_IAM":
        return {
            "security.protocol": security.protocol,
            "sasl.mechanism": "OAUTHBEARER",
            "oauth_cb": msk_token(security.msk_region, security.msk_role_arn),
        }
    values = {
        "security.protocol": security.protocol,
        "sasl.mechanism": security.mechanism,
        "sasl.username": security.username,
        "sasl.password": security.password,
        **security.tls,
    }
    return {name: value for name, value in values.items() if value}


def msk_token(region: str, role_arn: str | None = None) -> Callable[[str], tuple[str, float]]:
    """Return a callback for librdkafka that signs in to MSK: it returns a token and its expiry (epoch seconds).

    The token is a presigned `kafka-cluster:Connect` with botocore's credentials, or with those of the assumed
    `role_arn`. The callback raises KafkaException if AWS gives no credentials, which fails the connection.
    """

    # Here, because `prefs status` and others only look whether brokers are configured.
    from confluent_kafka import KafkaException

    def sign(_: str) -> tuple[str, float]:
        try:
            credentials = _credentials(region, role_arn)
            if credentials is None:
                raise KafkaException(
                    "no AWS credentials for MSK: set AWS_PROFILE, AWS_ACCESS_KEY_ID or a role"
                )
            request = AWSRequest(
                "GET", f"https://kafka.{region}.amazonaws.com/", params={"Action": "kafka-cluster:Connect"}
            )
            SigV4QueryAuth(credentials, "kafka-cluster", region, expires=TOKEN_SECONDS).add_auth(request)
        except (BotoCoreError, ClientError) as error:
            raise KafkaException(f"no AWS credentials for MSK: {error}") from error
        # The broker expects the signed URL in base64 without padding, with the name of the caller.
        url = f"{request.url}&User-Agent=dagster-prefs"
        token = base64.urlsafe_b64encode(url.encode()).rstrip(b"=").decode()
        lifetime = int(parse_qs(urlsplit(url).query)["X-Amz-Expires"][0])
        return token, time.time() + lifetime

    return sign


def _credentials(region: str, role_arn: str | None) -> Any:
    session = botocore.session.get_session()
    if role_arn is None:
        found = session.get_credentials()
        return found and found.get_frozen_credentials()
    sts: Any = session.create_client("sts", region_name=region)
    given = sts.assume_role(RoleArn=role_arn, RoleSessionName="dagster-prefs")["Credentials"]
    return ReadOnlyCredentials(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"])
