"""Kafka clients that report why the brokers reject them.

librdkafka retries forever and reports failures only to its callbacks; the caller of an operation only gets a
time-out. A `Contact` collects the reasons, ends a hopeless wait, and names the setting to correct.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException

from dagster_prefs.errors import PrefsError
from dagster_prefs.pauses import Pauses

# With the work around it, the first contact ends within ten seconds.
BROKER_TIMEOUT_SECONDS = 8.0
FIRST_TRY_SECONDS = 0.5
PAUSE_SECONDS = 0.1
# A listener of another protocol closes the connection this many times within two seconds.
CLOSED_TIMES = 5

Result = TypeVar("Result")

# Errors that no retry resolves, the most informative first.
_REFUSED = (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL)
# The name server may only be restarting, so this ends a first contact, but not a running read.
_UNKNOWN_HOST = (KafkaError._RESOLVE,)
# Errors that may disappear within seconds.
_WAITS = (
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._RESOLVE,
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.REQUEST_TIMED_OUT,
)
_BROKERS = "PREFS_KAFKA_BOOTSTRAP, PREFS_KAFKA_SECURITY_PROTOCOL and that the brokers run"
_PROPERTY = re.compile(r"\b(?:ssl|sasl)(?:\.[a-z]+)+\b")


class KafkaUnavailable(PrefsError):
    """The brokers cannot be reached, or a topic is missing or was recreated."""


class Contact:
    """A Kafka client that knows what librdkafka reports about its brokers, and ends hopeless waits early.

    `make` is Consumer, Producer or AdminClient; `client` adds librdkafka properties (see
    `client_properties`), over which the client's own `properties` take precedence. Raises KafkaUnavailable if
    librdkafka does not accept the properties.
    """

    def __init__(
        self,
        make: Callable[[dict[str, Any]], Any],
        bootstrap: str,
        client: Mapping[str, Any] | None,
        *,
        timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        self._bootstrap = bootstrap
        self._user = (client or {}).get("sasl.username")
        sign = (client or {}).get("oauth_cb")
        self._signs_in_to_aws = sign is not None
        self._timeout = timeout_seconds
        self._reports = _Reports()
        # Not registered with the logging module, because its records go into this class's messages.
        logger = logging.Logger("librdkafka")
        logger.addHandler(self._reports)
        tokens = {"oauth_cb": _first_at_once(sign)} if sign else {}
        try:
            self.client = make(
                {
                    **(client or {}),
                    **tokens,
                    "bootstrap.servers": bootstrap,
                    "error_cb": self._reports.error,
                    "logger": logger,
                    **(properties or {}),
                }
            )
        except KafkaException as error:
            text = str(error.args[0].str())
            settings = sorted({_setting(name) for name in _PROPERTY.findall(text)})
            raise KafkaUnavailable(
                f"the Kafka client does not accept these settings ({text}): correct "
                f"{', '.join(settings) or 'the PREFS_KAFKA_… settings'}"
            ) from None

    def wait(self, call: Callable[[float], Result], what: str = "does not answer") -> Result:
        """Call `call` with a number of seconds to wait, repeatedly until the time-out, and return its result.

        Raises KafkaUnavailable with Kafka's own reason, as soon as the brokers permanently reject this
        client. `what` is the predicate of its message.
        """
        deadline = time.monotonic() + self._timeout
        # A client only runs its callbacks between two operations, so the first ones are short.
        patience = Pauses(FIRST_TRY_SECONDS)
        while True:
            try:
                answer = call(max(PAUSE_SECONDS, min(patience.next(), deadline - time.monotonic())))
            except KafkaException as error:
                failed = error.args[0]
            else:
                self.heard()
                return answer
            if failed.code() not in _WAITS:
                raise self.unavailable(what, failed) from None
            self.client.poll(PAUSE_SECONDS)
            self.check(what, first=True)
            if time.monotonic() >= deadline:
                raise self.unavailable(what, failed)

    def heard(self) -> None:
        """Discard the failures from before the brokers answered."""
        self._reports.clear()

    def check(self, what: str = "does not answer", *, first: bool = False) -> None:
        """Raise KafkaUnavailable if every broker is out of reach and one of them rejected this client.

        At the `first` contact an unknown host name counts as a rejection, and so does a listener that closes
        every connection, because it speaks another protocol.
        """
        final = (*_REFUSED, *_UNKNOWN_HOST) if first else _REFUSED
        refused = any(code in self._reports.errors for code in final)
        if self._reports.all_down and (refused or (first and self._reports.closed >= CLOSED_TIMES)):
            raise self.unavailable(what)

    def unavailable(self, what: str, error: Any = None, topic: str | None = None) -> KafkaUnavailable:
        """Return the error that says what the brokers fail to do, why, and the remedy.

        `what` is its predicate. `error` is the KafkaError that ended an operation; if it is only a time-out,
        the reason is what librdkafka reported in the meantime.
        """
        code = error.code() if error is not None else KafkaError._TIMED_OUT
        text = error.str() if error is not None else ""
        if code in (*_WAITS, KafkaError._MSG_TIMED_OUT, KafkaError._FATAL):
            errors = self._reports.errors
            for reported in (*_REFUSED, *_UNKNOWN_HOST, *errors):
                if reported in errors:
                    code, text = reported, errors[reported]
                    break
            else:
                text = self._reports.logged or text
        reason = text or f"no answer within {self._timeout:g} s"
        return KafkaUnavailable(
            f"Kafka at {self._bootstrap} {what} ({reason}): {self._remedy(code, text, topic)}"
        )

    def _remedy(self, code: int, text: str, topic: str | None) -> str:
        who = f"user {self._user}" if self._user else "this client's identity"
        if code in (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):
            if self._signs_in_to_aws:
                return "check the AWS credentials, PREFS_KAFKA_MSK_REGION and PREFS_KAFKA_MSK_ROLE_ARN"
            return (
                "check PREFS_KAFKA_SASL_USERNAME, PREFS_KAFKA_SASL_PASSWORD, PREFS_KAFKA_SASL_MECHANISM and "
                "PREFS_KAFKA_SECURITY_PROTOCOL"
            )
        if "alert" in text:
            return (
                "the brokers reject this client's certificate, or it sends none: check "
                "PREFS_KAFKA_SSL_CERTIFICATE_LOCATION (or _PEM) and PREFS_KAFKA_SSL_KEY_LOCATION (or _PEM)"
            )
        if code == KafkaError._SSL:
            return (
                "check PREFS_KAFKA_SSL_CA_LOCATION or PREFS_KAFKA_SSL_CA_PEM, and that PREFS_KAFKA_BOOTSTRAP names "
                "the brokers as their certificates do"
            )
        if code == KafkaError._RESOLVE:
            return (
                "correct the host name in PREFS_KAFKA_BOOTSTRAP, or the brokers' advertised.listeners where it is not "
                "in there"
            )
        if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            return (
                f"grant Describe and Read (to produce: Write) on topic {topic or 'and its like'} to {who}, or correct "
                "PREFS_KAFKA_SASL_USERNAME or PREFS_KAFKA_TOPIC_…"
            )
        if code == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return f"grant Read on the groups dagster-prefs… to {who}, or correct PREFS_KAFKA_SASL_USERNAME"
        if code in (
            KafkaError.CLUSTER_AUTHORIZATION_FAILED,
            KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        ):
            return (
                f"grant Write on the topics (before Kafka 3.0 also IdempotentWrite on the cluster) to {who}, or "
                "correct PREFS_KAFKA_SASL_USERNAME"
            )
        return f"check {_BROKERS}"


class _Reports(logging.Handler):
    """The reports of librdkafka: the last text of each error, whether all brokers are down, and its log.

    Holds no reference to the client: in a reference cycle, a client would be destroyed when the interpreter
    ends and its callbacks can no longer be called, which led to a segmentation fault.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[int, str] = {}
        self.all_down = False
        self.logged = ""
        self.closed = 0

    def clear(self) -> None:
        self.errors.clear()
        self.all_down, self.logged, self.closed = False, "", 0

    def error(self, error: Any) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.all_down = True
        else:
            self.errors[error.code()] = error.str()

    def emit(self, record: logging.LogRecord) -> None:
        # The format is "FAIL [client] [thread]: broker: what". A listener of another protocol only appears in
        # the log.
        text = record.getMessage()
        if text.startswith("FAIL "):
            self.logged = text.partition("]: ")[2] or text
            self.closed += "Disconnected" in text


def _first_at_once(sign: Callable[[str], tuple[str, float]]) -> Callable[[str], tuple[str, float]]:
    """Return a callback that first returns a token obtained right now, then the results of `sign`.

    librdkafka waits ten seconds for a token and does not report why there is none. Raises KafkaUnavailable if
    there are no credentials to sign with.
    """
    try:
        waiting = [sign("")]
    except KafkaException as error:
        raise KafkaUnavailable(
            f"Kafka authentication failed ({error}): check the AWS credentials, PREFS_KAFKA_MSK_REGION and "
            "PREFS_KAFKA_MSK_ROLE_ARN"
        ) from None
    return lambda told: waiting.pop() if waiting else sign(told)


def _setting(name: str) -> str:
    """Return the name of the setting behind a librdkafka property."""
    return f"PREFS_KAFKA_{name.upper().replace('.', '_')}"
