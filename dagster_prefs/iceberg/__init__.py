"""The offline store: training tables in Iceberg, filled day by day from the engine's tiles.

- `catalog.open_catalog(kind, warehouse, uri=, credential=, region=, endpoint_url=)` opens SQLite, Glue or REST.
- `tables.tile_tables(registry)` maps a table's name to its `TileTable`, one of every tile that a project declares.
- `export.export_day(engine, catalog, spec, day)` makes one day current, or says that it already was;
  `export.exported_days` says what a table holds, `export.stale_days` which days differ. Where RisingWave's sinks
  write, `verify.verify_day` compares and tags.
- `maintenance.maintain(catalog, spec, now=, keep_snapshots=)` expires, compacts and tidies; tags stay.
  `maintenance.maintain_training_sets` does so with the tables of training sets.

Every expected failure is a `catalog.OfflineError`.
"""
