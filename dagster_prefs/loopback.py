"""Access control for the servers that the platform opens on loopback.

Loopback alone protects nothing: every user of the machine can reach it, and so can every website in the
owner's browser. A browser sends a request's origin in `Host`, `Origin` and `Sec-Fetch-Site`, which a page
cannot forge; a foreign `Host` reveals DNS rebinding (https://owasp.org/www-community/attacks/DNS_Rebinding).
For other users, Linux reports which uid owns the other end of a connection on the same machine.

Imports only the standard library, because every server uses it.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from dagster_prefs.errors import PrefsError

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
# States in /proc/net/tcp in which the owner still holds the socket; sockets in later states are listed as
# root's.
_HELD = {"01", "08"}
# Linux's sock_diag(7): the request for one TCP socket by its four numbers, and the answer. The listing of all sockets
# grows with every closed connection: a server that read it for each connection spent more time there than on its
# requests.
_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _REQUEST_FLAG = 4, 20, 1
_NO_COOKIE = b"\xff" * 8
_ASKED = struct.Struct("=IHHII BBBxI 2s2s 16s16s I8s")
_TOLD = struct.Struct("=IHHII BBBB 48x IIIII")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def loopback_hosts(port: int) -> frozenset[str]:
    """Return the values of `Host` with which a client on this machine names a server on `port`."""
    return frozenset(f"{name}:{port}" for name in LOOPBACK_NAMES) | (
        frozenset(LOOPBACK_NAMES) if port == 80 else frozenset()
    )


def foreign_request(headers: Mapping[str, str], hosts: frozenset[str], *, method: str = "GET") -> str | None:
    """Return why a request comes from a foreign page, None if from this server's pages or a program.

    `headers` has lower-case names. `hosts` are the names, with ports, under which the server is meant to be
    reached. A link to the server that the user follows (a top-level navigation) is not foreign.
    """
    host = headers.get("host", "").lower()
    if host not in hosts:
        return f"the Host header {_short(host)} is none of this server's names"
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in {f"{scheme}://{host}" for scheme in ("http", "https")}:
        return f"the request comes from a page of {_short(origin)}"
    site = headers.get("sec-fetch-site", "none")
    navigates = (
        method == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )
    if site not in ("same-origin", "none") and not navigates:
        return "the request comes from a page of another site"
    return None


def _short(text: str) -> str:
    return repr(text[:100])


def peer_uid(client: tuple[Any, ...], server: tuple[Any, ...]) -> int | None:
    """Return the uid that owns the client's end of a TCP connection on this machine.

    Returns None if no process holds it. Raises OSError on systems without such a table (only Linux has it).
    """
    asked = _asked_uid(client, server)
    return _listed_uid(client, server) if asked is None else asked


def _asked_uid(client: tuple[Any, ...], server: tuple[Any, ...]) -> int | None:
    """Ask the kernel for this one connection. Returns None if it does not answer, or no process holds the socket."""
    (source, source_port), (target, target_port) = (
        (socket.inet_aton(end[0]), struct.pack("!H", end[1])) for end in (client[:2], server[:2])
    )
    # The answer includes IPv6 sockets with mapped addresses.
    request = _ASKED.pack(
        *(_ASKED.size, _SOCK_DIAG_BY_FAMILY, _REQUEST_FLAG, 0, 0),
        *(socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFFFFFF),
        *(source_port, target_port, source.ljust(16, b"\0"), target.ljust(16, b"\0"), 0, _NO_COOKIE),
    )
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _SOCK_DIAG) as kernel:
            kernel.send(request)
            answer = kernel.recv(4096, socket.MSG_DONTWAIT)
    except OSError:
        return None
    if len(answer) < _TOLD.size:
        return None
    _, kind, _, _, _, _, state, _, _, _, _, _, uid, inode = _TOLD.unpack_from(answer)
    return uid if kind == _SOCK_DIAG_BY_FAMILY and f"{state:02X}" in _HELD and inode else None


def _listed_uid(client: tuple[Any, ...], server: tuple[Any, ...]) -> int | None:
    """Look the connection up in the listing of all connections."""
    for table, as_listed in (("/proc/net/tcp", _ipv4), ("/proc/net/tcp6", _mapped)):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except FileNotFoundError:
            if table.endswith("6"):
                continue
            raise
        ends = (_listed(client, as_listed), _listed(server, as_listed))
        for line in lines:
            columns = line.split()
            if (columns[1], columns[2]) == ends and columns[3] in _HELD and columns[9] != "0":
                return int(columns[7])
    return None


def is_stranger(client: tuple[Any, ...] | None, server: tuple[Any, ...] | None) -> bool:
    """Return whether a connection comes from a user of this machine other than root and this process's user.

    Returns False if the user is unknown: on systems other than Linux, and beyond loopback, where the network controls
    access.
    """
    if client is None or server is None or not sys.platform.startswith("linux"):
        return False
    if not client[0].startswith("127.") or not server[0].startswith("127."):
        return False
    return peer_uid(client, server) not in (os.geteuid(), 0)


def _ipv4(address: str) -> str:
    return f"{struct.unpack('=I', socket.inet_aton(address))[0]:08X}"


def _mapped(address: str) -> str:
    # Java and others reach IPv4 addresses through IPv6 sockets, which are in the other table.
    return "0000000000000000" + f"{struct.unpack('=I', bytes([0, 0, 255, 255]))[0]:08X}" + _ipv4(address)


def _listed(end: tuple[Any, ...], as_listed: Callable[[str], str]) -> str:
    return f"{as_listed(end[0])}:{end[1]:04X}"


class CannotListen(PrefsError):
    """A server cannot listen at its address."""


class LoopbackGuard:
    """ASGI middleware that admits programs of this user and the server's own pages, also for WebSockets.

    `hosts` are the names, with ports, under which the server is reached; `own_user_only` rejects other users
    of the machine; `log` is called with the reason of each rejection.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: Iterable[str],
        own_user_only: bool = True,
        log: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._own_user_only = own_user_only
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403; a WebSocket is rejected before it is accepted."""
        reason = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self._app(scope, receive, send)
            return
        self._log(reason)
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        await refuse(send, 403, reason)

    def _refusal(self, scope: Scope) -> str | None:
        if self._own_user_only and is_stranger(_end(scope.get("client")), _end(scope.get("server"))):
            return "the connection comes from another user of this machine"
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            key = name.decode("latin-1").lower()
            if key in headers and key in ("host", "origin"):
                return f"two headers {key}"
            headers[key] = value.decode("latin-1")
        return foreign_request(headers, self._hosts, method=scope.get("method", "GET"))


async def refuse(send: Send, status: int, reason: str) -> None:
    """Respond to an ASGI request with the reason for its rejection, as plain text."""
    body = f"refused: {reason}\n".encode()
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _end(end: Any) -> tuple[str, int] | None:
    return (str(end[0]), int(end[1])) if end and end[1] is not None else None


def listen(host: str, port: int, *, backlog: int | None = None) -> socket.socket:
    """Listen at an address, by its own family; port 0 selects a free one. Raises CannotListen."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise CannotListen(
            f"{host}:{port} cannot be listened at ({error.strerror or error}): choose another --host or --port"
        ) from None
