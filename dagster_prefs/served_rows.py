"""One row of the served log: what a client answered for one domain of one id, as a line of JSON.

The clients write such rows (serving/served_log.py), and skew reports read them (training/skew.py). Decimals are texts
of digits, because a JSON number would become a double in most readers.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any

from dagster_prefs.declarations.contract import Attribute, Domain
from dagster_prefs.errors import PrefsError, excerpt

# The end of the name of a file that is still written; its last line may be incomplete.
GROWING = ".open"
_DIGITS = Context(prec=60)
# The states of a domain's read, as in serving/profiles.py.
STATES = ("found", "cold_start", "failed")


class BadRow(PrefsError):
    """A line is no row of the served log, or its values are not those of the contract."""


class LogUnreadable(PrefsError):
    """The served log cannot be read."""


@dataclass(frozen=True, slots=True)
class ServedRow:
    """What was served for one domain of one id.

    `row_id` differs for every row, so that a row delivered twice can be recognized. `key` is the id as one text
    (`Table.key_text`). `served_at` is the reader's clock when the answer was complete, and `read_seconds` how long the
    read took: the item was read between both. `state` is `found`, `cold_start` or `failed`; `error` is the kind of the
    error, None without one: with cold-start values it was a fallback. `attributes` are None if no value was served.
    `unknown` are those that the item lacked. `partial` says whether another domain of the same answer is missing, and
    `consistent` whether the read was strongly consistent. `request_id` and `variant` are the caller's.
    """

    row_id: str
    served_at: datetime
    read_seconds: float
    entity: str
    key: str
    domain: str
    contract_version: int
    state: str
    error: str | None
    attributes: Mapping[str, Any] | None
    last_event_at: int | None
    unknown: tuple[str, ...]
    partial: bool
    consistent: bool
    request_id: str | None
    variant: str | None

    def as_json(self) -> bytes:
        """Return the row as one line of JSON, without its end."""
        content = {name: getattr(self, name) for name in _FIELDS}
        content["served_at"] = self.served_at.astimezone(UTC).isoformat(timespec="microseconds")
        return json.dumps(content, default=_digits, ensure_ascii=False, separators=(",", ":")).encode()


_FIELDS = tuple(ServedRow.__slots__)


def parse_row(line: bytes) -> ServedRow:
    """Parse a line of the served log; attributes are as JSON has them. Raises BadRow with the reason."""
    try:
        content = json.loads(line)
        row = ServedRow(
            **{
                **{name: content[name] for name in _FIELDS},
                "served_at": datetime.fromisoformat(content["served_at"]),
                "unknown": tuple(content["unknown"]),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadRow(
            f"{excerpt(line[:200].decode(errors='replace'))} is no row of the served log: {error}"
        ) from None
    if row.served_at.tzinfo is None or row.state not in STATES:
        raise BadRow(
            f"row {excerpt(row.row_id)}: served_at needs a zone, and state is one of {', '.join(STATES)}"
        )
    return row


def log_files(place: Path) -> list[Path]:
    """Return the files of the served log in a folder and below, in the order of their names; a file is itself.

    They are lines of JSON: `.jsonl`, `.jsonl.gz`, and `.jsonl.open` while they are written.
    """
    return sorted(path for path in place.rglob("*.jsonl*") if path.is_file()) if place.is_dir() else [place]


def log_name(place: Path, file: Path) -> str:
    """Return the name of a file below its place, without the endings that come and go (`.open`, `.gz`)."""
    name = file.name if file == place else file.relative_to(place).as_posix()
    return name.removesuffix(GROWING).removesuffix(".gz")


def read_log(places: Iterable[Path], *, since: datetime | None = None) -> Iterator[ServedRow]:
    """Yield the rows of files of the served log, or of all such files in folders; those served since then, if given.

    Raises LogUnreadable naming the file and line.
    """
    for place in places:
        files = log_files(place)
        if not files:
            raise LogUnreadable(f"{place} has no file of the served log (*.jsonl): name another folder")
        for file in files:
            # A file is written after its rows were served: an older one has none that are wanted.
            if since is not None and _changed_before(file, since):
                continue
            for _, row in read_lines(file):
                if since is None or row.served_at >= since:
                    yield row


def _changed_before(file: Path, moment: datetime) -> bool:
    try:
        return file.stat().st_mtime < moment.timestamp()
    except OSError:
        # Its reading says why.
        return False


def read_lines(file: Path) -> Iterator[tuple[bytes, ServedRow]]:
    """Yield each line of a file of the served log, with its row. Raises LogUnreadable naming the file and line."""
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n") and file.suffix == GROWING:
                    return
                try:
                    row = parse_row(line)
                except BadRow as error:
                    raise LogUnreadable(f"{file}, line {number}: {error}") from None
                yield line, row
    except OSError as error:
        raise LogUnreadable(
            f"{file} cannot be read ({error.strerror or error}): name another file"
        ) from error


def _opened(file: Path) -> IO[bytes] | gzip.GzipFile:
    if file.suffix == ".gz":
        return gzip.open(file)
    try:
        return file.open("rb")
    except FileNotFoundError:
        # It was finished, and got its final name, since it was listed.
        if file.suffix == GROWING and (finished := file.with_suffix("")).exists():
            return finished.open("rb")
        raise


def with_places(value: Decimal, places: int) -> Decimal:
    """Return a decimal with so many places, rounded half up. Raises InvalidOperation beyond 60 digits."""
    return value.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP, _DIGITS)


def row_values(row: ServedRow, domain: Domain) -> dict[str, Any] | None:
    """Return a row's values by attribute, in the contract's Python types; None if none was served.

    Attributes that the row or the contract lacks are left out, because the row is of another version. Raises BadRow
    naming the attribute whose value has another type.
    """
    if row.attributes is None:
        return None
    found = {}
    for name, value in row.attributes.items():
        attribute = domain.attributes.get(name)
        if attribute is not None:
            try:
                found[name] = _value(attribute, value)
            except (TypeError, ValueError, InvalidOperation):
                raise BadRow(
                    f"row {row.row_id}: {domain.name}.{name} is {excerpt(value)}, which is no {attribute.type}"
                ) from None
    return found


def _value(attribute: Attribute, value: Any) -> Any:
    if value is None:
        return None
    if attribute.is_list:
        if not isinstance(value, list):
            raise TypeError(value)
        element = _PYTHON[attribute.type.removeprefix("list<").removesuffix(">")]
        return [None if one is None else element(one) for one in value]
    return _PYTHON[attribute.type](value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(value)


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TypeError(value)


_PYTHON: Mapping[str, Any] = {
    "integer": _whole,
    "decimal": lambda value: Decimal(_text(value)),
    "float": float,
    "string": _text,
}


def _digits(value: Any) -> str:
    if isinstance(value, Decimal):
        return format(value, "f")
    raise TypeError(f"{type(value).__name__} has no form in JSON")
