"""Access to the console by tokens. Programs send them as bearer tokens, and browsers exchange them for a session.

On loopback without tokens, every request that passes the guard of `loopback.py` has all rights.
"""

from __future__ import annotations

import asyncio
import html
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import parse_qs, quote

from dagster_prefs.access import EVERYTHING, REFUSAL_SECONDS, TOKENS, Grant, Right, Tokens, digest, find_token
from dagster_prefs.loopback import App, Receive, Scope, Send

COOKIE = "prefs_console"
SIGN_IN, SIGN_OUT = "/sign-in", "/sign-out"
# Paths without any data.
OPEN_PATHS = frozenset({SIGN_IN, SIGN_OUT, "/healthz"})
SESSION_SECONDS = 12 * 3600.0
MOST_SESSIONS = 1000
MOST_FORM_BYTES = 16 * 1024
# Key of the grant in a request's state.
GRANT = "prefs_grant"


class Sessions:
    """Browsers that have signed in: the hash of a session's id → its token's grant, until it expires."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, tuple[Grant, float]] = {}

    def open(self, grant: Grant) -> str:
        """Start a session and return its id. Ends the oldest session if there are too many."""
        now = self._clock()
        self._held = {key: one for key, one in self._held.items() if one[1] > now}
        while len(self._held) >= MOST_SESSIONS:
            del self._held[next(iter(self._held))]
        id_ = secrets.token_urlsafe(32)
        self._held[digest(id_)] = (grant, now + SESSION_SECONDS)
        return id_

    def grant(self, id_: str) -> Grant | None:
        """Return the grant of a session, None if there is none with this id."""
        held = self._held.get(digest(id_))
        return held[0] if held is not None and held[1] > self._clock() else None

    def close(self, id_: str) -> None:
        """End a session, if it is there."""
        self._held.pop(digest(id_), None)


class TokenGate:
    """ASGI middleware that admits requests with a token, and stores its grant in the request's state.

    `needed` returns the right that a path needs, None for one that any token may see. Without tokens everybody
    may do everything.
    """

    def __init__(self, app: App, *, tokens: Tokens, needed: Callable[[str], Right | None]) -> None:
        self._app = app
        self._tokens = tokens
        self._needed = needed
        self._sessions = Sessions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it: 401 without a token, 403 for one without the right."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if scope["type"] == "http" and path == "/healthz":
            await _answer(send, 200, "ok\n")
            return
        if scope["type"] == "http" and self._tokens and path in (SIGN_IN, SIGN_OUT):
            await self._sign(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        grant = self._grant(headers) if self._tokens else EVERYTHING
        right = self._needed(path)
        if grant is not None and (right is None or right in grant.rights):
            scope.setdefault("state", {})[GRANT] = grant
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif grant is not None and right is not None:
            await _answer(send, 403, f"refused: {grant.refusal(right)}\n")
        elif "authorization" in headers:
            await asyncio.sleep(REFUSAL_SECONDS)
            await _answer(send, 401, f"refused: {_WRONG}\n", {"www-authenticate": "Bearer"})
        elif "text/html" in headers.get("accept", "") and scope["method"] == "GET":
            await _answer(send, 303, "", {"location": f"{SIGN_IN}?next={quote(path)}"})
        else:
            await _answer(send, 401, f"refused: {_NONE}\n", {"www-authenticate": "Bearer"})

    def _grant(self, headers: dict[str, str]) -> Grant | None:
        authorization = headers.get("authorization", "")
        if authorization.lower().startswith("bearer "):
            return self._tokens.bearer(authorization)
        grant = self._sessions.grant(_cookie(headers))
        # A token that was removed ends its sessions.
        return grant if any(token.grant == grant for token in self._tokens.all()) else None

    async def _sign(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        asked = parse_qs(scope["query_string"].decode("latin-1"))
        target = _own_path(asked.get("next", ["/"])[0])
        if scope["path"] == SIGN_OUT:
            self._sessions.close(_cookie(headers))
            gone = f"{COOKIE}=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0"
            await _answer(send, 303, "", {"location": SIGN_IN, "set-cookie": gone})
            return
        if scope["method"] != "POST":
            await _answer(send, 200, sign_in_page(target), {"content-type": "text/html; charset=utf-8"})
            return
        form = parse_qs((await _body(receive)).decode("utf-8", "replace"))
        token = find_token(self._tokens.all(), form.get("token", [""])[0].strip())
        if token is None:
            await asyncio.sleep(REFUSAL_SECONDS)
            page = sign_in_page(target, _WRONG)
            await _answer(send, 401, page, {"content-type": "text/html; charset=utf-8"})
            return
        # Behind a proxy that terminates TLS, only the browser's headers show that the page was loaded over TLS.
        secure = "; Secure" if headers.get("origin", "").startswith("https://") else ""
        cookie = (
            f"{COOKIE}={self._sessions.open(token.grant)}; Path=/; HttpOnly; SameSite=Lax; "
            f"Max-Age={SESSION_SECONDS:.0f}{secure}"
        )
        await _answer(send, 303, "", {"location": target, "set-cookie": cookie})


_WRONG = f"unknown token: use one whose hash {TOKENS} has, where the console was started"
_NONE = (
    "the console needs a token here: send `Authorization: Bearer TOKEN`, with one that `prefs token` made, or open "
    f"{SIGN_IN} in a browser"
)


def sign_in_page(target: str, problem: str = "") -> str:
    """Return the page that asks for a token and then redirects to the path `target`."""
    told = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sign in · dagster-prefs</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>body{{font:16px system-ui,sans-serif;max-width:24rem;margin:15vh auto;padding:0 1rem}}
input,button{{font:inherit;width:100%;box-sizing:border-box;padding:.6rem;margin-top:.5rem}}
p[role=alert]{{color:#c62828}}</style></head>
<body><h1>dagster-prefs console</h1>{told}
<form method="post" action="{SIGN_IN}?next={quote(target)}">
<label>Token<input type="password" name="token" autocomplete="current-password" autofocus required></label>
<button>Sign in</button></form></body></html>
"""


def _own_path(given: str) -> str:
    """Return the given path if it is one of this server, never the address of another server."""
    return given if re.fullmatch(r"/(?![/\\])[\x21-\x7e]*", given) and "\\" not in given else "/"


def _cookie(headers: dict[str, str]) -> str:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


async def _body(receive: Receive) -> bytes:
    body = b""
    while len(body) <= MOST_FORM_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body[:MOST_FORM_BYTES]


async def _answer(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    content = text.encode()
    given = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(content)),
        "cache-control": "no-store",
        **(headers or {}),
    }
    head = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": content})
