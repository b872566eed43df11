"""How our own Kafka clients are let in: TLS, SASL and MSK's IAM, as the settings say."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import botocore.session
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, ClientError
from confluent_kafka import KafkaException

from dagster_prefs.settings import Settings

TOKEN_SECONDS = 900


def client_properties(settings: Settings) -> dict[str, Any]:
    """The librdkafka properties that these settings ask for, beside the addresses; empty for plain text.

    The values hold secrets: they are for a client only, never for a log or an error.
    """
    given: dict[str, Any] = {}
    protocol, mechanism = settings.kafka_security_protocol, settings.kafka_sasl_mechanism
    if protocol == "PLAINTEXT":
        return given
    given["security.protocol"] = protocol
    if mechanism == "AWS_MSK_IAM":
        given["sasl.mechanism"] = "OAUTHBEARER"
        given["oauth_cb"] = msk_token(
            settings.kafka_msk_region or settings.aws_region, settings.kafka_msk_role_arn
        )
        return given
    password = settings.kafka_sasl_password
    key, passphrase = settings.kafka_ssl_key_pem, settings.kafka_ssl_key_password
    values = {
        "sasl.mechanism": mechanism,
        "sasl.username": settings.kafka_sasl_username,
        "sasl.password": password and password.get_secret_value(),
        "ssl.ca.location": settings.kafka_ssl_ca_location,
        "ssl.ca.pem": settings.kafka_ssl_ca_pem,
        "ssl.certificate.location": settings.kafka_ssl_certificate_location,
        "ssl.certificate.pem": settings.kafka_ssl_certificate_pem,
        "ssl.key.location": settings.kafka_ssl_key_location,
        "ssl.key.pem": key and key.get_secret_value(),
        "ssl.key.password": passphrase and passphrase.get_secret_value(),
    }
    return given | {name: value for name, value in values.items() if value}


def msk_token(region: str, role_arn: str | None = None) -> Callable[[str], tuple[str, float]]:
    """A callback for librdkafka that signs in to MSK: it returns a token and when it expires (epoch seconds).

    The token is a presigned `kafka-cluster:Connect` of botocore's credentials, or of `role_arn` assumed with them.
    The callback raises KafkaException where AWS gives no credentials, which fails the connection.
    """

    def sign(_: str) -> tuple[str, float]:
        try:
            credentials = _credentials(region, role_arn)
            request = AWSRequest(
                "GET", f"https://kafka.{region}.amazonaws.com/", params={"Action": "kafka-cluster:Connect"}
            )
            SigV4QueryAuth(credentials, "kafka-cluster", region, expires=TOKEN_SECONDS).add_auth(request)
        except (BotoCoreError, ClientError) as error:
            raise KafkaException(f"no AWS credentials for MSK: {error}") from error
        # What the broker reads is the signed URL, with the caller named and without padding.
        url = f"{request.url}&User-Agent=dagster-prefs"
        token = base64.urlsafe_b64encode(url.encode()).rstrip(b"=").decode()
        lifetime = int(parse_qs(urlsplit(url).query)["X-Amz-Expires"][0])
        return token, time.time() + lifetime

    return sign


def _credentials(region: str, role_arn: str | None) -> Any:
    session = botocore.session.get_session()
    if role_arn is None:
        found = session.get_credentials()
        if found is None:
            raise KafkaException("no AWS credentials for MSK: set AWS_PROFILE, AWS_ACCESS_KEY_ID or a role")
        return found.get_frozen_credentials()
    sts: Any = session.create_client("sts", region_name=region)
    given = sts.assume_role(RoleArn=role_arn, RoleSessionName="dagster-prefs")["Credentials"]
    return ReadOnlyCredentials(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"])
