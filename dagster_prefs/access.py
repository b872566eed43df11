"""Bearer tokens with scopes: the one rule of the feature server and the console.

A token is a random secret. The server knows its SHA-256 only, from `PREFS_TOKENS` or the file of `PREFS_TOKENS_FILE`,
one entry a token:

    name:scope+scope:sha256:<64 hex digits>

`prefs token` makes both. Several are valid at a time, so that a new one is handed out before the old one is removed;
the file is read again when it changes. On loopback tokens are optional; elsewhere a server does not start without one.

Imports only the standard library, because every server uses it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import ssl
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.loopback import LOOPBACK_NAMES

log = logging.getLogger(__name__)

# The scopes of a token: read the values of domains, use the shop's profiles and ranking, see the state of the platform
# and its declarations, send events.
Right = Literal["domains", "shop", "inspect", "send"]
RIGHTS: tuple[Right, ...] = get_args(Right)

TOKENS, TOKENS_FILE = "PREFS_TOKENS", "PREFS_TOKENS_FILE"
HASHED = "sha256:"
SECRET_BYTES = 32
# How often the file of tokens is looked at, in seconds.
LOOK_SECONDS = 1.0
# Delay of the answer to a wrong token, in seconds.
REFUSAL_SECONDS = 1.0


class AccessError(PrefsError):
    """A token is malformed or missing, or lacks the scope that a request needs."""


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
            f"token's scopes in {TOKENS}, or use another token"
        )


EVERYTHING = Grant(frozenset(RIGHTS))
# The grant of a request that did not pass the gate.
NOTHING = Grant(frozenset())


@dataclass(frozen=True)
class Token:
    """One token: the SHA-256 of its secret, in hex, and what it grants."""

    grant: Grant
    digest: str = field(repr=False)

    @property
    def entry(self) -> str:
        """The token as PREFS_TOKENS and its file have it."""
        rights = "+".join(right for right in RIGHTS if right in self.grant.rights)
        return f"{self.grant.name}:{rights}:{HASHED}{self.digest}"


def make_token(name: str, rights: Collection[Right]) -> tuple[str, Token]:
    """Return a new secret, and the token whose entry the servers get. Raises AccessError for an unsuitable name."""
    secret = secrets.token_hex(SECRET_BYTES)
    token = Token(Grant(frozenset(rights), name), digest(secret))
    parse_tokens(token.entry, "the new token")
    return secret, token


def digest(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex. A random secret of 32 bytes needs no salt and no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def parse_tokens(text: str, source: str = TOKENS) -> tuple[Token, ...]:
    """Parse entries separated by commas or lines; a line that begins with `#` is a comment.

    Raises AccessError naming the token (never its secret), the rule and the remedy.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Token] = {}
    for number, entry in enumerate(filter(None, (part.strip() for part in ",".join(lines).split(","))), 1):
        name, _, rest = entry.partition(":")
        rights, _, hashed = rest.partition(":")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,40}", name) or not hashed:
            raise AccessError(
                f"token {number} of {source} is not name:scope+scope:{HASHED}…, with letters, digits, `.`, `_` and `-` "
                "in its name: write the entry that `prefs token` prints"
            )
        if name in found:
            raise AccessError(f"{source} has two tokens {name}: rename one of them")
        known = _rights(name, rights, source)
        value = hashed.removeprefix(HASHED).lower()
        if not hashed.startswith(HASHED) or not re.fullmatch(r"[0-9a-f]{64}", value):
            raise AccessError(
                f"token {name} of {source} is not {HASHED} and 64 hex digits: write the hash that `prefs token` "
                "prints, not the secret"
            )
        found[name] = Token(Grant(known, name), value)
    return tuple(found.values())


def _rights(token: str, text: str, source: str) -> frozenset[Right]:
    given = [one.strip() for one in text.split("+")]
    if unknown := [one for one in given if one not in RIGHTS]:
        raise AccessError(
            f"token {token} of {source} has the scope {excerpt(unknown[0])}: use {', '.join(RIGHTS)}, joined by +"
        )
    return frozenset(right for right in RIGHTS if right in given)


def find_token(tokens: Iterable[Token], secret: str) -> Token | None:
    """Return the token with this secret, or None. Takes the same time for every token."""
    wanted, found = digest(secret), None
    for token in tokens:
        if hmac.compare_digest(token.digest, wanted):
            found = token
    return found


class Tokens:
    """The tokens of a server, from the environment and a file; the file is read again when it changes.

    A changed file that is malformed or gone is logged, and the tokens before it stay valid. Raises AccessError if what
    is there at the start is malformed.
    """

    def __init__(self, text: str = "", file: Path | None = None) -> None:
        self._given = parse_tokens(text)
        self._file = file
        self._state = self._stat()
        self._all = self._read()
        self._looked_at = time.monotonic()
        self._problem = ""

    def __bool__(self) -> bool:
        """Whether requests need a token."""
        return self._file is not None or bool(self._all)

    def all(self) -> tuple[Token, ...]:
        """Return the tokens that are valid now."""
        if self._file is not None and time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._looked_at = time.monotonic()
            try:
                if (state := self._stat()) != self._state:
                    self._all = self._read()
                    self._state = state
                    log.info("read %d tokens from %s", len(self._all), self._file)
                self._problem = ""
            except AccessError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    log.error("%s; the tokens before it stay valid", error)
        return self._all

    def bearer(self, authorization: str) -> Grant | None:
        """Return what the token in an Authorization header grants; None without a valid one."""
        kind, _, secret = authorization.partition(" ")
        token = find_token(self.all(), secret.strip()) if kind.lower() == "bearer" else None
        return None if token is None else token.grant

    def _stat(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            found = os.stat(self._file)
        except OSError as error:
            raise AccessError(
                f"{TOKENS_FILE}={self._file} cannot be read ({error.strerror}): write it with `prefs token --file`"
            ) from None
        if found.st_mode & 0o022:
            raise AccessError(
                f"{TOKENS_FILE}={self._file} can be written by others, who could add a token: run `chmod go-w` on it"
            )
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[Token, ...]:
        if self._file is None:
            return self._given
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AccessError(
                f"{TOKENS_FILE}={self._file} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}): "
                "write it with `prefs token --file`"
            ) from None
        given = ",".join(token.entry for token in self._given)
        return parse_tokens(f"{given}\n{text}", str(self._file))


@dataclass(frozen=True)
class Entrance:
    """How a server lets clients in: by which tokens, and with which certificate and key (files in PEM)."""

    tokens: Tokens = field(default_factory=Tokens)
    certificate: Path | None = None
    key: Path | None = None

    @property
    def scheme(self) -> str:
        """The scheme of the server's addresses."""
        return "http" if self.certificate is None else "https"

    def check(self, host: str, what: str) -> None:
        """Check the entrance of a server at an address; `what` is its name in messages.

        Raises AccessError off loopback without tokens, and for a certificate and key that cannot be used.
        """
        if not self.tokens and not is_loopback_address(host):
            raise AccessError(
                f"--host {host} is not loopback, where everybody on the network could use {what}: make a token with "
                f"`prefs token`, and give {TOKENS} or {TOKENS_FILE} its entry"
            )
        if self.certificate is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                    self.certificate, self.key, password=_no_password
                )
            except (OSError, AccessError) as error:
                reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
                raise AccessError(
                    f"the certificate {self.certificate} and the key {self.key} cannot be used ({reason}): set "
                    "PREFS_TLS_CERTIFICATE and PREFS_TLS_KEY to files in PEM that belong together, the key without a "
                    "passphrase"
                ) from None


def is_loopback_address(host: str) -> bool:
    """Return whether a server at this address is reached from this machine only."""
    return host in LOOPBACK_NAMES or host == "::1" or host.startswith("127.")


def _no_password() -> str:
    # Otherwise OpenSSL would ask for it on the terminal.
    raise AccessError("the key has a passphrase")
