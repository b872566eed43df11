"""The catalog of what a project declares: complete, honest about people, and readable as it says."""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import sqlglot
from declared import COURSES, PROJECT
from personal_data import marked
from psycopg import sql
from shipped import LONG, SHORT

from dagster_prefs.declarations.registry import (
    Registry,
    RegistryError,
    load_registry,
    parse_registry,
    registry_dict,
)
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.serving.feature_catalog import (
    MOST_EXAMPLES,
    CatalogError,
    FeatureCatalog,
    Sample,
    described,
    has_statistics,
    last_changes,
    load_catalog,
    sampled,
)
from dagster_prefs.values.statistics import Statistics

PROJECTS = pytest.mark.parametrize("project", [PROJECT, COURSES], ids=lambda project: project.name)


@pytest.fixture(scope="module")
def catalogs() -> dict[Path, FeatureCatalog]:
    return {project: load_catalog(project, load_registry(project)) for project in (PROJECT, COURSES)}


@PROJECTS
def test_everything_declared_has_an_entry_that_says_what_it_is(
    project: Path, catalogs: dict[Path, FeatureCatalog]
) -> None:
    registry, catalog = load_registry(project), catalogs[project]
    for entity in registry.entities.values():
        assert catalog.entry(entity.name, "entity").type
    for topic in registry.topics.values():
        assert catalog.entry(topic.name, "topic").meaning
        for name, field in topic.by_name.items():
            entry = catalog.entry(f"{topic.name}.{name}", "field")
            assert (entry.type, entry.meaning) == (field.type, field.description)
    for domain in registry.contract.domains.values():
        assert catalog.entry(domain.key, "domain").owner == domain.owner
        for name, attribute in domain.attributes.items():
            entry = catalog.entry(f"{domain.name}.{name}", "attribute")
            assert entry.meaning == attribute.description
            assert (entry.owner, entry.freshness) == (domain.owner, domain.freshness)
            assert entry.origin
            assert any(one.startswith("DynamoDB") for one in entry.goes_to)
            assert {"python", "curl", "sql"} <= entry.read.keys()
            sqlglot.parse_one(entry.read["sql"], dialect="postgres")
            if days := re.search(r"_([0-9]+)d$", name):
                assert entry.window_days == int(days[1])
    for relation, view in registry.preferences.items():
        for name in view.reads:
            assert catalog.entry(f"{relation}.{name}", "column").meaning
    assert len({(one.kind, one.name) for one in catalog.entries}) == len(catalog.entries)
    for entry in catalog.entries:
        assert json.loads(json.dumps(entry.as_dict(), default=str))["name"] == entry.name


def test_what_is_made_from_a_person_is_personal(catalogs: dict[Path, FeatureCatalog]) -> None:
    personal = {one.name for one in catalogs[PROJECT].entries if one.is_personal}
    assert {
        "user.events.user_id",
        "user.events.session_id",
        "user.events.event_id",
        "view_events.viewer_id",
    } <= personal
    assert "viewer_watch_metrics_1d.viewer_id" in personal
    assert not {"items.item_id", "items.title", "user.events.category", f"watch.titles_{SHORT}d"} & personal
    assert {one.name for one in catalogs[COURSES].entries if one.is_personal} >= {
        "lesson_events.learner_id",
        "lesson_events.event_id",
    }


def test_what_is_made_from_personal_data_is_personal() -> None:
    def attributes(registry: Registry) -> set[str]:
        return {
            f"{domain.name}.{name}"
            for domain in registry.contract.domains.values()
            for name in domain.attributes
            if registry.is_personal(domain.relation, name)
        }

    registry = load_registry(PROJECT)
    both = {"preferences.favorite_genre", "preferences.favorite_genres"}
    assert attributes(registry) == set()
    # Declared at the event's field, or further down.
    field = marked(registry, view_events__genre=True)
    assert attributes(field) == both | {"watch.genres_watched_28d"}
    shown = {one.name for one in load_catalog(PROJECT, field).entries if one.is_personal}
    assert {"view_events.genre", "viewer_genre_metrics_1d.genre", *attributes(field)} <= shown
    assert attributes(marked(registry, viewer_genre_metrics_1d__genre=True)) == both
    one = marked(registry, viewer_preferences_rolling__favorite_genre=True)
    assert attributes(one) == {"preferences.favorite_genre"}
    # A number of genres names none: what is said of a column further down is final.
    counted = marked(registry, view_events__genre=True, viewer_watch_metrics_1d__genres_watched=False)
    assert attributes(counted) == both
    # Without the knowledge nobody can say that a value is not.
    unknown = {name: value for name, value in registry_dict(registry).items() if name != "personal"}
    with pytest.raises(RegistryError, match=r"'personal'.*run `prefs generate` again"):
        parse_registry(unknown)


def test_what_no_training_set_has_says_why(catalogs: dict[Path, FeatureCatalog]) -> None:
    read = catalogs[COURSES].entry("progress.favorite_subjects").read["training"]
    assert read == "in no training set: it is made from lesson_events, which is not exported"
    assert (
        "minutes_28d of `prefs training-set"
        in catalogs[COURSES].entry("progress.minutes_28d").read["training"]
    )


def test_search_finds_by_name_first_and_by_meaning(catalogs: dict[Path, FeatureCatalog]) -> None:
    catalog = catalogs[PROJECT]
    found = [one.name for one in catalog.search("Watch_Minutes")]
    assert found == [f"watch.watch_minutes_{SHORT}d", f"watch.watch_minutes_{LONG}d"]
    assert "preferences.favorite_genre" in [one.name for one in catalog.search("genre ties")]
    # By where it comes from.
    assert f"watch.titles_{SHORT}d" in [one.name for one in catalog.search("attribute content_id")]
    assert catalog.search("no such thing") == ()
    assert catalog.search("") == catalog.entries
    with pytest.raises(CatalogError, match=rf"no 'watch\.titels_7d': did you mean watch\.titles_{SHORT}d"):
        catalog.entry("watch.titels_7d")


def test_who_changed_a_file_last_is_asked_of_git(tmp_path: Path) -> None:
    assert last_changes(tmp_path) == {}

    def git(*words: str) -> None:
        who = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "a.yml").write_text("1")
    (tmp_path / "project" / "b.yml").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "both")
    (tmp_path / "project" / "b.yml").write_text("2")
    git("-c", "user.name=Bob", "commit", "-am", "one")
    found = last_changes(tmp_path / "project")
    assert {name: change.author for name, change in found.items()} == {"a.yml": "Ada", "b.yml": "Bob"}
    assert found["a.yml"].commit != found["b.yml"].commit


def test_the_share_of_nulls_is_that_of_the_statistics_where_there_are_some(
    catalogs: dict[Path, FeatureCatalog],
) -> None:
    registry, catalog = load_registry(PROJECT), catalogs[PROJECT]
    entry = replace(catalog.entry("watch.watch_minutes_7d"), sample=Sample(10, 0.2, ("1.5",)))
    assert has_statistics(registry, entry)
    assert not has_statistics(registry, catalog.entry("view_events.genre"))
    facts = entry.facts
    assert (facts["examples"], facts["null"]) == ("1.5", "20.0% of the first 10 rows, as a sample")
    assert "distinct" not in facts
    one = Statistics(
        "view", "viewer_engagement_rolling", date(2026, 3, 10), "watch_minutes_7d", "number", 90_000, 50_000, 500, 7,
        "", datetime(2026, 3, 10, tzinfo=UTC), quantiles=(0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0),
    )  # fmt: skip
    (found,) = described([entry], {one.relation: {one.attribute: one}})
    facts = found.facts
    assert facts["null"] == "1.0% of 50,000 of 90,000 rows, by the statistics of 2026-03-10"
    assert facts["distinct"] == "7, estimated"
    assert facts["quantiles"] == "1% 0, 5% 0.5, 25% 1, 50% 2, 75% 3, 95% 4, 99% 8"
    assert found.as_dict()["statistics"]["null_share"] == 0.01
    assert described([entry], {"another": {one.attribute: one}}) == (entry,)
    hidden = replace(found, is_personal=True, statistics=replace(one, kind="personal", quantiles=()))
    assert hidden.facts["examples"] == "none, it is personal"
    assert not {"distinct", "quantiles"} & hidden.facts.keys()


def test_examples_are_of_nobody(database: EngineConfiguration, catalogs: dict[Path, FeatureCatalog]) -> None:
    engine = replace(database, schema=f"catalog_{uuid.uuid4().hex[:8]}")
    registry = load_registry(PROJECT)
    entries = [
        catalogs[PROJECT].entry(f"view_events.{name}", "field")
        for name in ("viewer_id", "genre", "content_id")
    ] + [catalogs[PROJECT].entry(f"watch.titles_{SHORT}d"), catalogs[PROJECT].entry("view_events", "topic")]
    with engine.connect() as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(engine.schema)))
        table = sql.Identifier(engine.schema, "view_events")
        connection.execute(sql.SQL("create table {} (viewer_id bigint, genre text)").format(table))
        rows = [(-1, "canary"), *((number, f"genre {number}") for number in range(8)), (9, None), (10, None)]
        for row in rows:
            connection.execute(sql.SQL("insert into {} values (%s, %s)").format(table), row)
        viewer, genre, content, titles, topic = sampled(connection, engine, registry, entries)
        connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(engine.schema)))
    assert viewer.sample is not None
    assert (viewer.sample.rows, viewer.sample.null_share, viewer.sample.examples) == (10, 0.0, ())
    assert genre.sample is not None
    assert genre.sample.null_share == 0.2
    assert genre.sample.examples == tuple(f"genre {number}" for number in range(MOST_EXAMPLES))
    # Neither column nor view is there.
    assert (content.sample, titles.sample, topic.sample) == (None, None, None)
