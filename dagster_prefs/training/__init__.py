"""Training sets: labels joined with the features known at their time, and the comparison with what is served.

- `windows.Features(registry, entity)` derives an entity's features from its rolling views.
- `training_set.build_training_set(catalog, LabelJoin(labels, features, now), output)` joins labels with the features
  known at their time; `training_set.reproduce_training_set(catalog, manifest, output, registry=)` repeats a join.
- `training_set.print_training_sql(catalog, labels, dialect, features=)` writes that join for Trino, Spark or Athena.
- `parity.check_parity(engine, catalog, read_items, features=, now=)` compares served values with those of the training
  tables; `parity.served_items(client, contract, table, features)` reads the served items from DynamoDB.

Every expected failure is an `iceberg.catalog.OfflineError`.
"""
