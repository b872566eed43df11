"""Statistics of the values of an attribute: what is kept of them.

No value that may name somebody is kept: of a personal attribute (a key, or one declared as `pii`) only numbers of rows,
and a text only where at least MIN_SUBJECTS subjects have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date, datetime
from typing import Any, Literal

# What an attribute's values are: `personal` ones are only counted, `list` means the lengths of lists.
Kind = Literal["number", "text", "time", "list", "personal"]
Source = Literal["tile", "view"]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# A text that fewer subjects have in common could name one of them.
MIN_SUBJECTS = 10
# The most frequent values of a text that are kept.
MOST_VALUES = 50

# Upper bounds of the buckets in which numbers are counted. Whole numbers up to 20 have a bucket each, as has 0; larger
# ones share a bucket with those at most a tenth larger, up to a thousand million. What is rarer is coarser.
BOUNDS: tuple[float, ...] = (
    *(-1e-6 * 2.0**step for step in reversed(range(70))),
    0.0,
    *(1e-6 * 1.5**step for step in range(35)),
    *(float(number) for number in range(1, 20)),
    *(20 * 1.1**step for step in range(187)),
    *(20 * 1.1**186 * 1.5**step for step in range(1, 35)),
)


@dataclass(frozen=True)
class Statistics:
    """The values of one attribute of a relation on one UTC day.

    A tile has them of the day's rows, a rolling view of the rows that it had on that day. `rows` is the number of the
    relation's rows, of which `sampled` were read. `distinct` is estimated. `minimum`, `maximum`, `mean` and `quantiles`
    (at QUANTILES) are numbers: of a time seconds since 1970, of a list its length; None and empty without a value.
    `values` are the most frequent texts with their rows, most frequent first. `buckets` are the rows by upper bound
    (BOUNDS, and infinity). `version` identifies the rows that were described.
    """

    source: Source
    relation: str
    day: date
    attribute: str
    kind: Kind
    rows: int
    sampled: int
    nulls: int
    distinct: int
    version: str
    measured_at: datetime
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    quantiles: tuple[float, ...] = ()
    values: tuple[tuple[str, int], ...] = ()
    buckets: tuple[tuple[float, int], ...] = ()

    @property
    def null_share(self) -> float:
        """The share of rows without a value, 0 to 1."""
        return self.nulls / self.sampled if self.sampled else 0.0

    @property
    def known(self) -> int:
        """The number of rows that were read and have a value."""
        return self.sampled - self.nulls

    @property
    def quantiles_by_share(self) -> dict[float, float]:
        """Share of the values at most as large → quantile; empty without numbers."""
        return dict(zip(QUANTILES, self.quantiles, strict=True)) if self.quantiles else {}

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics as plain values, for JSON: without the buckets, quantiles by their share."""
        found = {name: value for name, value in asdict(self).items() if name not in ("buckets", "version")}
        return {
            **found,
            "day": self.day.isoformat(),
            "measured_at": self.measured_at.isoformat(),
            "null_share": self.null_share,
            "quantiles": {str(share): value for share, value in self.quantiles_by_share.items()},
            "values": [{"value": value, "rows": rows} for value, rows in self.values],
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Statistics:
        """Return what `as_dict` told, without buckets and version. Raises KeyError, TypeError or ValueError."""
        known = {name: value for name, value in told.items() if name != "null_share"}
        return cls(
            **{
                **known,
                "day": date.fromisoformat(told["day"]),
                "measured_at": datetime.fromisoformat(told["measured_at"]),
                "quantiles": tuple(told["quantiles"].values()),
                "values": tuple((one["value"], one["rows"]) for one in told["values"]),
                "version": "",
            }
        )
