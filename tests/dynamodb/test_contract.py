"""The serving contract: reading, building from a manifest, comparing."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from declared import PROJECT
from shipped import SHORT

from dagster_prefs.declarations.contract import (
    Contract,
    ContractError,
    Domain,
    build_contract,
    check_version,
    contract_dict,
    diff_contracts,
    load_contract,
    parse_contract,
)
from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.dynamodb.items import ItemDecoder, ItemEncoder, ItemError, item_bytes

REGISTRY = PROJECT / "registry.json"

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def content(contract: Contract) -> dict[str, Any]:
    """The contract's JSON without retired attributes, which the tests' manifest has no columns of."""
    served = {key: replace(domain, retired={}) for key, domain in contract.domains.items()}
    return contract_dict(replace(contract, domains=served))


def test_the_shipped_contract_is_what_is_served() -> None:
    contract = load_contract(PROJECT)
    assert {domain.name: key for key, domain in contract.domains.items()} == {
        name: f"engagement#{name}" for name in ("watch", "interactions", "preferences", "sequence")
    }
    assert contract.domain("watch") is contract.domain("engagement#watch")
    assert contract.domain("watch").attributes[f"watch_minutes_{SHORT}d"].type == "decimal"
    assert contract.tables["viewer"].name == "viewer_profiles"
    assert json.dumps(contract_dict(contract)) == json.dumps(json.loads(REGISTRY.read_text())["contract"])
    with pytest.raises(ContractError, match="unknown domain 'wach': the contract has"):
        contract.domain("wach")


def test_rendering_is_stable_and_reads_back(content: dict[str, Any]) -> None:
    text = json.dumps(contract_dict(parse_contract(content)))
    assert json.dumps(contract_dict(parse_contract(json.loads(text)))) == text
    backwards = deepcopy(content)
    backwards["domains"] = dict(reversed(backwards["domains"].items()))
    assert json.dumps(contract_dict(parse_contract(backwards))) == text


def viewers(content: dict[str, Any]) -> Any:
    return content["tables"]["viewer"]


def watch(content: dict[str, Any]) -> Any:
    return content["domains"]["engagement#watch"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("owner"), "the contract: owner is missing"),
        (lambda c: c.update(extra=1), "the contract: extra is not known"),
        (lambda c: c.update(version="1"), "version: a whole number of at least 1 is needed, not '1'"),
        (lambda c: c.update(domains={}), "tables.viewer: no domain is of entity viewer"),
        (lambda c: c.update(domains=[]), "domains: an object is needed, not list"),
        (lambda c: viewers(c).update(name="a b"), "'a b' is not a DynamoDB table name"),
        (lambda c: viewers(c).update(max_item_bytes=500_000), "500000 is over DynamoDB's limit"),
        (lambda c: viewers(c)["sort_key"].update(type="B"), "'B' is not one of N, S"),
        (
            lambda c: viewers(c)["sort_key"].update(type="N"),
            "sort_key.type: the sort key contains the domain's key, a text",
        ),
        (lambda c: c.update(tables={}), "has no table"),
        (
            lambda c: c["tables"].update(item=viewers(c)),
            "tables: name 'viewer_profiles' is used twice: each entity needs a table of its own",
        ),
        (
            lambda c: c["tables"].update(item={**viewers(c), "name": "item_profiles"}),
            "tables.item: no domain is of entity item",
        ),
        (lambda c: watch(c).update(entity="item"), "watch.entity: 'item' has no table: it is one of viewer"),
        (lambda c: watch(c).update(name="reads"), "'reads' is an attribute of every profile"),
        (lambda c: watch(c).update(name="viewer_id"), "'viewer_id' is an attribute of every profile"),
        (lambda c: watch(c).update(name="class"), "'class' is not a Python identifier"),
        (
            lambda c: watch(c)["attributes"].update(_x=watch(c)["attributes"][f"titles_{SHORT}d"]),
            "_x: an attribute's name must be a Python identifier without a leading underscore",
        ),
        (lambda c: c["domains"].update(Watch=watch(c)), "domains.Watch: a domain key is"),
        (
            lambda c: c["domains"].update({"engagement#again": watch(c)}),
            "domains: name 'watch' is used twice",
        ),
        (
            lambda c: watch(c)["attributes"][f"titles_{SHORT}d"].update(type="int"),
            "'int' is not one of integer",
        ),
        (lambda c: watch(c)["attributes"][f"titles_{SHORT}d"].update(nullable=0), "0 is not true or false"),
        (lambda c: watch(c)["attributes"].pop("last_event_at"), "last_event_at .* is needed"),
        (
            lambda c: watch(c)["attributes"].update(viewer_id=watch(c)["attributes"][f"titles_{SHORT}d"]),
            "viewer_id: a key of the table cannot also be an attribute",
        ),
        (lambda c: watch(c)["freshness"].update(warn_seconds=0), "0 is not a positive number of seconds"),
        (lambda c: watch(c)["freshness"].update(warn_seconds=9), "warn_seconds must not be above"),
    ],
)
def test_a_malformed_contract_names_the_place(content: dict[str, Any], edit: Edit, message: str) -> None:
    edit(content)
    with pytest.raises(ContractError, match=message):
        parse_contract(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not valid: it has no contract"),
        ('{"contract": []}', "is not valid: the contract: an object is needed"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "registry.json"
    with pytest.raises(ContractError, match=r"registry\.json cannot be read .*: run `prefs generate`"):
        load_contract(path)
    path.write_text(text)
    with pytest.raises(ContractError, match=message):
        load_contract(path)


SQL_NAMES = {
    "integer": "BIGINT",
    "decimal": "numeric(20, 6)",
    "float": "double precision",
    "string": "text",
    "list<string>": "text[]",
    "list<decimal>": "decimal[]",
    "list<integer>": "bigint[]",
}


@pytest.fixture
def manifest(content: dict[str, Any]) -> dict[str, Any]:
    """A dbt manifest that declares the shipped contract."""
    nodes: dict[str, Any] = {}
    for key, domain in content["domains"].items():
        unique_id = f"model.dagster_prefs.{domain['relation']}"
        columns = {
            "viewer_id": {"data_type": "bigint", "constraints": [{"type": "not_null"}]},
            "domain_key": {"data_type": "text", "constraints": [{"type": "not_null"}]},
        }
        for name, attribute in domain["attributes"].items():
            columns[name] = {
                "data_type": SQL_NAMES[attribute["type"]],
                "description": attribute["description"].replace(" ", "\n  "),
                "constraints": [],
            }
            if not attribute["nullable"]:
                nodes[f"test.{unique_id}.{name}"] = {
                    "resource_type": "test",
                    "test_metadata": {"name": "not_null"},
                    "attached_node": unique_id,
                    "column_name": name,
                }
        meta = {"key": key} | {
            part: domain[part] for part in ("name", "entity", "sink", "owner", "description", "freshness")
        }
        nodes[unique_id] = {
            "resource_type": "model",
            "name": domain["relation"],
            "columns": columns,
            "config": {"meta": {"domain": meta}},
        }
    nodes["model.dagster_prefs.items"] = {"resource_type": "model", "name": "items", "config": {"meta": {}}}
    head = {part: content[part] for part in ("version", "owner", "tables", "freshness")}
    exposures = {
        "exposure.dagster_prefs.recommendation_service": {
            "name": "recommendation_service",
            "config": {"meta": {"contract": head}},
        },
        "exposure.dagster_prefs.other": {"name": "other", "config": {"meta": {}}},
    }
    return {"nodes": nodes, "exposures": exposures}


def test_building_from_a_manifest(manifest: dict[str, Any], content: dict[str, Any]) -> None:
    assert build_contract(manifest) == content


def model(manifest: dict[str, Any]) -> Any:
    return manifest["nodes"]["model.dagster_prefs.viewer_engagement_rolling"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(exposures={}), "no exposure with meta.contract"),
        (
            lambda m: m["exposures"].update(x={**next(iter(m["exposures"].values())), "name": "x"}),
            "recommendation_service and x both declare meta.contract",
        ),
        (
            lambda m: model(m)["columns"][f"titles_{SHORT}d"].update(data_type="date"),
            f"viewer_engagement_rolling: column titles_{SHORT}d has data_type date",
        ),
        (lambda m: model(m)["columns"].pop("viewer_id"), "the key column viewer_id is not declared"),
        (
            lambda m: model(m)["columns"]["viewer_id"].update(constraints=[]),
            "key column viewer_id must be integer and have a not_null",
        ),
        (
            lambda m: model(m)["config"]["meta"]["domain"].pop("sink"),
            r"viewer_engagement_rolling: meta\.domain: sink is missing",
        ),
        (
            lambda m: model(m)["config"]["meta"]["domain"].update(key="engagement#preferences"),
            "both declare domain engagement#preferences",
        ),
    ],
)
def test_building_names_what_is_wrong(manifest: dict[str, Any], edit: Edit, message: str) -> None:
    edit(manifest)
    with pytest.raises(ContractError, match=message):
        build_contract(manifest)


@pytest.mark.parametrize(
    ("edit", "kind", "path"),
    [
        (
            lambda c: watch(c)["attributes"].pop(f"titles_{SHORT}d"),
            "breaking",
            f"engagement#watch.titles_{SHORT}d",
        ),
        (
            lambda c: watch(c)["attributes"][f"titles_{SHORT}d"].update(type="decimal"),
            "breaking",
            f"engagement#watch.titles_{SHORT}d",
        ),
        (
            lambda c: watch(c)["attributes"][f"titles_{SHORT}d"].update(nullable=True),
            "breaking",
            f"engagement#watch.titles_{SHORT}d",
        ),
        (
            lambda c: c["domains"]["engagement#preferences"]["attributes"]["favorite_genre"].update(
                nullable=False
            ),
            "additive",
            "engagement#preferences.favorite_genre",
        ),
        (
            lambda c: watch(c)["attributes"].update(
                new={"type": "float", "nullable": True, "description": ""}
            ),
            "additive",
            "engagement#watch.new",
        ),
        (
            lambda c: c["domains"]["engagement#preferences"]["attributes"]["favorite_genres"].update(
                null_elements=True
            ),
            "breaking",
            "engagement#preferences.favorite_genres",
        ),
        (lambda c: c["domains"].pop("engagement#watch"), "breaking", "engagement#watch"),
        (
            lambda c: c["domains"].update(
                {"engagement#more": {**watch(c), "name": "more", "relation": "r", "sink": "s"}}
            ),
            "additive",
            "engagement#more",
        ),
        (lambda c: watch(c).update(name="watching"), "breaking", "engagement#watch.name"),
        (lambda c: watch(c).update(owner="others"), "additive", "engagement#watch.owner"),
        (lambda c: watch(c)["freshness"].update(error_seconds=50), "breaking", "engagement#watch.freshness"),
        (lambda c: watch(c)["freshness"].update(error_seconds=4), "additive", "engagement#watch.freshness"),
        (lambda c: viewers(c).update(name="other"), "breaking", "tables.viewer.name"),
        (lambda c: viewers(c)["sort_key"].update(name="domain"), "breaking", "tables.viewer.sort_key"),
        (lambda c: viewers(c).update(max_item_bytes=1000), "additive", "tables.viewer.max_item_bytes"),
        (lambda c: c["freshness"]["export"].update(error_seconds=500_000), "additive", "freshness"),
    ],
)
def test_changes_are_classified_and_breaking_ones_need_a_version(
    content: dict[str, Any], edit: Edit, kind: str, path: str
) -> None:
    old = parse_contract(deepcopy(content))
    edit(content)
    new = parse_contract(content)
    assert [(change.kind, change.path) for change in diff_contracts(old, new)] == [(kind, path)]
    if kind == "breaking":
        with pytest.raises(
            ContractError, match=f"breaking change .*{path}.* set version to {old.version + 1}"
        ):
            check_version(old, new)
        content["version"] = old.version + 1
        new = parse_contract(content)
    assert check_version(old, new) == diff_contracts(old, new)


def test_a_project_that_serves_no_profiles_any_more_needs_no_version(content: dict[str, Any]) -> None:
    """The declaration of the version went with the last domain, so the contract has the default one."""
    old = parse_contract(content | {"version": 7})
    new = parse_contract(content | {"version": 1, "tables": {}, "domains": {}})
    assert {change.kind for change in check_version(old, new)} == {"breaking"}
    with pytest.raises(ContractError, match="version 1 is lower than 7"):
        check_version(old, parse_contract(content | {"version": 1}))


def test_a_table_of_another_entity_comes_and_goes(content: dict[str, Any]) -> None:
    before = parse_contract(deepcopy(content))
    content["tables"]["item"] = {**viewers(content), "name": "item_profiles"}
    trend = {**watch(content), "name": "trend", "relation": "r", "sink": "s", "entity": "item"}
    content["domains"]["item#trend"] = trend
    after = parse_contract(deepcopy(content))
    assert [(change.kind, change.path) for change in diff_contracts(before, after)] == [
        ("additive", "tables.item"),
        ("additive", "item#trend"),
    ]
    assert [(change.kind, change.path) for change in diff_contracts(after, before)] == [
        ("breaking", "tables.item"),
        ("breaking", "item#trend"),
    ]
    assert after.table_of(after.domain("trend")).name == "item_profiles"
    assert [domain.name for domain in after.domains_of("item")] == ["trend"]
    content["domains"]["item#trend"]["entity"] = "viewer"
    del content["tables"]["item"]
    moved = diff_contracts(after, parse_contract(content))
    assert ("breaking", "item#trend.entity") in {(change.kind, change.path) for change in moved}


def test_nothing_changed_is_nothing_to_tell(content: dict[str, Any]) -> None:
    old = parse_contract(content)
    assert check_version(old, parse_contract(deepcopy(content))) == ()


def test_a_version_never_goes_back(content: dict[str, Any]) -> None:
    new = parse_contract(deepcopy(content))
    content["version"] = new.version + 1
    with pytest.raises(ContractError, match=f"version {new.version} is lower than {new.version + 1}"):
        check_version(parse_contract(content), new)


def sequence(contract: Contract) -> Domain:
    return contract.domain("sequence")


def test_elements_of_a_list_are_null_where_the_contract_says_so() -> None:
    contract = load_contract(PROJECT)
    domain = sequence(contract)
    assert domain.attributes["recent_content_ids"].null_elements
    assert not domain.attributes["recent_watched_at"].null_elements
    encoder, decoder = ItemEncoder(contract, domain), ItemDecoder(domain)
    values = [["c1", None], [5, 3], [None, Decimal("0.25")], 5]
    item = encoder.encode(1, values)
    assert item["recent_content_ids"] == {"L": [{"S": "c1"}, {"NULL": True}]}
    assert item["recent_watched_at"] == {"L": [{"N": "5"}, {"N": "3"}]}
    assert decoder.decode(item) == (values, ())
    with pytest.raises(
        ItemError, match="recent_watched_at contains NULL, and the contract has no null_elements"
    ):
        encoder.encode(1, [["c1"], [None], [None], 5])
    with pytest.raises(ItemError, match="recent_watched_at should be list<integer> in the table"):
        decoder.decode({**item, "recent_watched_at": {"L": [{"NULL": True}]}})
    with pytest.raises(ItemError, match="recent_watched_at must be a whole number, not Decimal"):
        encoder.encode(1, [["c1"], [Decimal(1)], [None], 5])


def test_only_a_list_has_null_elements(content: dict[str, Any]) -> None:
    watch(content)["attributes"][f"titles_{SHORT}d"]["null_elements"] = True
    with pytest.raises(ContractError, match=r"null_elements: True is .* true of something other than a list"):
        parse_contract(content)


def test_the_largest_sequence_fits_an_item() -> None:
    """50 ids of the most bytes that a message may have, and NULL in no place."""
    contract, registry = load_contract(PROJECT), load_registry(PROJECT)
    length = registry.variables["sequence_length"]
    longest = registry.topics["view_events"].by_name["content_id"].max_bytes
    assert longest
    item = ItemEncoder(contract, sequence(contract)).encode(
        2**63 - 1,
        [
            ["x" * longest] * length,
            [4_102_444_800_000] * length,
            [Decimal("0.123456789")] * length,
            4_102_444_800_000,
        ],
    )
    assert item_bytes(item) < 20_000 < contract.tables["viewer"].max_item_bytes / 20
