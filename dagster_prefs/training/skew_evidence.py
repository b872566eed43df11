"""The evidence of a skew report: values as served and arrivals, from the events in the lake."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
from pyiceberg.catalog import Catalog

from dagster_prefs.declarations.registry import Entity, Registry
from dagster_prefs.engine.spreads import Spreads
from dagster_prefs.iceberg.duck import JOINING, duck_session
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE
from dagster_prefs.ids import Id, id_parts
from dagster_prefs.training.lake import lake_inputs, pin_served
from dagster_prefs.training.served import ARRIVED, ServedInputs, served_values
from dagster_prefs.training.served_sql import ServedFeatures
from dagster_prefs.training.skew import Erased, Evidence

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def lake_evidence(
    catalog: Catalog,
    registry: Registry,
    *,
    spreads: Spreads,
    erased: Erased,
    namespace: str = DEFAULT_NAMESPACE,
) -> Evidence:
    """Return what a skew report compares with, from the lake as it is when an entity is first asked for.

    `spreads` are those in force over time, and `erased` tells whether an id was erased. What it answers raises
    TableMissing for events that were never exported, or another OfflineError.
    """
    lake = _Lake(catalog, registry, spreads, namespace)
    return Evidence(lake.as_served, lake.arrivals, erased)


class _Lake:
    def __init__(self, catalog: Catalog, registry: Registry, spreads: Spreads, namespace: str) -> None:
        self._catalog = catalog
        self._registry = registry
        self._spreads = spreads
        self._namespace = namespace
        self._known: dict[str, tuple[ServedFeatures, ServedInputs]] = {}

    def as_served(self, entity: Entity, rows: pa.Table) -> pa.Table:
        features, inputs = self._of(entity)
        return served_values(features, rows, inputs, strict=False)

    def arrivals(
        self, entity: Entity, ids: frozenset[Id], first: datetime, last: datetime
    ) -> Mapping[Id, Sequence[datetime]]:
        features, inputs = self._of(entity)
        names = ", ".join(features.key_names)
        found: dict[Id, list[datetime]] = defaultdict(list)
        for topic in features.topics:
            with duck_session(*JOINING) as session:
                session.register("ids", _ids(entity, ids))
                time = self._registry.topic(topic).time
                # All of them: an event may have happened long before it arrived.
                inputs.events[topic].load(
                    session, "events", [*features.key_names, *([time] if time else [])], None
                )
                rows = session.execute(
                    f"select {names}, epoch_us({ARRIVED}) as at from events join ids using ({names}) "
                    f"where epoch_us({ARRIVED}) between ? and ?",
                    [_microseconds(first), _microseconds(last)],
                )
                while some := rows.fetchmany(10_000):
                    for *parts, at in some:
                        id_ = parts[0] if len(parts) == 1 else tuple(parts)
                        found[id_].append(_EPOCH + timedelta(microseconds=at))
        return found

    def _of(self, entity: Entity) -> tuple[ServedFeatures, ServedInputs]:
        known = self._known.get(entity.name)
        if known is None:
            features = ServedFeatures(self._registry, entity)
            _, pins = pin_served(self._catalog, features, namespace=self._namespace)
            inputs = lake_inputs(
                self._catalog, features, pins, spreads=self._spreads, namespace=self._namespace
            )
            known = self._known[entity.name] = features, inputs
        return known


def _ids(entity: Entity, ids: frozenset[Id]) -> pa.Table:
    columns = list(zip(*(id_parts(id_) for id_ in ids), strict=True))
    return pa.table(
        {
            key.name: pa.array(values, pa.int64() if key.type == "bigint" else pa.string())
            for key, values in zip(entity.keys, columns, strict=True)
        }
    )


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
