"""Check when a tile's values count as drifted: `meta.tile.drift` and `meta.drift` of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from dagster_prefs.declarations.findings import Findings, is_whole, plain
from dagster_prefs.declarations.personal import PII
from dagster_prefs.declarations.read import Map, ModelYaml

Drift = Mapping[str, Any] | Literal[False] | None

JUDGED = ("bigint", "decimal", "text")
TILE_DRIFT_KEYS = ("rows", "min_rows")
COLUMN_DRIFT_KEYS = ("psi", "ks")
TILE_EXAMPLE = "drift: { rows: { warn: 2, error: 4 }, min_rows: 100 }"
COLUMN_EXAMPLE = "config: { meta: { drift: { psi: { warn: 0.1, error: 0.25 } } } }"


def check_rows_drift(findings: Findings, model: ModelYaml, given: Map) -> Drift:
    """Return the `drift` of a tile's meta: limits of its rows, False where it is not judged, None by default."""
    drift = _mapping_or_false(findings, model.file, given, f"{model.name}: drift", TILE_EXAMPLE)
    if not isinstance(drift, Map):
        return cast(Drift, drift)
    place = f"{model.name}: drift"
    findings.known(model.file, drift, TILE_DRIFT_KEYS, place, TILE_EXAMPLE)
    if "rows" in drift:
        _limits(findings, model.file, drift, "rows", (1, None), place, TILE_EXAMPLE)
    if "min_rows" in drift and (not is_whole(drift["min_rows"]) or drift["min_rows"] < 1):
        findings.say(
            model.file,
            drift.at("min_rows"),
            f"{place}: min_rows must be a whole number of at least 1, not {plain(drift['min_rows'])!r}",
            TILE_EXAMPLE,
        )
    return cast(Drift, plain(drift))


def check_column_drift(findings: Findings, model: ModelYaml, name: str, *, is_key: bool) -> Drift:
    """Return the `drift` of a column's meta: limits, False where it is not judged, None by default."""
    meta, kind = model.columns[name].meta, model.columns[name].type
    is_personal = is_key or meta.get(PII) is True
    place = f"{model.name}.{name}: drift"
    drift = _mapping_or_false(findings, model.file, meta, place, COLUMN_EXAMPLE)
    if not isinstance(drift, Map):
        return cast(Drift, drift)
    findings.known(model.file, drift, COLUMN_DRIFT_KEYS, place, COLUMN_EXAMPLE)
    if kind not in JUDGED or is_personal:
        what = "personal" if is_personal else f"a {kind}" if kind else "of no data_type"
        findings.say(
            model.file,
            meta.at("drift"),
            f"{place}: the column is {what}, and only numbers and texts that are not personal are judged: remove it",
            "drift: false",
        )
    for limit in COLUMN_DRIFT_KEYS:
        if limit in drift:
            most = None if limit == "psi" else 1
            _limits(findings, model.file, drift, limit, (0, most), place, COLUMN_EXAMPLE)
    if "ks" in drift and kind == "text":
        findings.say(
            model.file,
            drift.at("ks"),
            f"{place}: ks compares numbers, and this column is text: use psi",
            COLUMN_EXAMPLE,
        )
    return cast(Drift, plain(drift))


def _mapping_or_false(findings: Findings, file: str, given: Map, place: str, example: str) -> Any:
    drift = given.get("drift")
    if drift is None or drift is False or isinstance(drift, Map):
        return drift
    findings.say(
        file,
        given.at("drift"),
        f"{place} must be a mapping of limits, or false where nothing is to be judged, not {plain(drift)!r}",
        example,
    )
    return None


def _limits(
    findings: Findings,
    file: str,
    drift: Map,
    name: str,
    between: tuple[float, float | None],
    place: str,
    example: str,
) -> None:
    """Note a problem unless `name` of the mapping is {warn, error}, ascending, above the first bound."""
    low, high = between
    value = drift[name]
    given = [value.get(level) for level in ("warn", "error")] if isinstance(value, Map) else []
    numbers = [one for one in given if isinstance(one, int | float) and not isinstance(one, bool)]
    if (
        not isinstance(value, Map)
        or set(value) != {"warn", "error"}
        or len(numbers) != 2
        or not low < numbers[0] <= numbers[1]
        or (high is not None and numbers[1] > high)
    ):
        range_ = f"above {low}" + (f", at most {high}" if high is not None else "")
        findings.say(
            file,
            drift.at(name),
            f"{place}: {name} must be two numbers {range_}, warn not above error, not {plain(value)!r}",
            example,
        )
