"""Training sets: labels joined with what was known at their time, and whether that equals what is served.

- `windows.Features(registry, entity)` takes what an entity's features are from its rolling views.
- `training_set.build_training_set(catalog, LabelJoin(labels, features, now), output)` joins labels with what was
  known at their time; `training_set.reproduce_training_set(catalog, manifest, output, registry=)` does so again.
- `training_set.print_training_sql(catalog, labels, dialect, features=)` writes that join for Trino, Spark or Athena.
- `parity.check_parity(engine, catalog, read_items, features=, now=)` compares what is served with what the tables say;
  `parity.served_items(client, contract, table, features)` reads what is served from DynamoDB.

Every expected failure is an `iceberg.catalog.OfflineError`.
"""
