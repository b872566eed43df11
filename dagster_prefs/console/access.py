"""Access to the console off loopback: tokens with scopes. Programs send them as bearer tokens, and browsers exchange
them for a session.

On loopback without tokens, every request that passes the guard of `loopback.py` has all rights.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args
from urllib.parse import parse_qs, quote

from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.loopback import App, Receive, Scope, Send

# The scopes of a token: read the values of domains, use the shop's ranking, see the pipeline's state and the
# declarations, send events.
Right = Literal["domains", "shop", "inspect", "send"]
RIGHTS: tuple[Right, ...] = get_args(Right)

# A shorter token could be guessed.
LEAST_TOKEN_CHARACTERS = 24
HASHED = "sha256:"
COOKIE = "prefs_console"
SIGN_IN, SIGN_OUT = "/sign-in", "/sign-out"
# Paths without any data.
OPEN_PATHS = frozenset({SIGN_IN, SIGN_OUT, "/healthz"})
SESSION_SECONDS = 12 * 3600.0
MOST_SESSIONS = 1000
MOST_FORM_BYTES = 16 * 1024
# Delay of the answer to a wrong token, seconds.
REFUSAL_SECONDS = 1.0
# Key of the grant in a request's state.
GRANT = "prefs_grant"


class AccessError(PrefsError):
    """A token is malformed, or lacks the right that a request needs."""


@dataclass(frozen=True)
class Grant:
    """What a request may do. `name` is the token's, empty on loopback without tokens."""

    rights: frozenset[Right]
    name: str = ""

    def require(self, right: Right) -> None:
        """Raise AccessError unless this right is granted."""
        if right not in self.rights:
            raise AccessError(self.refusal(right))

    def refusal(self, right: Right) -> str:
        """Return the error of a missing right, with the remedy."""
        return (
            f"the token {self.name!r} has {', '.join(sorted(self.rights))}, and this needs {right}: add it to the "
            "token's scopes in PREFS_CONSOLE_TOKENS, or sign in with another token"
        )


EVERYTHING = Grant(frozenset(RIGHTS))
# The grant of a request that did not pass the gate.
NOTHING = Grant(frozenset())


@dataclass(frozen=True)
class Token:
    """One token: the SHA-256 of its secret, in hex, and what it grants."""

    grant: Grant
    digest: str = field(repr=False)


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Parse `name:scope+scope:secret,…`; a secret may be given as `sha256:` and the hash of it in hex.

    Raises AccessError naming the token (never its secret), the rule and the remedy.
    """
    found: dict[str, Token] = {}
    for number, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        name, _, rest = entry.partition(":")
        rights, _, secret = rest.partition(":")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,40}", name) or not secret:
            raise AccessError(
                f"token {number} of PREFS_CONSOLE_TOKENS is not name:scope+scope:secret, with letters, digits, `.`, "
                "`_` and `-` in its name: write e.g. oncall:domains+inspect:$(openssl rand -hex 32)"
            )
        if name in found:
            raise AccessError(f"PREFS_CONSOLE_TOKENS has two tokens {name}: rename one of them")
        known = _rights(name, rights)
        if secret.startswith(HASHED):
            digest = secret.removeprefix(HASHED).lower()
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise AccessError(
                    f"token {name} of PREFS_CONSOLE_TOKENS has no SHA-256 behind {HASHED}: write 64 hex digits, as "
                    "`printf %s TOKEN | sha256sum` prints them"
                )
        else:
            if len(secret) < LEAST_TOKEN_CHARACTERS:
                raise AccessError(
                    f"token {name} of PREFS_CONSOLE_TOKENS has {len(secret)} characters, at least "
                    f"{LEAST_TOKEN_CHARACTERS}: make one with `openssl rand -hex 32`"
                )
            digest = _digest(secret)
        found[name] = Token(Grant(known, name), digest)
    return tuple(found.values())


def _rights(token: str, text: str) -> frozenset[Right]:
    given = [one.strip() for one in text.split("+")]
    if unknown := [one for one in given if one not in RIGHTS]:
        raise AccessError(
            f"token {token} of PREFS_CONSOLE_TOKENS has the scope {excerpt(unknown[0])}: use {', '.join(RIGHTS)}, "
            "joined by +"
        )
    return frozenset(right for right in RIGHTS if right in given)


def find_token(tokens: Iterable[Token], secret: str) -> Token | None:
    """Return the token with this secret, or None. Takes the same time for every token."""
    digest, found = _digest(secret), None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token
    return found


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


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
        self._held[_digest(id_)] = (grant, now + SESSION_SECONDS)
        return id_

    def grant(self, id_: str) -> Grant | None:
        """Return the grant of a session, None if there is none with this id."""
        held = self._held.get(_digest(id_))
        return held[0] if held is not None and held[1] > self._clock() else None

    def close(self, id_: str) -> None:
        """End a session, if it is there."""
        self._held.pop(_digest(id_), None)


class TokenGate:
    """ASGI middleware that admits requests with a token, and stores its grant in the request's state.

    `needed` returns the right that a path needs, None for one that any token may see. Without tokens everybody
    may do everything.
    """

    def __init__(self, app: App, *, tokens: Sequence[Token], needed: Callable[[str], Right | None]) -> None:
        self._app = app
        self._tokens = tuple(tokens)
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
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            token = find_token(self._tokens, secret.strip())
            return None if token is None else token.grant
        return self._sessions.grant(_cookie(headers))

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
        token = find_token(self._tokens, form.get("token", [""])[0].strip())
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


_WRONG = "unknown token: use one of PREFS_CONSOLE_TOKENS, as set where the console was started"
_NONE = (
    "the console needs a token here: send `Authorization: Bearer TOKEN`, with one of PREFS_CONSOLE_TOKENS, or open "
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
