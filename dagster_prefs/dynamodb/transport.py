"""Two ways to send reads to DynamoDB: boto3, and a lean transport for the hot path.

A transport sends each call once, concurrently, within a deadline, and answers it with the decoded JSON or a
`ReadError`; it never raises for a single call. The reader does the retries, because they depend on what is
read.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast
from urllib.parse import urlsplit

from dagster_prefs.addresses import is_loopback
from dagster_prefs.errors import PrefsError

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

Kind = Literal[
    "timeout", "unavailable", "throttled", "corrupt", "credentials", "missing_table", "refused", "item"
]
TRANSIENT: frozenset[Kind] = frozenset({"timeout", "unavailable", "throttled", "corrupt"})

_KINDS: dict[str, Kind] = {
    "ProvisionedThroughputExceededException": "throttled",
    "RequestLimitExceeded": "throttled",
    "Throttling": "throttled",
    "ThrottlingException": "throttled",
    "InternalServerError": "unavailable",
    "ServiceUnavailable": "unavailable",
    "ServiceUnavailableException": "unavailable",
    "ExpiredToken": "credentials",
    "ExpiredTokenException": "credentials",
    "UnrecognizedClientException": "credentials",
    "InvalidSignatureException": "credentials",
    "IncompleteSignatureException": "credentials",
    "MissingAuthenticationTokenException": "credentials",
    "AccessDeniedException": "credentials",
    "ResourceNotFoundException": "missing_table",
}

# No answer of DynamoDB's is larger than 16 MB; more is not DynamoDB.
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_HEAD_BYTES = 64 * 1024
# DynamoDB closes idle connections after a minute or so; one that is nearly that old is not worth the risk.
MAX_IDLE_SECONDS = 45.0


class ReadError(PrefsError):
    """A read failed; `kind` is the cause, and `transient` whether a retry may succeed."""

    def __init__(self, message: str, kind: Kind) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def transient(self) -> bool:
        """Whether the same read may succeed a moment later."""
        return self.kind in TRANSIENT


@dataclass(frozen=True, slots=True)
class Call:
    """One request; `body` is DynamoDB's JSON."""

    operation: Literal["GetItem", "BatchGetItem"]
    body: bytes


Answer = dict[str, Any] | ReadError


class Transport(Protocol):
    """Sends calls concurrently; `deadline` is in seconds of time.monotonic()."""

    def send(self, calls: Sequence[Call], deadline: float) -> list[Answer]:
        """Attempt each call once; return the answers in the order of the calls."""
        ...

    def warm(self, connections: int) -> None:
        """Open connections ahead of the first call."""
        ...

    def close(self) -> None:
        """Release connections and threads."""
        ...


def classify(code: str, message: str, status: int) -> ReadError:
    """Return the error for an answer of DynamoDB, by its error code, message and HTTP status."""
    kind = _KINDS.get(code)
    if kind is None:
        kind = "unavailable" if status >= 500 else "throttled" if status == 429 else "refused"
    remedy = {
        "credentials": "check the AWS credentials and their policy",
        "missing_table": "provision the table, or check its name, prefix, endpoint and region",
        "refused": "check the client against the contract's version",
    }.get(kind, "try again")
    return ReadError(f"DynamoDB answered {code or status} ({message or 'no message'}): {remedy}", kind)


def _late() -> ReadError:
    return ReadError("DynamoDB did not answer within the latency budget: raise it, or try again", "timeout")


def _away(error: object) -> ReadError:
    return ReadError(f"DynamoDB cannot be reached ({error}): check the endpoint, or try again", "unavailable")


def _corrupt(problem: str) -> ReadError:
    return ReadError(f"DynamoDB's answer is malformed ({problem}): try again", "corrupt")


def no_credentials() -> ReadError:
    """Return the error for an empty credential chain of botocore."""
    return ReadError(
        "no AWS credentials were found: set AWS_PROFILE, a role, or AWS_ACCESS_KEY_ID and its secret",
        "credentials",
    )


class BotoTransport:
    """The transport over boto3's client: one attempt per call, and a thread for each concurrent call.

    The client must only make one attempt (`total_max_attempts=1`), because the reader counts attempts.
    """

    def __init__(self, client: DynamoDBClient, threads: int) -> None:
        self._client = client
        # urllib3 decodes nothing here, so the content is what the checksum was made of.
        for operation in ("GetItem", "BatchGetItem"):
            client.meta.events.register(f"after-call.dynamodb.{operation}", _check_body)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="profile-read")

    def send(self, calls: Sequence[Call], deadline: float) -> list[Answer]:
        """Attempt each call once, in its own thread, so that a slow call cannot delay the caller."""
        futures = [self._pool.submit(self._one, call) for call in calls]
        return [self._result(future, deadline) for future in futures]

    def warm(self, connections: int) -> None:
        """Do nothing: boto3 only opens connections by sending requests, so the first requests open them."""

    def close(self) -> None:
        """Wait for running calls and close the client's connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    @staticmethod
    def _result(future: Future[Answer], deadline: float) -> Answer:
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            future.cancel()
            return _late()

    def _one(self, call: Call) -> Answer:
        from botocore import exceptions

        try:
            arguments = json.loads(call.body)
            if call.operation == "GetItem":
                return dict(self._client.get_item(**arguments))
            return dict(self._client.batch_get_item(**arguments))
        except exceptions.ClientError as error:
            details = error.response.get("Error", {})
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            return classify(str(details.get("Code", "")), str(details.get("Message", "")), status)
        except (exceptions.ReadTimeoutError, exceptions.ConnectTimeoutError):
            return _late()
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
            return no_credentials()
        except exceptions.CredentialRetrievalError as error:
            return ReadError(
                f"AWS credentials cannot be refreshed ({error}): check the role or profile", "credentials"
            )
        except (exceptions.ResponseStreamingError, exceptions.IncompleteReadError) as error:
            return _corrupt(str(error))
        except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
            return _away(error)
        except _Damaged as error:
            return _corrupt(str(error))
        except (exceptions.ParamValidationError, exceptions.BotoCoreError) as error:
            return ReadError(
                f"DynamoDB does not accept such a request ({error}): check the contract", "refused"
            )
        except ValueError as error:
            return _corrupt(str(error))


def _check_body(http_response: Any, **_: object) -> None:
    # botocore takes a body that is no JSON for an empty answer, which would read as "no such item".
    _checked_json(http_response.status_code, http_response.headers.get("x-amz-crc32"), http_response.content)


class LeanTransport:
    """Signed HTTP/1.1 over kept-alive connections, without threads.

    botocore resolves the endpoint and the credentials (refreshing them when they expire) and signs;
    everything between that and the socket is omitted. All calls of one `send` are sent before the first
    answer is read. HTTP proxies are not supported: use `BotoTransport` where one is needed.
    """

    def __init__(
        self, endpoint_url: str, region: str, credentials: Any, pool_size: int, connect_timeout_seconds: float
    ) -> None:
        parts = urlsplit(endpoint_url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = _tls_context() if parts.scheme == "https" else None
        self._connect_timeout = connect_timeout_seconds
        self._credentials = credentials
        self._signer = _Signer(parts.netloc.rpartition("@")[2], parts.path or "/", region)
        self._window = pool_size
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def send(self, calls: Sequence[Call], deadline: float) -> list[Answer]:
        """Attempt each call once, with at most `pool_size` calls in flight."""
        answers: list[Answer] = []
        if self._closed:
            return [ReadError("this client is closed: create a new one", "refused") for _ in calls]
        try:
            keys = None if self._credentials is None else self._credentials.get_frozen_credentials()
        except Exception as error:
            # Whatever a credential provider of botocore's raises, the read cannot be signed.
            failure = ReadError(
                f"AWS credentials cannot be refreshed ({error}): check the role or profile", "credentials"
            )
            return [failure] * len(calls)
        if keys is None or not keys.access_key:
            return [no_credentials()] * len(calls)
        for start in range(0, len(calls), self._window):
            wave = calls[start : start + self._window]
            messages = [self._signer.message(keys, call) for call in wave]
            started = [self._start(message, deadline) for message in messages]
            answers += [
                state if isinstance(state, ReadError) else self._finish(state, message, deadline)
                for state, message in zip(started, messages, strict=True)
            ]
        return answers

    def warm(self, connections: int) -> None:
        """Open connections up to the pool's size. A failure is reported by the first read instead."""
        opened = []
        deadline = time.monotonic() + self._connect_timeout
        for _ in range(min(connections, self._window) - len(self._idle)):
            try:
                opened.append(self._open(deadline))
            except OSError:
                break
        with self._lock:
            self._idle += opened

    def close(self) -> None:
        """Close all idle connections."""
        self._closed = True
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _start(self, message: bytes, deadline: float) -> _Connection | ReadError:
        if time.monotonic() >= deadline:
            # A call that is late already must not cost a good connection.
            return _late()
        try:
            while (connection := self._take()) is not None:
                try:
                    connection.send(message, deadline)
                except TimeoutError:
                    connection.close()
                    raise
                except OSError:
                    # The server closed it while it was idle; nothing was asked on it yet.
                    connection.close()
                    continue
                return connection
            connection = self._open(deadline)
            connection.send(message, deadline)
        except TimeoutError:
            return _late()
        except OSError as error:
            return _away(error)
        return connection

    def _finish(self, connection: _Connection, message: bytes, deadline: float) -> Answer:
        try:
            try:
                status, checksum, body, reusable = connection.receive(deadline)
            except _ClosedBeforeAnswer:
                connection.close()
                if not connection.reused:
                    raise
                # Closed by the server between our requests; a read may simply be sent again.
                connection = self._open(deadline)
                connection.send(message, deadline)
                status, checksum, body, reusable = connection.receive(deadline)
        except TimeoutError:
            connection.close()
            return _late()
        except _Damaged as error:
            connection.close()
            return _corrupt(str(error))
        except OSError as error:
            connection.close()
            return _away(error)
        if reusable and not self._closed:
            connection.reused = True
            connection.idle_since = time.monotonic()
            with self._lock:
                if len(self._idle) < self._window:
                    self._idle.append(connection)
                    connection = None  # type: ignore[assignment]
        if connection is not None:
            connection.close()
        return _decode(status, checksum, body)

    def _take(self) -> _Connection | None:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
            if connection is not None and time.monotonic() - connection.idle_since > MAX_IDLE_SECONDS:
                # The newest is on top, so all below are older still.
                stale, self._idle = [connection, *self._idle], []
            else:
                return connection
        for old in stale:
            old.close()
        return None

    def _open(self, deadline: float) -> _Connection:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        raw = socket.create_connection((self._host, self._port), min(remaining, self._connect_timeout))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._tls is not None:
            try:
                raw = self._tls.wrap_socket(raw, server_hostname=self._host)
            except OSError:
                raw.close()
                raise
        return _Connection(raw)


class _ClosedBeforeAnswer(ConnectionError):
    pass


class _Damaged(Exception):
    pass


class _Connection:
    """One kept-alive HTTP/1.1 connection, one request at a time."""

    __slots__ = ("_socket", "idle_since", "reused")

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self.reused = False
        self.idle_since = time.monotonic()

    def send(self, message: bytes, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
        self._socket.sendall(message)

    def receive(self, deadline: float) -> tuple[int, str | None, bytes, bool]:
        """Return status, checksum header and body, and whether the connection can be reused."""
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise _Damaged("its headers do not end")
            more = self._receive(deadline)
            if not more:
                if data:
                    raise _Damaged("it ends within its headers")
                raise _ClosedBeforeAnswer("the server closed the connection without an answer")
            data += more
        status_line, *lines = data[:end].decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        protocol, _, rest = status_line.partition(" ")
        if not protocol.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise _Damaged("it is not HTTP")
        reusable = protocol == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        body = data[end + 4 :]
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body = self._chunked(body, deadline)
        elif (length := headers.get("content-length")) is not None:
            if not length.isdigit() or int(length) > MAX_BODY_BYTES:
                raise _Damaged(f"its length is {length}")
            body = self._exactly(body, int(length), deadline)
            if len(body) > int(length):
                raise _Damaged("it is longer than it says")
        else:
            while more := self._receive(deadline):
                body += more
            reusable = False
        return int(rest[:3]), headers.get("x-amz-crc32"), body, reusable

    def close(self) -> None:
        self._socket.close()

    def _receive(self, deadline: float) -> bytes:
        # Past the deadline what has arrived already is still taken: it arrived while a slower call was read.
        self._socket.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            return self._socket.recv(65_536)
        except (BlockingIOError, ssl.SSLWantReadError):
            raise TimeoutError from None

    def _exactly(self, data: bytes, length: int, deadline: float) -> bytes:
        if len(data) >= length:
            return data
        parts = [data]
        missing = length - len(data)
        while missing > 0:
            more = self._receive(deadline)
            if not more:
                raise _Damaged(f"{missing} of {length} bytes are missing")
            parts.append(more)
            missing -= len(more)
        return b"".join(parts)

    def _chunked(self, data: bytes, deadline: float) -> bytes:
        body = b""
        while True:
            while b"\r\n" not in data:
                data = self._exactly(data, len(data) + 1, deadline)
            size_text, _, data = data.partition(b"\r\n")
            try:
                size = int(size_text.partition(b";")[0], 16)
            except ValueError:
                raise _Damaged("the size of a chunk is missing or invalid") from None
            if size + len(body) > MAX_BODY_BYTES:
                raise _Damaged("it is too long")
            data = self._exactly(data, size + 2, deadline)
            body += data[:size]
            data = data[size + 2 :]
            if size == 0:
                return body


class _Signer:
    """Builds complete, signed HTTP requests. Only date, payload and keys vary; the rest is prepared once."""

    def __init__(self, host: str, path: str, region: str) -> None:
        self._host = host
        self._path = path
        self._region = region
        self._auth: tuple[Any, Any] | None = None

    def message(self, keys: Any, call: Call) -> bytes:
        """Return the request with its signature; botocore's SigV4 does everything that involves the secret."""
        auth = self._signing(keys)
        target = f"DynamoDB_20120810.{call.operation}"
        date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        token = f"x-amz-security-token:{keys.token}\n" if keys.token else ""
        signed = f"content-type;host;x-amz-date;{'x-amz-security-token;' if keys.token else ''}x-amz-target"
        canonical = (
            f"POST\n{self._path}\n\ncontent-type:application/x-amz-json-1.0\nhost:{self._host}\n"
            f"x-amz-date:{date}\n{token}x-amz-target:{target}\n\n{signed}\n{sha256(call.body).hexdigest()}"
        )
        request = _SignedRequest(date)
        signature = auth.signature(auth.string_to_sign(request, canonical), request)
        return (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/x-amz-json-1.0\r\nX-Amz-Target: {target}\r\nX-Amz-Date: {date}\r\n"
            f"{f'X-Amz-Security-Token: {keys.token}' + chr(13) + chr(10) if keys.token else ''}"
            f"Authorization: AWS4-HMAC-SHA256 Credential={auth.scope(request)}, SignedHeaders={signed}, "
            f"Signature={signature}\r\nContent-Length: {len(call.body)}\r\n\r\n"
        ).encode("latin-1") + call.body

    def _signing(self, keys: Any) -> Any:
        known = self._auth
        if known is None or known[0] != keys:
            from botocore.auth import SigV4Auth

            known = self._auth = (keys, SigV4Auth(keys, "dynamodb", self._region))
        return known[1]


class _SignedRequest:
    """The attributes of a request that botocore's signer reads."""

    __slots__ = ("context",)

    def __init__(self, timestamp: str) -> None:
        self.context = {"timestamp": timestamp}


def _checked_json(status: int, checksum: str | None, body: bytes) -> dict[str, Any] | None:
    """Return the decoded body, None for an error's body that is not JSON. Raises _Damaged if it is corrupt."""
    if checksum is not None and str(zlib.crc32(body)) != checksum:
        raise _Damaged("its CRC32 differs from the one in its header")
    try:
        content = json.loads(str(body, "utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        if status == 200:
            raise _Damaged("it is not a JSON object")
        return None
    return content


def _decode(status: int, checksum: str | None, body: bytes) -> Answer:
    try:
        content = _checked_json(status, checksum, body)
    except _Damaged as error:
        return _corrupt(str(error))
    if content is None:
        return classify("", "", status)
    if status == 200:
        return content
    code = str(content.get("__type", "")).rpartition("#")[2]
    return classify(code, str(content.get("message") or content.get("Message") or ""), status)


def _tls_context() -> ssl.SSLContext:
    import os

    from botocore.httpsession import get_cert_path

    return ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True))


def make_transport(
    kind: Literal["lean", "boto3"],
    *,
    endpoint_url: str | None,
    region: str | None,
    pool_size: int,
    connect_timeout_seconds: float,
    read_timeout_seconds: float,
) -> Transport:
    """Return a transport to `endpoint_url`, or to the endpoint of botocore's configuration.

    Raises ReadError for an endpoint or region that botocore cannot resolve.
    """
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    if endpoint_url is not None:
        parts = urlsplit(endpoint_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ReadError(
                f"the endpoint {endpoint_url!r} is not a URL: use http://host:port or https://host", "refused"
            )
    session = botocore.session.get_session()
    credentials = session.get_credentials()
    if credentials is None and is_loopback(endpoint_url):
        session.set_credentials("local", "local")
        credentials = session.get_credentials()
    region = region or session.get_config_variable("region")
    try:
        if kind == "lean" and endpoint_url and region:
            return LeanTransport(endpoint_url, region, credentials, pool_size, connect_timeout_seconds)
        client = session.create_client(
            "dynamodb",
            region_name=region,
            endpoint_url=endpoint_url,
            config=Config(
                connect_timeout=connect_timeout_seconds,
                read_timeout=read_timeout_seconds,
                retries={"mode": "standard", "total_max_attempts": 1},
                max_pool_connections=pool_size,
                tcp_keepalive=True,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise ReadError(
            f"DynamoDB cannot be addressed ({error}): set the region and endpoint", "refused"
        ) from None
    if kind == "boto3":
        return BotoTransport(cast("DynamoDBClient", client), pool_size)
    resolved = client.meta.endpoint_url
    found = client.meta.region_name
    client.close()
    return LeanTransport(resolved, found, credentials, pool_size, connect_timeout_seconds)
