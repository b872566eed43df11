"""A DynamoDB that answers by script: the faults that no real or emulated one produces on demand."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Reply = bytes | None
Behaviour = Callable[["Request"], Reply]


@dataclass(frozen=True)
class Request:
    """One request: `number` counts from 1 over all connections, `on_connection` over its own."""

    number: int
    on_connection: int
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def operation(self) -> str:
        return self.headers["x-amz-target"].rpartition(".")[2]


@dataclass
class Script:
    """A running server; set `behave` to a function from request to the raw bytes of its answer.

    None closes the connection without an answer. An answer with `Connection: close` closes it afterwards.
    """

    endpoint: str
    behave: Behaviour
    requests: list[Request] = field(default_factory=list)
    connections: int = 0


def http(
    status: int, body: bytes, *, checksum: int | None = None, head: str = "", length: int | None = None
) -> bytes:
    checksum = zlib.crc32(body) if checksum is None else checksum
    return (
        f"HTTP/1.1 {status} Whatever\r\nx-amz-crc32: {checksum}\r\n"
        f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode() + body


def answer(content: dict[str, Any]) -> bytes:
    return http(200, json.dumps(content).encode())


def failure(code: str, message: str = "as scripted", status: int = 400) -> bytes:
    kind = f"com.amazonaws.dynamodb.v20120810#{code}"
    return http(status, json.dumps({"__type": kind, "message": message}).encode())


def serve(behave: Behaviour, tls: ssl.SSLContext | None = None) -> tuple[Script, Callable[[], None]]:
    """Start the server on a free port of this machine; the second value stops it."""
    listener = socket.create_server(("127.0.0.1", 0))
    scheme = "http" if tls is None else "https"
    script = Script(f"{scheme}://localhost:{listener.getsockname()[1]}", behave)
    lock = threading.Lock()
    opened: list[socket.socket] = []

    def talk(peer: socket.socket) -> None:
        data = b""
        count = 0
        with peer:
            while True:
                while b"\r\n\r\n" not in data:
                    more = peer.recv(65_536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")[1:]
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
                }
                length = int(headers["content-length"])
                while len(data) < length:
                    data += peer.recv(65_536)
                body, data = data[:length], data[length:]
                count += 1
                with lock:
                    request = Request(len(script.requests) + 1, count, headers, json.loads(body))
                    script.requests.append(request)
                reply = script.behave(request)
                if reply is None:
                    return
                peer.sendall(reply)
                if b"\r\nConnection: close" in reply:
                    return

    def guarded(peer: socket.socket) -> None:
        try:
            talk(peer if tls is None else tls.wrap_socket(peer, server_side=True))
        except OSError:
            return  # the client went away, as a spent budget makes it do

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return  # stopped
            script.connections += 1
            opened.append(peer)
            threading.Thread(target=guarded, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()

    def stop() -> None:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for peer in opened:
            peer.close()

    return script, stop
