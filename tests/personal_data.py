"""The example's registry as it would be with other declarations of personal data."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

from declared import PROJECT

from dagster_prefs.declarations.lineage import load_lineage
from dagster_prefs.declarations.personal import personal_columns
from dagster_prefs.declarations.read import ProjectYaml, as_map, read_project
from dagster_prefs.declarations.registry import Registry


@cache
def _project() -> ProjectYaml:
    return read_project(PROJECT)


def marked(registry: Registry, **pii: bool) -> Registry:
    """Declare `pii` of columns, each named `model__column`."""
    models = {model.name: model for model in _project().models}
    for name, given in pii.items():
        relation, _, column = name.partition("__")
        models[relation] = replace(models[relation], content=deepcopy(models[relation].content))
        config = models[relation].columns[column].content.setdefault("config", as_map(None, 1))
        config.setdefault("meta", as_map(None, 1))["pii"] = given
    return replace(registry, personal=personal_columns(models.values(), load_lineage(PROJECT, registry)))
