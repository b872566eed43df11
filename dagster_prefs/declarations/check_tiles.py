"""Check the tiles of a project."""

from __future__ import annotations

from dataclasses import dataclass

from dagster_prefs.declarations.check_drift import Drift, check_column_drift, check_rows_drift
from dagster_prefs.declarations.findings import EXAMPLES, NAME, Findings, did_you_mean, is_whole, plain
from dagster_prefs.declarations.names import STATISTICS_TABLE
from dagster_prefs.declarations.personal import PII
from dagster_prefs.declarations.read import ModelYaml, as_map
from dagster_prefs.declarations.registry import Entity, TileColumn, TileDeclaration

LAST_EVENT_AT = "last_event_at"
# Types that training tables support (ICEBERG_TYPES in iceberg/tables.py; a test compares the two).
TILE_TYPES = ("bigint", "date", "decimal", "text", "timestamptz")
TILE_KEYS = ("entity", "day", "table", "metric", "at_most", "sink", "drift")
TILE_META = ("min", "max_bytes", PII, "drift")


@dataclass(frozen=True)
class Tile:
    """A tile with the parts that only its SQL needs: `unique` are its unique index's columns in order."""

    declared: TileDeclaration
    file: str
    unique: tuple[str, ...]


def check_tile(findings: Findings, model: ModelYaml) -> Tile | None:
    """Return the tile that a model's YAML declares; None, with its problems noted, if it is invalid."""
    given, example = as_map(model.meta["tile"], model.line), EXAMPLES["tile"]
    before = len(findings.problems)
    findings.known(model.file, given, TILE_KEYS, f"{model.name}: meta.tile", example)
    if "day" not in given:
        findings.say(model.file, given.line, f"{model.name}: a tile without a day", example)
    findings.needs_sql(model, "tile")
    day = findings.column(model, given, "day", ("date",), example) if "day" in given else None
    entity = findings.entity(model, given, "tile")
    if entity:
        findings.keys(model, entity, entity.keys)
    drift: dict[str, Drift] = {}
    for column in model.columns.values():
        drift[column.name] = check_column_drift(
            findings, model, column.name, is_key=entity is not None and column.name in entity.key_names
        )
        if column.type not in TILE_TYPES:
            findings.say(
                model.file,
                column.line,
                f"{model.name}.{column.name} is {column.type or 'of no data_type'}, which a training table "
                f"in Iceberg cannot store: use one of {', '.join(TILE_TYPES)}",
                f"- {{ name: {column.name}, data_type: bigint }}",
            )
        findings.known(
            model.file,
            column.meta,
            TILE_META,
            f"{model.name}.{column.name}: meta",
            "config: { meta: { min: 0 } }",
        )
        if "min" in column.meta and (
            not is_whole(column.meta["min"]) or column.type not in ("bigint", "decimal")
        ):
            findings.say(
                model.file,
                column.meta.at("min"),
                f"{model.name}.{column.name}: min must be a whole number, of a bigint or decimal "
                f"column, not {column.meta['min']!r}",
                "config: { meta: { min: 0 } }",
            )
    newest = model.columns.get(LAST_EVENT_AT)
    if newest is None or newest.type != "timestamptz":
        findings.say(
            model.file,
            newest.line if newest else model.content.at("columns"),
            f"{model.name}: a tile needs {LAST_EVENT_AT}, the time of the day's newest event",
            f"- {{ name: {LAST_EVENT_AT}, data_type: timestamptz }}",
        )
    unique: list[str] = []
    if entity and day:
        names = [key.name for key in entity.keys]
        unique = next((one for one in model.unique_keys if {*names, day} <= set(one)), [])
        if not unique:
            findings.say(
                model.file,
                model.config.at("indexes"),
                f"{model.name}: a tile needs a unique index on its entity's keys and its day, "
                "and on every further column that distinguishes its rows",
                f"indexes: [{{ columns: [{', '.join([*names, day])}], unique: true }}]",
            )
        for name in unique:
            if name not in model.columns:
                findings.say(
                    model.file,
                    model.config.at("indexes"),
                    f"{model.name}: the unique index has {name!r}, which is not one of its columns"
                    f"{did_you_mean(name, model.columns)}",
                    f"indexes: [{{ columns: [{', '.join([*names, day])}], unique: true }}]",
                )
    numbers = [
        column.name
        for column in model.columns.values()
        if column.type in ("bigint", "decimal") and column.name not in unique
    ]
    metric = given.get("metric", numbers)
    if not isinstance(metric, list) or not metric or not all(name in numbers for name in metric):
        findings.say(
            model.file,
            given.at("metric"),
            f"{model.name}: metric must be a list of columns of numbers (here "
            f"{', '.join(numbers) or 'none'}), not {plain(metric)!r}",
            f"metric: [{numbers[0] if numbers else 'views'}]",
        )
    at_most = given.get("at_most", [])
    if not isinstance(at_most, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(name in numbers for name in pair)
        for pair in at_most
    ):
        findings.say(
            model.file,
            given.at("at_most"),
            f"{model.name}: at_most must be a list of pairs of columns of numbers, the smaller one "
            f"first, not {plain(at_most)!r}",
            "at_most: [[completions, views]]",
        )
    table = given.get("table", f"{model.name.removesuffix('_1d')}_daily")
    if not NAME.fullmatch(str(table)):
        findings.say(
            model.file,
            given.at("table"),
            f"{model.name}: {table!r} is not a table name in lower case",
            f"table: {model.name}",
        )
    if table == STATISTICS_TABLE:
        findings.say(
            model.file,
            given.at("table"),
            f"{model.name}: {table} is the platform's table of statistics: use another name",
            f"table: {model.name}",
        )
    rows_drift = check_rows_drift(findings, model, given)
    sink = str(given.get("sink", _training_sink(str(table), entity)))
    findings.claim(sink, f"{model.file}:{given.at('sink')}")
    if len(findings.problems) > before or not entity or not day:
        return None
    keys = {key.name: key for key in entity.keys}
    return Tile(
        declared=TileDeclaration(
            relation=model.name,
            table=str(table),
            description=model.description,
            entity=entity.name,
            day=day,
            key=(*keys, *(name for name in unique if name != day and name not in keys)),
            columns={
                column.name: TileColumn(
                    column.type,
                    column.description,
                    # The exported ids are never below 0, because those are reserved for canaries, which are
                    # not exported.
                    column.meta.get(
                        "min", 0 if column.name in keys and keys[column.name].type == "bigint" else None
                    ),
                    drift[column.name],
                )
                for column in model.columns.values()
            },
            metric=tuple(metric),
            at_most=tuple((low, high) for low, high in at_most),
            sink=sink,
            drift=rows_drift,
        ),
        file=model.file,
        unique=tuple(unique),
    )


def _training_sink(table: str, entity: Entity | None) -> str:
    short = table.removesuffix("_daily")
    return f"sink_training_{short.removeprefix(f'{entity.name}_') if entity else short}"
