"""Skew of a served domain as a measure: what of the served log is wrong, or was later than the domain promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from dagster_prefs.freshness.levels import Level, Measure
from dagster_prefs.training.skew import CAUSES, SkewReport

# How far back the daily check compares: each row has a day to get into the lake, and is then compared at least once.
COMPARED = timedelta(days=2)
# Shares of values that were later than the freshness target.
BEYOND_WARN, BEYOND_ERROR = 0.001, 0.01


@dataclass(frozen=True)
class DomainSkew:
    """The comparison of one domain: values compared, and differences by cause and attribute.

    `rows` are those of the whole log, `all_compared` the values of all its domains that were compared, and `refused`
    the rows that could not be, by reason.
    """

    domain: str
    rows: int
    all_compared: int
    compared: int
    causes: Mapping[str, int]
    wrong: Mapping[str, int]
    refused: Mapping[str, int]

    @classmethod
    def of(cls, report: SkewReport, domain: str) -> DomainSkew:
        """Return a domain's part of a report."""
        found = [one for one in report.attributes.values() if one.domain == domain]
        return cls(
            domain,
            report.rows,
            report.compared,
            sum(one.compared for one in found),
            {cause: sum(one.causes[cause] for one in found) for cause in CAUSES},
            {one.attribute: one.causes["wrong"] for one in found if one.causes["wrong"]},
            dict(report.refused),
        )


def measure_skew_of(found: DomainSkew) -> Measure:
    """Return the measure of a domain's comparison: one wrong value is an error.

    The log is the only witness of reads, so that a log without rows shows that nobody reads, or that it has stopped:
    that is a warning. A domain that is in no row, while others are, is not read, and is skipped.
    """
    level, reason = _judged(found)
    values: dict[str, int | float] = {"compared": found.compared, **found.causes}
    return Measure("skew", found.domain, level, reason, values=values)


def _judged(found: DomainSkew) -> tuple[Level, str]:
    if found.wrong:
        wrong = ", ".join(f"{name} in {number:,}" for name, number in found.wrong.items())
        return "error", f"of {found.compared:,} logged values are wrong: {wrong}: see `prefs skew --json`"
    if not found.rows:
        return "warn", (
            f"the served log has no row of the last {COMPARED.days} days: nobody reads, or nothing is logged any more; "
            "see the folder of PREFS_SERVED_LOG and `prefs_server_log_dropped_total`"
        )
    if not found.all_compared and found.refused:
        reason = max(found.refused, key=lambda one: found.refused[one])
        return "warn", f"no logged value could be compared ({found.refused[reason]:,} rows: {reason})"
    if not found.compared:
        return "skipped", "nobody read this domain"
    beyond = found.causes["beyond the target"] / found.compared
    if beyond >= BEYOND_WARN:
        return "error" if beyond >= BEYOND_ERROR else "warn", (
            f"{beyond:.2%} of {found.compared:,} logged values were later than the freshness target: see `prefs "
            "status` and the canary"
        )
    return "ok", f"{found.compared:,} logged values are equal or explained"
