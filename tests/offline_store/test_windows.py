"""Features come from the rolling views themselves."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlglot
from declared import COURSES, PROJECT
from shipped import GENRE, INTERACTIONS, LONG, SHORT, WATCH
from sqlglot import exp

from dagster_prefs.declarations.registry import Registry, RegistryError, load_registry
from dagster_prefs.engine.dbt import compile_queries
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.tables import DeclarationRefused, tile_tables
from dagster_prefs.training.windows import Features, ViewNotPortable, choose_features, features_by_entity

from .training_world import FEATURES, REGISTRY

VIEW = "viewer_engagement_rolling"
WINDOW = f"(watch_date::timestamp at time zone 'UTC') + interval '{SHORT + 1} days' > now()"
SUMS = (
    f"select viewer_id, 'a#b' as domain_key, sum(views) as watch_minutes_{SHORT}d, max(last_event_at) as last_event_at "
    "from viewer_watch_metrics_1d where {} group by viewer_id"
)


def with_query(text: str, relation: str = VIEW, **variables: Any) -> Registry:
    """The example with another query of one view, whose domain has one attribute then."""
    contract = REGISTRY.contract
    domains = {
        key: dataclasses.replace(
            domain,
            attributes={
                name: domain.attributes[name] for name in (f"watch_minutes_{SHORT}d", "last_event_at")
            },
        )
        if domain.relation == relation
        else domain
        for key, domain in contract.domains.items()
    }
    return dataclasses.replace(
        REGISTRY,
        contract=dataclasses.replace(contract, domains=domains),
        queries={**REGISTRY.queries, relation: text},
        variables={**REGISTRY.variables, **variables},
    )


def features_of(registry: Registry) -> Features:
    return choose_features(registry, "viewer")


def test_windows_and_columns_are_read_off_the_views() -> None:
    assert FEATURES.first_day(date(2026, 3, 29)) == date(2026, 3, 29) - timedelta(days=LONG)
    read = {spec: set(columns) for spec, columns in FEATURES.sources}
    expected = {
        WATCH: {"watch_seconds", "content_started", "completions", "genres_watched"},
        GENRE: {"genre", "watch_seconds", "views", "completions"},
        INTERACTIONS: {"likes", "shares", "searches"},
    }
    if REGISTRY.contract == load_registry(PROJECT).contract:
        assert read == expected
    else:
        # Somebody added attributes to the example: their columns are read as well.
        assert read.keys() == expected.keys()
        assert all(columns <= read[spec] for spec, columns in expected.items())
    served = {
        (domain.name, name)
        for domain in REGISTRY.contract.domains.values()
        for name in domain.attributes
        if name != "last_event_at"
    }
    assert {(value.domain, value.name) for value in FEATURES.values} == served
    assert FEATURES.left_out == {}


def test_another_window_of_the_project_is_another_window_of_the_training_set(tmp_path: Path) -> None:
    """`windows.long` of two more days in dbt_project.yml: everything follows from what dbt compiles."""
    project = tmp_path / "project"
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("target", "logs"))
    declared = (project / "dbt_project.yml").read_text()
    changed = re.sub(rf"(windows:\s*\{{?[^}}]*?long: ){LONG}", rf"\g<1>{LONG + 2}", declared, flags=re.DOTALL)
    assert changed != declared
    (project / "dbt_project.yml").write_text(changed)
    queries = compile_queries(project, [domain.relation for domain in REGISTRY.contract.domains.values()])
    windows = {**REGISTRY.variables["windows"], "long": LONG + 2}
    followed = dataclasses.replace(
        REGISTRY, queries=queries, variables={**REGISTRY.variables, "windows": windows}
    )
    features = features_of(followed)
    assert (FEATURES.longest_window, features.longest_window) == (LONG, LONG + 2)
    for before, after in (
        (FEATURES.sql("training"), features.sql("training")),
        (FEATURES.sql("serving"), features.sql("serving")),
        *(
            [
                one.training_sql(dialect, "ml.labels", ["viewer_id"], namespace="training")
                for one in (FEATURES, features)
            ]
            for dialect in ("trino", "spark", "athena")
        ),
    ):
        assert before != after == re.sub(rf"(?<![0-9_]){LONG}(?![0-9_d,])", str(LONG + 2), before)


def test_a_window_that_the_project_does_not_have_is_refused() -> None:
    """The variable changed and the queries did not: nothing is computed with either."""
    stale = dataclasses.replace(
        REGISTRY, variables={**REGISTRY.variables, "windows": {"short": SHORT, "long": LONG + 2}}
    )
    windows = f"the project's windows are short={SHORT}, long={LONG + 2}: run `prefs gen"
    with pytest.raises(ViewNotPortable, match=f"in a window of {LONG} days, and {windows}"):
        features_of(stale)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (SUMS.format("watch_date > '2026-01-01'"), "another condition than within_window"),
        (SUMS.format(f"{WINDOW} and views > 1"), "another condition than within_window"),
        (SUMS.format(WINDOW.replace("days", "hours")), "another condition than within_window"),
        (SUMS.format("true"), "another condition than within_window"),
        (
            SUMS.format(WINDOW.replace(f"{SHORT + 1} days", "1 days")),
            "a window of 0 days: a window must have at least 1 day",
        ),
        (SUMS.format(WINDOW).replace("views", "sessions"), "sessions, which the tile does not declare"),
        (
            f"select e.viewer_id from view_events as e join {WATCH.tile} as t on t.viewer_id = e.viewer_id",
            "does not read a tile on its own",
        ),
        (SUMS.format(WINDOW).replace("sum(views)", "round(sum(views), 1)"), "use the macros minutes or ratio"),
        (
            SUMS.format(WINDOW).replace("sum(views)", "round(sum(watch_time_minutes) / 60.0, 6)"),
            "watch_time_minutes, a decimal: training sets compute quotients of whole numbers only",
        ),
        ("drop table x", "is no query"),
    ],
)  # fmt: skip
def test_a_view_that_cannot_be_asked_about_other_days_is_refused(view: str, message: str) -> None:
    with pytest.raises(ViewNotPortable, match=f"{VIEW} .*{message}|{VIEW} {message}"):
        features_of(with_query(view))


def test_a_domain_that_reads_no_tile_is_served_and_left_out_by_name() -> None:
    query = "with a as (select viewer_id from view_events) select a.viewer_id, 'x' as domain_key from a"
    features = features_of(with_query(query))
    (domain,) = [one for one in REGISTRY.contract.domains.values() if one.relation == VIEW]
    assert domain.name not in features.domains
    assert {name.split(".")[0] for name in features.left_out} == {domain.name}
    assert set(features.left_out.values()) == {"it is computed from view_events, which is not exported"}
    assert f"{domain.name}." not in features.sql("serving")


def test_an_entity_whose_domains_read_no_tile_has_no_features() -> None:
    alone = with_query("select viewer_id from view_events")
    (domain,) = [one for one in alone.contract.domains.values() if one.relation == VIEW]
    contract = dataclasses.replace(alone.contract, domains={domain.key: domain})
    registry = dataclasses.replace(alone, contract=contract)
    assert features_by_entity(registry) == {}
    with pytest.raises(OfflineError, match="viewer has no features"):
        choose_features(registry, "viewer")


def test_a_portable_view_becomes_a_query_of_points() -> None:
    query = features_of(with_query(SUMS.format(WINDOW))).sql("serving")
    assert "viewer_watch_daily AS t ON t.viewer_id = p.viewer_id AND t.watch_date >= p.since" in query
    assert "t.watch_date < p.day" not in query


JOINED = f"""
with sums as ({{sums}}), latest as (select viewer_id, max(content_id) as latest from view_events group by viewer_id)
select sums.viewer_id, 'a#b' as domain_key, sums.watch_minutes_{SHORT}d, latest.latest as latest_content,
  sums.last_event_at {{more}}
from sums {{join}} latest on latest.viewer_id = sums.viewer_id
"""


def test_what_comes_from_no_tile_is_left_out_by_name_or_refused() -> None:
    def joined(join: str = "left join", more: str = "") -> Registry:
        registry = with_query(JOINED.format(sums=SUMS.format(WINDOW), join=join, more=more))
        contract = registry.contract
        key = "engagement#watch"
        watch = contract.domains[key]
        text = dataclasses.replace(watch.attributes[f"watch_minutes_{SHORT}d"], type="string", nullable=True)
        attributes: Mapping[str, Any] = {**watch.attributes, "latest_content": text}
        domains = {**contract.domains, key: dataclasses.replace(watch, attributes=attributes)}
        return dataclasses.replace(registry, contract=dataclasses.replace(contract, domains=domains))

    features = features_of(joined())
    assert features.left_out == {
        "watch.latest_content": "it is computed from view_events, which is not exported"
    }
    assert "latest" not in features.sql("training")
    assert f"watch_minutes_{SHORT}d" in {value.name for value in features.values}
    with pytest.raises(ViewNotPortable, match="has rows only where view_events has some"):
        features_of(joined(join="join"))
    with pytest.raises(ViewNotPortable, match="a column is written without its table"):
        features_of(joined(more=", latest"))


def test_what_no_training_table_can_hold_is_refused_by_name() -> None:
    tile = REGISTRY.tiles["viewer_watch_metrics_1d"]

    def declared(**columns: Any) -> Registry:
        changed = {**tile.columns, **columns}
        kept = {name: column for name, column in changed.items() if column is not None}
        return dataclasses.replace(REGISTRY, tiles={tile.relation: dataclasses.replace(tile, columns=kept)})

    views = tile.columns["views"]
    for registry, message in (
        (
            declared(views=dataclasses.replace(views, type="jsonb")),
            r"\.views is jsonb, which training tables",
        ),
        (declared(watch_date=None), r"\.watch_date is missing, and it is its day"),
        (declared(watch_seconds=None), "declares watch_seconds in its key, metric or at_most"),
        (
            declared(viewer_id=dataclasses.replace(views, type="text", minimum=None)),
            "viewer_id is text, and it is the key",
        ),
        (
            declared(last_event_at=dataclasses.replace(views, type="date")),
            "has the minimum 1, which only numbers have",
        ),
    ):
        with pytest.raises(DeclarationRefused, match=message):
            tile_tables(registry)


def test_a_view_without_its_query_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"has no query for \w+_rolling: run `prefs generate`"):
        features_of(dataclasses.replace(REGISTRY, queries={}))


@pytest.mark.parametrize("project", [PROJECT, COURSES], ids=lambda path: path.name)
def test_every_column_of_every_tile_is_in_its_fingerprint(project: Path) -> None:
    """What is missing there could change after its export, and nothing would tell."""
    registry = load_registry(project)
    (text,) = compile_queries(project, ["tile_fingerprints"]).values()
    union = sqlglot.parse_one(text, dialect="risingwave")
    selects = {
        found.find(exp.From).this.name: found
        for found in union.find_all(exp.Select)
        if found.find(exp.ConcatWs) is not None and isinstance(found.args["from_"].this, exp.Table)
    }
    assert set(selects) >= set(registry.tiles)
    for tile in registry.tiles.values():
        select = selects[tile.relation]
        content = next(column for column in select.expressions if column.alias == "content")
        shown = {column.name for column in content.find_all(exp.Column)}
        assert shown == set(tile.columns) - {tile.day}
        assert tile.relation in {literal.this for literal in select.find_all(exp.Literal)}
