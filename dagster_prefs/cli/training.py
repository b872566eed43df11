"""Commands for training data, and for the erasure of a subject."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dagster_prefs.cli.root import cli, console, plain_console, print_json, say, table_of
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster_prefs.erasure.erase import Stores
    from dagster_prefs.erasure.events import Subject
    from dagster_prefs.platform import Platform
    from dagster_prefs.training.training_set import Meaning


@cli.group("training-set", invoke_without_command=True)
@click.option("--labels", help="Parquet or CSV file, or Iceberg table: the entity's key, label_time, …")
@click.option("--entity", help="Entity of the labels, if several entities have features.")
@click.option(
    "--output",
    help="Parquet or CSV file, or Iceberg table, to write; by default <labels>.training.parquet.",
)
@click.option("--manifest", type=click.Path(path_type=Path), help="By default <output>.manifest.json.")
@click.option("--tag", help="Tag the tile snapshots, so that the set stays reproducible.")
@click.option("--timezone", help="Zone of label times that have none, e.g. UTC.")
@click.option("--types", help="Types of CSV columns that are not text, e.g. bought=bool,price=decimal(18,2).")
@click.option("--keep-formulas", is_flag=True, help="In CSV, write texts like =1+1 as they stand.")
@click.option(
    "--as",
    "meaning",
    type=click.Choice(["yesterday", "served", "happened"]),
    default="yesterday",
    show_default=True,
    help="What a value promises: the days before the label's; what a read at its time returned; or the same from all "
    "events that had happened.",
)
@click.option("--as-known", is_flag=True, help="Never use a tile version written after the label's time.")
@click.option(
    "--from-log",
    is_flag=True,
    help="Instead of --as: what the served log has of the label's request_id, or of the last read before the label.",
)
@click.option(
    "--log",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File or folder of the served log for --from-log, by default the folder of PREFS_SERVED_LOG.",
)
@click.option(
    "--within-seconds",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="How long before a label its read in the log may be, for labels without a request_id.",
)
@click.option("--domain", "domains", multiple=True, help="Only these domains; not with --as yesterday.")
@click.option(
    "--drop-refused",
    is_flag=True,
    help="Leave out labels that cannot have a value of this meaning, and say how many, instead of refusing all.",
)
@click.option(
    "--print-sql",
    type=click.Choice(["trino", "spark", "athena"]),
    help="Only print the join in this engine's SQL, over labels in an Iceberg table.",
)
@click.pass_context
def training_set(
    context: click.Context,
    labels: str | None,
    entity: str | None,
    output: str | None,
    manifest: Path | None,
    tag: str | None,
    timezone: str | None,
    types: str | None,
    keep_formulas: bool,
    meaning: Meaning,
    as_known: bool,
    from_log: bool,
    log: tuple[Path, ...],
    within_seconds: float,
    domains: tuple[str, ...],
    drop_refused: bool,
    print_sql: Literal["trino", "spark", "athena"] | None,
) -> None:
    """Join every label with the features known at its time.

    Writes a manifest, from which the set can be reproduced.
    """
    if context.invoked_subcommand is not None:
        return
    if labels is None:
        raise click.UsageError("--labels is missing: name a Parquet or CSV file, or an Iceberg table")
    if from_log:
        if context.get_parameter_source("meaning") is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--from-log is a meaning of its own: omit --as {meaning}")
        meaning = "logged"
    elif log:
        raise click.UsageError("--log names the log of --from-log: add it, or omit --log")
    from dagster_prefs.platform import Platform
    from dagster_prefs.training.logged import LogSource
    from dagster_prefs.training.served_sql import ServedOptions
    from dagster_prefs.training.training_set import (
        CsvOptions,
        LabelJoin,
        build_training_set,
        check_meaning,
        features_as,
        print_training_sql,
    )

    check_meaning(meaning, as_known=as_known)
    platform = Platform(load_settings())
    features = features_as(platform.registry, entity, meaning, domains or None)
    for name, why in features.left_out.items():
        plain_console(stderr=True).print(f"{name} is left out: {why}")
    namespace = platform.settings.iceberg_namespace
    spreads = platform.spreads() if meaning in ("served", "happened") else {}
    if print_sql is not None:
        printed = print_training_sql(
            platform.catalog(),
            labels,
            print_sql,
            features=features,
            as_known=as_known,
            namespace=namespace,
            served=ServedOptions(meaning, spreads) if meaning in ("served", "happened") else None,
        )
        say(printed)
        return
    made = build_training_set(
        platform.catalog(),
        LabelJoin(
            labels,
            features,
            datetime.now(UTC),
            timezone=timezone,
            as_known=as_known,
            namespace=namespace,
            csv=CsvOptions(column_types(types), keep_formulas),
            meaning=meaning,
            spreads=spreads,
            log=LogSource(served_log_places(platform.settings, log), timedelta(seconds=within_seconds))
            if from_log
            else None,
            drop_refused=drop_refused,
        ),
        output or str(Path(labels).with_suffix(".training.parquet")),
        manifest=manifest,
        tag=tag,
    )
    console.print(
        f"{made.rows:,} rows ({made.cold_start_rows:,} without history) in {made.output}; manifest {made.manifest}"
    )
    for reason, number in made.refused.items():
        plain_console(stderr=True).print(f"{number:,} labels are left out: {reason}")


def served_log_places(settings: Settings, given: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the files or folders of the served log that were given, by default the folder of PREFS_SERVED_LOG.

    Raises PrefsError if none is given and the setting names no folder.
    """
    found = given or settings.served_log_folders
    if not found:
        raise PrefsError(
            "no log is named, and PREFS_SERVED_LOG is not files:<folder>: name a folder of the log"
        )
    return found


def column_types(text: str | None) -> dict[str, str]:
    """Parse `--types`: column=type, separated by commas outside parentheses. Raises UsageError."""
    types = {}
    for part in re.split(r",(?![^()]*\))", text) if text else ():
        name, equals, kind = part.rpartition("=")
        if not equals or not name.strip() or name.strip() in types:
            raise click.UsageError(f"--types takes column=type once for each column, not {part!r}")
        types[name.strip()] = kind.strip()
    return types


@training_set.command("reproduce")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--output",
    help="Parquet or CSV file, or Iceberg table, to write; by default next to the manifest, .reproduced.parquet.",
)
@click.option("--labels", help="New place of the labels, if they moved.")
@click.option(
    "--log",
    multiple=True,
    type=click.Path(path_type=Path),
    help="New place of the served log of a set --from-log, if it moved.",
)
@click.option("--keep-formulas", is_flag=True, help="In CSV, write texts like =1+1 as they stand.")
def training_set_reproduce(
    manifest: Path, output: str | None, labels: str | None, log: tuple[Path, ...], keep_formulas: bool
) -> None:
    """Write the training set of a manifest again and verify that every row is equal."""
    from dagster_prefs.platform import Platform
    from dagster_prefs.training.training_set import reproduce_training_set

    first = manifest.with_name(manifest.name.removesuffix(".manifest.json"))
    platform = Platform(load_settings())
    made = reproduce_training_set(
        platform.catalog(),
        manifest,
        output or str(first.with_suffix(".reproduced.parquet")),
        registry=platform.registry,
        labels=labels,
        log=log,
        keep_formulas=keep_formulas,
    )
    console.print(f"{made.rows:,} rows, equal to those of {manifest}, in {made.output}")


@training_set.command("compare")
@click.argument("training_set_", metavar="SET")
@click.option("--entity", help="What the set is about, where several entities have features.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def training_set_compare(training_set_: str, entity: str | None, as_json: bool) -> int:
    """Compare a training set with what is served today, attribute by attribute.

    SET is a Parquet or CSV file, or an Iceberg table (namespace.table, of a snapshot namespace.table@id). Exit code 0
    where they are alike, 1 for warnings, 2 for errors.
    """
    from dagster_prefs.platform import Platform
    from dagster_prefs.training.compare import compare_with_served
    from dagster_prefs.training.windows import choose_features
    from dagster_prefs.values.drift import EXIT_CODES, worst

    platform = Platform(load_settings())
    found = compare_with_served(
        platform.catalog(),
        platform.registry,
        platform.engine,
        choose_features(platform.registry, entity),
        training_set_,
        now=datetime.now(UTC),
    )
    level = worst(one.level for one in found.attributes)
    if as_json:
        print_json(
            {
                "level": level,
                "attributes": [one.as_dict() for one in found.attributes],
                "missing": list(found.missing),
            }
        )
        return EXIT_CODES[level]
    rows = [
        (
            f"{one.domain}.{one.attribute}",
            one.level,
            f"{one.psi:.3f}",
            None if one.ks is None else f"{one.ks:.3f}",
            f"{one.in_set.null_share:.1%} → {one.served.null_share:.1%}",
            *(
                f"{before:g} → {now:g}"
                if (before := one.in_set.quantiles_by_share.get(share)) is not None
                and (now := one.served.quantiles_by_share.get(share)) is not None
                else None
                for share in (0.05, 0.5, 0.95)
            ),
        )
        for one in found.attributes
    ]
    heads = ["attribute", "level", "PSI", "KS", "missing", "5 %", "median", "95 %"]
    console.print(table_of(f"{training_set_} → served", heads, rows, whole_names=True))
    for name in found.missing:
        console.print(f"{name} is served and not in the set")
    return EXIT_CODES[level]


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("subject", nargs=-1, required=True, metavar="ENTITY ID")
@click.option("--drop-tags", is_flag=True, help="Also drop tags and branches that keep the subject's rows.")
@click.option(
    "--training-sets",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder whose files of training sets and labels are searched; may be given more than once.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def erase(subject: tuple[str, ...], drop_tags: bool, training_sets: tuple[Path, ...], as_json: bool) -> None:
    """Erase one id of an entity from every store, and verify it.

    ENTITY may be omitted if only one entity is erasable. For a composite key, ID is the first part, and the data of all
    entities with that key column is erased. Safe to run again after any failure.
    """
    from dagster_prefs.erasure.erase import erase as erase_everywhere
    from dagster_prefs.platform import Platform

    platform = Platform(load_settings())
    steps = plain_console(stderr=True)
    report = erase_everywhere(
        _stores(platform),
        _subject(platform, subject, "erase"),
        now=datetime.now(UTC),
        drop_tags=drop_tags,
        training_sets=training_sets,
        step=lambda step: steps.print(step, style="dim"),
    )
    if as_json:
        print_json(report.as_dict())
        return
    rows = [(h.store, h.place, h.unit, f"{h.before:,}", f"{h.after:,}") for h in report.holdings]
    console.print(table_of("", ["store", "place", "what", "before", "after"], rows))
    console.print(
        f"\n{report.subject}: {'erased' if report.held else 'nothing was held'}; "
        f"events up to {report.erased_at.isoformat()} stay suppressed"
    )
    if report.newer_events:
        console.print(f"{report.newer_events:,} events happened after that and count again")
    for place in report.training_sets:
        console.print(f"still in {place}: remove it, or write it again without the subject")
    for place, reason in report.unread.items():
        console.print(f"{place} was not searched for training sets ({reason})")
    console.print(table_of("\nRemoved only by time", ["where", "until"], list(report.unfinished.items())))


@cli.command("subject", context_settings={"ignore_unknown_options": True})
@click.argument("subject", nargs=-1, required=True, metavar="ENTITY ID")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="File of mode 0600; by default stdout."
)
@click.option(
    "--training-sets",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder whose files of training sets and labels are searched; may be given more than once.",
)
def subject_command(subject: tuple[str, ...], output: Path | None, training_sets: tuple[Path, ...]) -> None:
    """Export all that is stored of one id of an entity, as JSON.

    Messages, rows of every relation, items, rows of training tables with their history, training sets and labels: the
    places that `prefs erase` searches. ENTITY may be omitted if only one entity is erasable.
    """
    from dagster_prefs.erasure.export import export_subject
    from dagster_prefs.files import write_private
    from dagster_prefs.platform import Platform

    platform = Platform(load_settings())
    steps = plain_console(stderr=True)
    own = platform.settings.training_folder
    found = export_subject(
        _stores(platform),
        _subject(platform, subject, "subject"),
        now=datetime.now(UTC),
        # Where runs in Dagster write their training sets.
        training_sets=(*training_sets, *([own] if own.is_dir() else [])),
        step=lambda step: steps.print(step, style="dim"),
    )
    if output is None:
        print_json(found.as_dict())
    else:
        try:
            write_private(output, json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise PrefsError(f"{output} cannot be written ({error.strerror}): name another file") from None
        rows = [
            (store, place, f"{n:,}") for store, places in found.counts.items() for place, n in places.items()
        ]
        console.print(table_of("", ["store", "place", "entries"], rows))
        console.print(f"\nwrote {output}, which only you can read")
    for place, reason in found.unread.items():
        steps.print(f"{place} was not searched for training sets ({reason})")


def _stores(platform: Platform) -> Stores:
    from dagster_prefs.erasure.erase import Stores, refresh_with

    retention = platform.settings.raw_retention_seconds
    return Stores(
        platform.engine,
        platform.registry,
        platform.catalog,
        platform.dynamodb,
        platform.settings.table_prefix,
        refresh_with(platform.dbt),
        platform.settings.iceberg_namespace,
        platform.settings.export == "sink",
        platform.settings.served_log_place,
        platform.settings.raw_by_sink,
        None if retention is None else timedelta(seconds=retention),
    )


def _subject(platform: Platform, given: tuple[str, ...], command: str) -> Subject:
    """Return the subject that ENTITY and ID, or ID alone, name on the command line."""
    from dagster_prefs.erasure.events import Subject, erasable_kinds

    if len(given) > 2:
        raise click.UsageError(f"one subject at a time, as ENTITY ID, not {' '.join(given)}")
    erasable = erasable_kinds(platform.registry)
    if len(given) == 1 and len(erasable) != 1:
        named = " or ".join(f"`prefs {command} {name} {given[0]}`" for name in erasable)
        raise click.UsageError(
            f"the entity of {given[0]} is ambiguous: use {named}"
            if named
            else "this project declares no erasable entity"
        )
    kind, id_ = given if len(given) == 2 else (erasable[0], given[0])
    return Subject.named(platform.registry, kind, id_, command=command)
