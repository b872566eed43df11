"""The offline store: training tables in Iceberg, filled day by day from the engine's tiles.

- `catalog.open_catalog(kind, warehouse, uri=, credential=, region=, endpoint_url=)` opens SQLite, Glue or REST.
- `tables.tile_tables(registry)` maps a table's name to its `TileTable`, one of every tile that a project declares.
- `export.export_day(engine, catalog, spec, day)` makes one day current, or says that it already was;
  `export.exported_days` says what a table holds, `export.stale_days` which days differ. Where RisingWave's sinks
  write, `verify.verify_day` compares and tags.
- `maintenance.maintain(catalog, spec, now=, keep_snapshots=)` expires, compacts and tidies; tags stay.
  `maintenance.maintain_training_sets` does so with the tables of training sets.
- `forget.SubjectInTiles` and `forget.SubjectInTrainingSet` remove one subject from a table, its history and its files.
- `windows.Features(registry, entity)` takes what an entity's features are from its rolling views.
- `training_set.build_training_set(catalog, labels, output, features=, now=)` joins labels with what was
  known at their time; `training_set.reproduce_training_set(catalog, manifest, output, registry=)` does so again.
- `training_set.print_training_sql(catalog, labels, dialect, features=)` writes that join for Trino, Spark or Athena.
- `parity.check_parity(engine, catalog, read_items, features=, now=)` compares what is served with what the tables say;
  `parity.served_items(client, contract, table, features)` reads what is served from DynamoDB.

Every expected failure is a `catalog.OfflineError`.
"""
