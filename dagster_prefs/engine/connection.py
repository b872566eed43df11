"""One way to reach the engine, RisingWave or the embedded one, over the Postgres wire."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import psycopg

from dagster_prefs.errors import PrefsError

if TYPE_CHECKING:
    from dagster_prefs.settings import Settings


class EngineUnavailable(PrefsError):
    """The engine cannot be reached or refuses the connection."""


@dataclass(frozen=True)
class EngineConnection:
    """Where the engine is and who we are there; the password never shows in a repr.

    `passfile` is a password file of libpq, read where `password` is empty; empty means libpq's own default.
    """

    host: str
    port: int
    database: str
    user: str
    password: str = field(default="", repr=False)
    sslmode: str = "prefer"
    schema: str = "public"
    kind: Literal["local", "risingwave"] = "local"
    passfile: str = ""

    @classmethod
    def of(cls, settings: Settings) -> EngineConnection:
        """The connection that the settings describe."""
        return cls(
            host=settings.engine_host,
            port=settings.port,
            database=settings.database,
            user=settings.user,
            password=settings.engine_password.get_secret_value(),
            sslmode=settings.engine_sslmode,
            schema=settings.engine_schema,
            kind=settings.engine,
            passfile=str(settings.engine_passfile or ""),
        )

    def with_database(self, database: str) -> EngineConnection:
        """The same server, another database."""
        return replace(self, database=database)

    def parameters(self) -> dict[str, Any]:
        """libpq's connection parameters."""
        return {
            "host": self.host,
            "port": self.port,
            "dbname": self.database,
            "user": self.user,
            "password": self.password or None,
            "passfile": self.passfile or None,
            "sslmode": self.sslmode,
            "options": f"-c search_path={self.schema}" if self.kind == "local" else None,
            "connect_timeout": 5,
            "application_name": "dagster-prefs",
        }

    def connect(self, *, autocommit: bool = True) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a connection, with the session in UTC; the caller closes it.

        Raises EngineUnavailable naming host, port and what to do.
        """
        given = {name: value for name, value in self.parameters().items() if value is not None}
        try:
            connection = psycopg.connect(
                autocommit=autocommit,
                # RisingWave binds a prepared statement to the relation of then: it would read the old one after a
                # swap, and fail once that is dropped.
                prepare_threshold=None if self.kind == "risingwave" else 5,
                **given,
            )
        except psycopg.OperationalError as error:
            raise self.refusal(str(error)) from None
        connection.execute("set time zone 'UTC'")
        if self.kind == "risingwave":
            # Reads must see this session's own writes, as they do on PostgreSQL.
            connection.execute("set rw_implicit_flush to true")
        if not autocommit:
            connection.commit()
        return connection

    def refusal(self, text: str) -> EngineUnavailable:
        """What a driver's message about a failed connection means: who refused what, and what to do."""
        where = f"{self.host}:{self.port}"
        lowered = text.lower()
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
        # libpq's last line asks whether the server runs, which the remedy says.
        lines = [line.strip() for line in text.splitlines() if line.strip() and "Is the server" not in line]
        reason = lines[-1].rpartition("failed: ")[2] if lines else "no answer"
        return EngineUnavailable(f"the {self.kind} engine at {where} cannot be reached ({reason}): {remedy}")
