"""Connections to the engine, RisingWave or the embedded one, over the Postgres wire."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psycopg

from dagster_prefs.addresses import is_loopback_host
from dagster_prefs.errors import PrefsError

if TYPE_CHECKING:
    from dagster_prefs.settings import Settings


class EngineUnavailable(PrefsError):
    """The engine cannot be reached or refuses the connection."""


# libpq's messages about connections that are not secure, in lower case, and what an operator should do about
# them.
_TRANSPORT = (
    (
        "no space left",
        "the disk of the engine at {where} is full ({reason}): free space on it, and the engine accepts connections "
        "again",
    ),
    (
        "does not support ssl",
        "the engine at {where} does not offer TLS, which PREFS_ENGINE_SSLMODE requires: give RisingWave "
        "RW_SSL_CERT and RW_SSL_KEY, or set PREFS_ENGINE_SSLMODE=disable where the network itself is trusted",
    ),
    (
        "requested a cleartext password",
        "the engine at {where} asks for the password in clear text, which only a server with a verified "
        "certificate gets: set PREFS_ENGINE_SSLMODE=verify-full, or give the user a password that is stored as md5",
    ),
    (
        "server did not complete authentication",
        "the engine at {where} does not ask for the password that PREFS_ENGINE_PASSWORD sets: check that it is the "
        "right engine, or unset the password",
    ),
    (
        "certificate",
        "the TLS certificate of the engine at {where} is not accepted ({reason}): point PGSSLROOTCERT to its "
        "authority's file, or set it to system",
    ),
)


def on_this_machine(host: str) -> bool:
    """Return whether libpq's `host` is on this machine: loopback, or the folder of a unix socket."""
    names = [name.strip() for name in host.split(",")]
    return all(name == "" or name[0] in "/@" or is_loopback_host(name) for name in names)


@dataclass(frozen=True)
class EngineConfiguration:
    """The engine's address and the platform's login; its repr never shows the password.

    `sslmode` is libpq's; empty means TLS is required unless the engine is on this machine. libpq's `allow`
    and `prefer` continue without encryption when the server, or an attacker in between, claims to have no
    TLS: they are rejected for other machines. `passfile` is a libpq password file, read if `password` is
    empty; empty means libpq's default.
    """

    host: str
    port: int
    database: str
    user: str
    password: str = field(default="", repr=False)
    sslmode: str = ""
    schema: str = "public"
    kind: Literal["local", "risingwave"] = "local"
    passfile: str = ""

    def __post_init__(self) -> None:
        if self.sslmode in ("allow", "prefer") and not on_this_machine(self.host):
            raise EngineUnavailable(
                f"sslmode {self.sslmode} would send the password in clear text to an engine at {self.host} that "
                "offers no TLS: choose require or verify-full, or disable where the network itself is trusted"
            )

    @classmethod
    def of(cls, settings: Settings) -> EngineConfiguration:
        """Build the configuration from the settings."""
        return cls(
            host=settings.engine_host,
            port=settings.port,
            database=settings.database,
            user=settings.user,
            password=settings.engine_password.get_secret_value(),
            sslmode=settings.engine_sslmode or "",
            schema=settings.engine_schema,
            kind=settings.engine,
            passfile=str(settings.engine_passfile or ""),
        )

    def with_database(self, database: str) -> EngineConfiguration:
        """Return the configuration for another database on the same server."""
        return replace(self, database=database)

    @property
    def password_file(self) -> str | None:
        """`passfile` if the file exists, else libpq's default, which PGPASSFILE may name.

        The first start of the embedded engine creates the file, possibly after this object was created.
        """
        return self.passfile if self.passfile and Path(self.passfile).exists() else None

    @property
    def require_auth(self) -> str | None:
        """libpq's `require_auth`: the permitted ways for the server to request the password, None for any.

        RisingWave requests ordinary passwords by md5, and those of OAuth and LDAP in clear text. A clear text password
        is only sent to a server whose certificate is verified: with `require`, an attacker in between can pose as the
        server. A server that requests no password is not the expected one.
        """
        if not self.password or on_this_machine(self.host):
            return None
        return "scram-sha-256,md5" + (",password" if self.sslmode in ("verify-ca", "verify-full") else "")

    def parameters(self) -> dict[str, Any]:
        """libpq's connection parameters."""
        return {
            "host": self.host,
            "port": self.port,
            "dbname": self.database,
            "user": self.user,
            "password": self.password or None,
            "passfile": self.password_file,
            "sslmode": self.sslmode or ("prefer" if on_this_machine(self.host) else "require"),
            "require_auth": self.require_auth,
            "options": f"-c search_path={self.schema}" if self.kind == "local" else None,
            "connect_timeout": 5,
            "application_name": "dagster-prefs",
        }

    def connect(self, *, autocommit: bool = True) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a connection with the session in UTC; the caller closes it.

        Raises EngineUnavailable naming host, port and the remedy.
        """
        given = {name: value for name, value in self.parameters().items() if value is not None}
        try:
            connection = psycopg.connect(
                autocommit=autocommit,
                # RisingWave resolves a prepared statement's relations at prepare time, so it would keep
                # reading the old relation after a swap, and fail once that is dropped.
                prepare_threshold=None if self.kind == "risingwave" else 5,
                **given,
            )
        except psycopg.OperationalError as error:
            raise self.refusal(str(error)) from None
        connection.execute("set time zone 'UTC'")
        if self.kind == "risingwave":
            # Reads must see this session's own writes, as they do on PostgreSQL.
            try:
                connection.execute("set rw_implicit_flush to true")
            except psycopg.errors.UndefinedObject:
                connection.close()
                raise EngineUnavailable(
                    f"the engine at {self.host}:{self.port} is not RisingWave: check PREFS_ENGINE_HOST and "
                    "PREFS_ENGINE_PORT, or set PREFS_ENGINE=local"
                ) from None
        if not autocommit:
            connection.commit()
        return connection

    def refusal(self, text: str) -> EngineUnavailable:
        """Translate a driver's message about a failed connection: what failed and the remedy."""
        where = f"{self.host}:{self.port}"
        lowered = text.lower()
        # libpq's last line asks whether the server is running, which the remedy already says.
        lines = [line.strip() for line in text.splitlines() if line.strip() and "Is the server" not in line]
        reason = lines[-1].rpartition("failed: ")[2] if lines else "no answer"
        for said, meant in _TRANSPORT:
            if said in lowered:
                return EngineUnavailable(meant.format(where=where, reason=reason))
        if "password" in lowered or "authentication" in lowered:
            if self.kind == "local":
                return EngineUnavailable(
                    f"the embedded engine at {where} refused user {self.user}: its password lies in the data folder "
                    "that it was started with; set PREFS_DATA_DIR to that folder, or PREFS_ENGINE_PORT to your own"
                )
            return EngineUnavailable(
                f"the engine at {where} refused user {self.user}: check PREFS_ENGINE_USER and PREFS_ENGINE_PASSWORD"
            )
        if "does not exist" in lowered or "not found" in lowered:
            return EngineUnavailable(
                f"the engine at {where} has no database {self.database}: create it or set PREFS_ENGINE_DATABASE"
            )
        remedy = "run `prefs up`" if self.kind == "local" else "check PREFS_ENGINE_HOST and PREFS_ENGINE_PORT"
        return EngineUnavailable(f"the {self.kind} engine at {where} cannot be reached ({reason}): {remedy}")
