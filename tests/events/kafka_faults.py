"""Brokers that do not let a client in: as much of Kafka's protocol as it takes to be refused."""

from __future__ import annotations

import datetime
import ipaddress
import socketserver
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

API_VERSIONS, METADATA, SASL_HANDSHAKE, SASL_AUTHENTICATE, INIT_PRODUCER_ID = 18, 3, 17, 36, 22
# The only versions that are spoken here: the oldest that librdkafka asks for with each of them.
VERSIONS = {
    API_VERSIONS: 0,
    METADATA: 1,
    SASL_HANDSHAKE: 1,
    SASL_AUTHENTICATE: 0,
    0: 3,
    1: 4,
    2: 1,
    INIT_PRODUCER_ID: 1,
}
UNSUPPORTED_VERSION, AUTHENTICATION_FAILED, UNSUPPORTED_MECHANISM, CLUSTER_DENIED = 35, 58, 33, 31


def text(value: str) -> bytes:
    return struct.pack(">h", len(value.encode())) + value.encode()


def _asked(rest: bytes) -> list[str]:
    """The topics of a metadata request of version 1, after the client's name."""
    (length,) = struct.unpack(">h", rest[:2])
    place = 2 + max(0, length)
    (count,) = struct.unpack(">i", rest[place : place + 4])
    place += 4
    found = []
    for _ in range(max(0, count)):
        (length,) = struct.unpack(">h", rest[place : place + 2])
        found.append(rest[place + 2 : place + 2 + length].decode())
        place += 2 + length
    return found


class _Connection(socketserver.BaseRequestHandler):
    server: FaultyBroker

    def handle(self) -> None:
        try:
            while True:
                (length,) = struct.unpack(">i", self._read(4))
                request = self._read(length)
                api, version, correlation = struct.unpack(">hhi", request[:8])
                answer = struct.pack(">i", correlation) + self.server.answer(api, version, request[8:])
                self.request.sendall(struct.pack(">i", len(answer)) + answer)
        except OSError:
            return

    def _read(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            part = self.request.recv(length - len(found))
            if not part:
                raise ConnectionResetError
            found += part
        return found


class FaultyBroker(socketserver.ThreadingTCPServer):
    """A broker that answers `topic_error` for every topic, refuses whoever signs in, and lets nobody produce.

    `mechanisms` are those of SASL that it offers, `tls` is the context of its listener.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(
        self,
        *,
        topic_error: int = 0,
        mechanisms: tuple[str, ...] = ("PLAIN", "SCRAM-SHA-512"),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self._topic_error = topic_error
        self._mechanisms = mechanisms
        self._tls = tls

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[Any, Any]:
        connection, peer = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    def answer(self, api: int, version: int, rest: bytes) -> bytes:
        if api == API_VERSIONS:
            # A newer question than version 0 is answered in version 0, as brokers do, and asked again.
            error = UNSUPPORTED_VERSION if version else 0
            known = b"".join(struct.pack(">hhh", key, 0, highest) for key, highest in VERSIONS.items())
            return struct.pack(">hi", error, len(VERSIONS)) + known
        if api == SASL_HANDSHAKE:
            offered = b"".join(text(name) for name in self._mechanisms)
            error = 0 if "PLAIN" in self._mechanisms else UNSUPPORTED_MECHANISM
            return struct.pack(">hi", error, len(self._mechanisms)) + offered
        if api == SASL_AUTHENTICATE:
            said = text("Authentication failed: Invalid username or password")
            return struct.pack(">h", AUTHENTICATION_FAILED) + said + struct.pack(">i", 0)
        if api == INIT_PRODUCER_ID:
            return struct.pack(">ihqh", 0, CLUSTER_DENIED, -1, -1)
        if api == METADATA:
            host, port = self.server_address[:2]
            brokers = struct.pack(">ii", 1, 1) + text(str(host)) + struct.pack(">ih", port, -1)
            asked = _asked(rest)
            topics = b"".join(
                struct.pack(">h", self._topic_error) + text(name) + struct.pack(">?i", False, 0)
                for name in asked
            )
            return brokers + struct.pack(">i", 1) + struct.pack(">i", len(asked)) + topics
        raise ConnectionResetError


@contextmanager
def running(broker: FaultyBroker) -> Iterator[FaultyBroker]:
    """Serve until the end of the block."""
    thread = threading.Thread(target=broker.serve_forever, daemon=True)
    thread.start()
    try:
        yield broker
    finally:
        broker.shutdown()
        broker.server_close()
        thread.join()


def untrusted_listener(folder: Path) -> ssl.SSLContext:
    """TLS with a certificate for 127.0.0.1 that no authority signed; it is left in `folder` as cert.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
