"""The offline store: training tables in Iceberg, filled day by day from the engine's tiles.

- `catalog.open_catalog(kind, warehouse, uri=, credential=, region=, endpoint_url=)` opens SQLite, Glue or REST.
- `tables.TILE_TABLES` maps a table's name to its `TileTable` (`WATCH`, `GENRE`, `INTERACTIONS`).
- `export.export_day(engine, catalog, spec, day)` makes one day current, or says that it already was;
  `export.exported_days` says what a table holds, `export.stale_days` which days differ. Where RisingWave's sinks
  write, `verify.verify_day` compares and tags.
- `maintenance.maintain(catalog, spec, now=, keep_snapshots=)` expires, compacts and tidies; tags stay.
  `maintenance.maintain_training_sets` does so with the tables of training sets.
- `forget.ViewerInTiles` and `forget.ViewerInTrainingSet` take one viewer out of a table, its history and its files.
- `training_set.build_training_set(catalog, labels, output, now=, contract_version=)` joins labels with what was
  known at their time; `training_set.reproduce_training_set(catalog, manifest, output)` does so again.
- `training_set.print_training_sql(catalog, labels, dialect)` writes the same join for Trino, Spark or Athena.
- `windows` takes what a feature is from the rolling views; `tables` the columns of a tile from its contract.
- `parity.check_parity(engine, catalog, read_items, now=)` compares what is served with what the tables say;
  `parity.served_items(client, contract, table)` reads what is served from DynamoDB.

Every expected failure is a `catalog.OfflineError`.
"""
