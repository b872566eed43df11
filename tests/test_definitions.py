"""What Dagster loads: every asset with its dependencies, compared with a checked-in snapshot."""

import json
import os
import tomllib
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster.components.core.package_entry import get_package_objects_in_module
from declared import COURSES, PROJECT
from shipped import REGISTRY, SHORT

import dagster_prefs
from dagster_prefs.component import PreferencePlatformScaffold, PreferencePlatformScaffolder
from dagster_prefs.defs import online_store, skew
from dagster_prefs.defs.assembly import UnknownName, build_definitions
from dagster_prefs.freshness.alerts import AlertError
from dagster_prefs.platform import Platform
from dagster_prefs.settings import SettingsError, load_settings
from dagster_prefs.training.skew import AttributeSkew, Difference, SkewReport

SNAPSHOT = Path(__file__).with_name("definitions_snapshot.json")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here: dbt parses what other settings change, as it does for a user."""
    return tmp_path_factory.mktemp("definitions")


@pytest.fixture(scope="module")
def definitions(data_dir: Path) -> dg.Definitions:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFS_DATA_DIR", str(data_dir))
        return build_definitions(load_settings())


def not_null_checks() -> set[str]:
    """The check of each attribute that its domain declares never NULL, as dbt names it.

    The snapshot lists none of them: an attribute that somebody adds or renames is a change of its view alone.
    """
    return {
        f"{domain.relation}:not_null_{domain.relation}_{name}"
        for domain in REGISTRY.contract.domains.values()
        for name, attribute in domain.attributes.items()
        if not attribute.nullable
    }


def checks_of(definitions: dg.Definitions) -> set[str]:
    return {key.to_user_string() for key in definitions.resolve_asset_graph().asset_check_keys}


def described(definitions: dg.Definitions) -> dict[str, Any]:
    specs = definitions.resolve_all_asset_specs()
    return {
        "assets": {
            spec.key.to_user_string(): {
                "group": spec.group_name,
                "deps": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
                "kinds": sorted(spec.kinds),
                "partitioned": spec.partitions_def is not None,
            }
            for spec in sorted(specs, key=lambda spec: spec.key.to_user_string())
        },
        "checks": sorted(checks_of(definitions) - not_null_checks()),
        "jobs": sorted(
            job.name for job in definitions.resolve_all_job_defs() if not job.name.startswith("__")
        ),
        "schedules": sorted(schedule.name for schedule in definitions.schedules or ()),
        "sensors": sorted(sensor.name for sensor in definitions.sensors or ()),
    }


def test_definitions_are_those_of_the_snapshot(definitions: dg.Definitions) -> None:
    found = described(definitions)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(found, indent=2) + "\n")
    expected = json.loads(SNAPSHOT.read_text())
    assert found == expected, "run the test with UPDATE_SNAPSHOTS=1 and review the difference"


def test_an_attribute_that_is_never_null_has_its_check(definitions: dg.Definitions) -> None:
    expected = not_null_checks()
    assert len(expected) > len(REGISTRY.contract.domains)
    assert expected <= checks_of(definitions)


def test_every_asset_tells_what_it_is_and_whose(definitions: dg.Definitions) -> None:
    for spec in definitions.resolve_all_asset_specs():
        name = spec.key.to_user_string()
        assert spec.description, name
        assert spec.owners, name
        assert spec.group_name, name
        assert spec.kinds, name


def test_every_view_has_documented_typed_columns(definitions: dg.Definitions) -> None:
    for spec in definitions.resolve_all_asset_specs():
        if spec.group_name in ("events", "preferences", "engagement", "operations"):
            schema = spec.metadata["dagster/column_schema"]
            assert schema.columns, spec.key
            for column in schema.columns:
                assert column.description, f"{spec.key.to_user_string()}.{column.name}"
                assert column.type, f"{spec.key.to_user_string()}.{column.name}"


def test_every_attribute_leads_back_to_the_bytes_of_its_message(definitions: dg.Definitions) -> None:
    lineage = {
        spec.key: spec.metadata["dagster/column_lineage"].deps_by_column
        for spec in definitions.resolve_all_asset_specs()
        if "dagster/column_lineage" in spec.metadata
    }

    def back(asset: dg.AssetKey, column: str) -> set[tuple[str, str]]:
        if asset not in lineage:
            return {(asset.to_user_string(), column)}
        # A constant, as the key of a domain is, leads nowhere.
        return set().union(*(back(dep.asset_key, dep.column_name) for dep in lineage[asset].get(column, ())))

    assert back(dg.AssetKey(["online", "watch"]), f"titles_{SHORT}d") == {("raw_view_events", "data")}
    registry = load_settings().registry()
    for domain in registry.contract.domains.values():
        for attribute in domain.attributes:
            (found,) = back(dg.AssetKey(["online", domain.name]), attribute)
            assert found[0].startswith("raw_"), attribute
    for tile in registry.tiles.values():
        for column in tile.columns:
            (found,) = back(dg.AssetKey(["training", tile.table]), column)
            assert found[0].startswith("raw_"), column
    tile = lineage[dg.AssetKey("viewer_interactions_1d")]
    assert tile["likes"] == [
        dg.TableColumnDep(asset_key=dg.AssetKey("content_interactions"), column_name="event_type")
    ]


def test_sinks_wait_for_the_table(definitions: dg.Definitions) -> None:
    sinks = [s for s in definitions.resolve_all_asset_specs() if s.group_name == "sinks"]
    assert {spec.key.to_user_string() for spec in sinks} == {
        domain.sink for domain in REGISTRY.contract.domains.values()
    }
    for spec in sinks:
        assert dg.AssetKey(["dynamodb", "viewer_profiles"]) in {dep.asset_key for dep in spec.deps}


def test_schedules_and_sensors_start_only_where_asked(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, definitions: dg.Definitions
) -> None:
    assert all(s.default_status.value == "STOPPED" for s in definitions.schedules or ())
    assert all(s.default_status.value == "STOPPED" for s in definitions.sensors or ())
    monkeypatch.setenv("PREFS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("PREFS_SCHEDULES", "on")
    running = build_definitions(load_settings())
    assert all(s.default_status.value == "RUNNING" for s in running.schedules or ())
    # The embedded engine refreshes in batches, so its canary would only ever be late.
    stopped = {s.name for s in running.sensors or () if s.default_status.value != "RUNNING"}
    assert stopped == {"canary"}


def test_where_sinks_write_tables_of_the_lake_they_wait_for_them(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PREFS_DATA_DIR": str(data_dir),
        "PREFS_ENGINE": "risingwave",
        "PREFS_EXPORT": "sink",
        "PREFS_ICEBERG_CATALOG": "rest",
        "PREFS_ICEBERG_URI": "http://127.0.0.1:9",
        "PREFS_ICEBERG_WAREHOUSE": "s3://lake/warehouse",
        "PREFS_RAW_RETENTION_SECONDS": "86400",
    }.items():
        monkeypatch.setenv(name, value)
    found = described(build_definitions(load_settings()))["assets"]
    for table, sink in {
        "training/viewer_watch_daily": "sink_training_watch",
        "training/viewer_genre_daily": "sink_training_genre",
        "training/viewer_interactions_daily": "sink_training_interactions",
        **{f"lake/{topic.relation}": f"sink_raw_{topic.relation}" for topic in REGISTRY.topics.values()},
    }.items():
        assert sink in found[table]["deps"]
        assert "training/tables" in found[sink]["deps"]
        assert "dynamodb/viewer_profiles" not in found[sink]["deps"]


def test_a_served_log_in_files_is_compared_daily(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("PREFS_SERVED_LOG", f"files:{tmp_path}")
    platform = Platform(load_settings())
    report = SkewReport(rows=10, refused=Counter({"the lake is older": 2}))
    for name, wrong in (("watch", 1), ("sequence", 0)):
        found = report.attributes[name, "a"] = AttributeSkew(name, "a", compared=4, equal=4 - wrong)
        if wrong:
            found.note(Difference("log-1", datetime(2026, 1, 1, tzinfo=UTC), "wrong", 1, 2, None))
    asked: list[list[Path]] = []

    def compared(platform: Platform, log: list[Path], since: datetime) -> SkewReport:
        asked.append(list(log))
        assert since < datetime.now(UTC)
        return report

    monkeypatch.setattr(Platform, "skew", compared)
    made = skew.build(platform)
    assert [(one.name, one.cron_schedule) for one in made.schedules or ()] == [("skew_daily", "20 5 * * *")]
    job = dg.Definitions.merge(made, online_store.build(platform)).resolve_job_def(skew.JOB)
    result = job.execute_in_process()
    found_checks = {one.asset_key.path[-1]: one for one in result.get_asset_check_evaluations()}
    assert set(found_checks) == {domain.name for domain in REGISTRY.contract.domains.values()}
    assert {name for name, one in found_checks.items() if not one.passed} == {"watch"}
    assert found_checks["watch"].description == (
        "of 4 logged values are wrong: a in 1: see `prefs skew --json`"
    )
    assert found_checks["watch"].metadata["wrong"].value == 1
    assert asked == [[tmp_path]]


def test_a_changefeed_is_shown_between_subscription_and_table(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PREFS_DATA_DIR": str(data_dir),
        "PREFS_ENGINE": "risingwave",
        "PREFS_PUBLISH": "changefeed",
    }.items():
        monkeypatch.setenv(name, value)
    found = described(build_definitions(load_settings()))
    told = json.dumps(found["checks"])
    for domain in REGISTRY.contract.domains.values():
        assert found["assets"][domain.sink]["deps"] == [domain.relation]
        assert set(found["assets"][f"online/{domain.name}"]["deps"]) == {
            domain.sink,
            "dynamodb/viewer_profiles",
        }
        assert f"online/{domain.name}" in told
    assert "sink_engagement" not in told


THEIRS = """
import dagster as dg

@dg.asset(group_name="online_store")
def user_events() -> None: ...

@dg.asset(key=["online", "watch"], group_name="online_store")
def published() -> None: ...

refresh = dg.define_asset_job("refresh", dg.AssetSelection.assets(user_events))
"""


@pytest.fixture
def their_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of Dagster's own layout, with assets and a job named like ours."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "theirs"\n'
    )
    folder = tmp_path / "src" / "theirs" / "defs"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "assets.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    return folder


def add_component(folder: Path, project: Path, key_prefix: str, **attributes: Any) -> Path:
    """Scaffold a component as `dg scaffold defs` does, and add attributes to its file."""
    place = folder / key_prefix
    place.mkdir()
    PreferencePlatformScaffolder().scaffold(
        dg.ScaffoldRequest(
            type_name="dagster_prefs.PreferencePlatform",
            target_path=place,
            scaffold_format="yaml",
            project_root=folder.parents[2],
            params=PreferencePlatformScaffold(project_dir=str(project), key_prefix=key_prefix),
        )
    )
    file = place / "defs.yaml"
    content = yaml.safe_load(file.read_text())
    content["attributes"] |= attributes
    file.write_text(yaml.safe_dump(content))
    return file


def test_two_platforms_load_beside_the_assets_of_others(
    data_dir: Path, definitions: dg.Definitions, their_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFS_DATA_DIR", str(data_dir))
    # Of the one project; the other does not know the topic.
    monkeypatch.setenv("PREFS_KAFKA_TOPIC_VIEW_EVENTS", "views")
    add_component(
        their_project,
        PROJECT,
        "shop",
        schedules=True,
        schedule_crons={"parity_daily": "0 6 * * *"},
        group_names={"online_store": "shop_online"},
        settings={"PREFS_ENGINE_SCHEMA": "public"},
    )
    add_component(
        their_project,
        COURSES,
        "courses",
        settings={"PREFS_DATA_DIR": str(data_dir / "courses"), "PREFS_READINGS_KEPT_RUNS": "40"},
    )
    location = dg.load_from_defs_folder(path_within_project=their_project)

    assert location.executor is None, "the code location's executor runs them"
    keys = {spec.key: spec for spec in location.resolve_all_asset_specs()}
    ours = {spec.key.path[0] for key, spec in keys.items() if len(key.path) > 1} - {"online"}
    assert ours == {"shop", "courses"}
    assert keys[dg.AssetKey(["shop", "online", "watch"])].group_name == "shop_online"
    assert keys[dg.AssetKey(["courses", "online", "progress"])].group_name == "online_store"
    alone = {spec.key for spec in definitions.resolve_all_asset_specs()}
    assert {dg.AssetKey(key.path[1:]) for key in keys if key.path[0] == "shop"} == alone
    # Column lineage, dependencies and checks stay within the platform.
    for key, spec in keys.items():
        if key.path[0] == "shop":
            assert {dep.asset_key.path[0] for dep in spec.deps} <= {"shop"}
            lineage = spec.metadata.get("dagster/column_lineage")
            columns = lineage.deps_by_column.values() if lineage else ()
            assert {dep.asset_key.path[0] for deps in columns for dep in deps} <= {"shop"}

    names = {job.name for job in location.resolve_all_job_defs() if not job.name.startswith("__")}
    names |= {one.name for one in (*(location.schedules or ()), *(location.sensors or ()))}
    assert {name.partition("_")[0] for name in names - {"refresh"}} == {"shop", "courses"}
    refresh = location.resolve_job_def("shop_refresh").asset_layer.executable_asset_keys
    assert dg.AssetKey(["shop", "online", "watch"]) in refresh
    assert {key.path[0] for key in refresh} == {"shop"}
    shop = {one.name: one for one in location.schedules or () if one.name.startswith("shop_")}
    assert shop["shop_parity_daily"].cron_schedule == "0 6 * * *"
    assert {one.default_status for one in shop.values()} == {dg.DefaultScheduleStatus.RUNNING}


def test_dagster_finds_the_component_where_it_looks() -> None:
    entry = tomllib.loads((PROJECT.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    assert entry["dagster_dg_cli.registry_modules"] == {"dagster_prefs": "dagster_prefs"}
    found = dict(get_package_objects_in_module(dagster_prefs))
    assert found == {"PreferencePlatform": dagster_prefs.PreferencePlatform}
    described = dagster_prefs.PreferencePlatform.get_model_cls().model_json_schema()["properties"]
    assert all(one.get("description") for one in described.values()), described


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"schedule_crons": {"parity": "0 6 * * *"}}, UnknownName, "did you mean parity_daily"),
        ({"group_names": {"online": "x"}}, UnknownName, "did you mean online_store"),
        ({"settings": {"PREFS_ENGIN": "local"}}, SettingsError, "did you mean PREFS_ENGINE"),
        ({"settings": {"PREFS_KAFKA_TOPIC_OTHER": "x"}}, SettingsError, "PREFS_KAFKA_TOPIC_OTHER"),
        ({"key_prefix": "Shop"}, SettingsError, "PREFS_ASSET_PREFIX"),
        ({"alert_channels": ["http://example.com/x"]}, AlertError, "https"),
    ],
)
def test_a_wrong_attribute_is_refused_by_name(
    given: dict[str, Any],
    error: type[Exception],
    told: str,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFS_DATA_DIR", str(data_dir / "courses"))
    with pytest.raises(error, match=told):
        dagster_prefs.preference_platform(COURSES, **given)
