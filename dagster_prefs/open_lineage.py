"""Send column lineage to a collector as OpenLineage events. Off unless OpenLineage's own variables are set.

An apply sends an event for each relation, an export one for its training table. A failure to send never fails the
work: it is logged as a warning, and no further event is sent. While sending is off, OpenLineage is not imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dagster_prefs.declarations.lineage import Column, Kind, Lineage, Sources
from dagster_prefs.declarations.registry import Registry

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

log = logging.getLogger("dagster_prefs.open_lineage")

# OpenLineage's own words for how a column is used: type and subtype.
TRANSFORMATIONS: Mapping[Kind, tuple[str, str]] = {
    "identity": ("DIRECT", "IDENTITY"),
    "transformation": ("DIRECT", "TRANSFORMATION"),
    "aggregation": ("DIRECT", "AGGREGATION"),
    "condition": ("INDIRECT", "CONDITIONAL"),
    "order": ("INDIRECT", "SORT"),
    "filter": ("INDIRECT", "FILTER"),
    "join": ("INDIRECT", "JOIN"),
    "group": ("INDIRECT", "GROUP_BY"),
}


@dataclass(frozen=True)
class Places:
    """Where datasets are, as OpenLineage names them: namespaces, and the prefix of each name."""

    engine: str
    engine_prefix: str
    kafka: str
    kafka_topics: Mapping[str, str]
    dynamodb: str
    table_prefix: str
    iceberg: str
    iceberg_prefix: str


@dataclass(frozen=True)
class Dataset:
    """A dataset and the sources of its columns: column → (dataset, its column, how it is used)."""

    namespace: str
    name: str
    columns: Mapping[str, tuple[tuple[str, str, str, frozenset[Kind]], ...]]


def is_on(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether OpenLineage's variables name a collector."""
    if environment.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return False
    # OpenLineage's other variables do not count, because its client sets some of them itself.
    return any(environment.get(name) for name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG"))


def applied_datasets(registry: Registry, lineage: Lineage, places: Places) -> list[Dataset]:
    """Return the datasets that an apply updates: events, views and items, each with the sources of its columns."""
    found = [_relation(relation, lineage, places) for relation in (*lineage.typed, *lineage.relations)]
    for domain in registry.contract.domains.values():
        table = registry.contract.table_of(domain)
        names = (*(key.name for key in table.columns), *domain.attributes)
        found.append(
            _same(
                places.dynamodb,
                # One table holds all domains of an entity, and each has columns of its own.
                f"{places.table_prefix}{table.name}/{domain.key}",
                names,
                domain.relation,
                places,
            )
        )
    return [one for one in found if one.columns]


def exported_dataset(registry: Registry, relation: str, places: Places) -> Dataset:
    """Return the training table of a tile, with the sources of its columns."""
    tile = registry.tiles[relation]
    return _same(places.iceberg, f"{places.iceberg_prefix}{tile.table}", tile.columns, relation, places)


def _relation(relation: str, lineage: Lineage, places: Places) -> Dataset:
    def named(sources: Sources) -> tuple[tuple[str, str, str, frozenset[Kind]], ...]:
        return tuple((*_place(one, places), one.name, kinds) for one, kinds in sorted(sources.items()))

    columns = {name: named(lineage.sources(Column(relation, name))) for name in lineage.columns(relation)}
    return Dataset(places.engine, f"{places.engine_prefix}{relation}", columns)


def _place(column: Column, places: Places) -> tuple[str, str]:
    if column.is_field:
        return places.kafka, places.kafka_topics.get(column.of, column.of)
    return places.engine, f"{places.engine_prefix}{column.of}"


def _same(namespace: str, name: str, columns: Iterable[str], relation: str, places: Places) -> Dataset:
    source = _place(Column(relation, ""), places)
    kinds: frozenset[Kind] = frozenset({"identity"})
    return Dataset(namespace, name, {column: ((*source, column, kinds),) for column in columns})


def send(job: str, project: str, datasets: Callable[[], Iterable[Dataset]]) -> str | None:
    """Send an event for each dataset. Return why one was not sent; None if all were, or if sending is off.

    The reason is also logged as a warning.
    """
    if not is_on():
        return None
    reason = None
    if find_spec("openlineage") is None:
        reason = (
            "openlineage-python is not installed: install dagster-prefs[lineage], or unset OPENLINEAGE_URL"
        )
    else:
        try:
            _send(job, project, datasets())
        # OpenLineage's transports raise the exceptions of their libraries, which are not known here.
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if reason is not None:
        log.warning("lineage of %s was not sent to OpenLineage: %s", job, reason)
    return reason


def _send(job: str, project: str, datasets: Iterable[Dataset]) -> None:
    from openlineage.client import OpenLineageClient

    client = OpenLineageClient()
    try:
        for dataset in datasets:
            client.emit(_event(job, project, dataset))
    finally:
        client.close()


def _event(job: str, project: str, dataset: Dataset) -> RunEvent:
    from openlineage.client import event_v2 as events
    from openlineage.client.facet_v2 import column_lineage_dataset as lineage
    from openlineage.client.facet_v2 import schema_dataset
    from openlineage.client.uuid import generate_new_uuid

    inputs: dict[tuple[str, str], set[str]] = {}
    fields: dict[str, Any] = {}
    for column, sources in dataset.columns.items():
        used = []
        for namespace, name, source, kinds in sources:
            inputs.setdefault((namespace, name), set()).add(source)
            how = [
                lineage.Transformation(type=TRANSFORMATIONS[kind][0], subtype=TRANSFORMATIONS[kind][1])
                for kind in sorted(kinds)
            ]
            used.append(lineage.InputField(namespace, name, source, how))
        fields[column] = lineage.Fields(used)
    output = events.OutputDataset(
        dataset.namespace,
        dataset.name,
        facets={
            "columnLineage": lineage.ColumnLineageDatasetFacet(fields),
            "schema": schema_dataset.SchemaDatasetFacet(
                [schema_dataset.SchemaDatasetFacetFields(name=column) for column in dataset.columns]
            ),
        },
    )
    return events.RunEvent(
        eventType=events.RunState.COMPLETE,
        eventTime=datetime.now(UTC).isoformat(),
        run=events.Run(str(generate_new_uuid())),
        job=events.Job(project, f"{job}.{dataset.name}"),
        inputs=[
            events.InputDataset(
                namespace,
                name,
                facets={
                    "schema": schema_dataset.SchemaDatasetFacet(
                        [schema_dataset.SchemaDatasetFacetFields(name=column) for column in sorted(columns)]
                    )
                },
            )
            for (namespace, name), columns in sorted(inputs.items())
        ],
        outputs=[output],
    )
