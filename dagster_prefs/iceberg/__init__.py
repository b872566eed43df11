"""The offline store: training tables in Iceberg, filled by days from the engine's tiles.

- `catalog.open_catalog(kind, warehouse, uri=, credential=, region=, endpoint_url=)` opens SQLite, Glue or REST.
- `tables.tile_tables(registry)` maps a table's name to its `TileTable`, one for every declared tile.
- `export.export_days(engine, catalog, spec, days)` exports those days that the table does not hold already, with
  one commit for many of them, `export.export_day` a single one; `export.exported_days` lists the days of a table,
  `export.stale_days` those that differ from the engine. Where RisingWave's sinks write the table,
  `verify.verify_day` compares and tags a day instead.
- `maintenance.maintain(catalog, spec, now=, keep_snapshots=)` expires snapshots, compacts days and removes
  unreferenced files; tagged snapshots stay. `maintenance.maintain_training_sets` does so for training sets.

Every expected failure is a `catalog.OfflineError`.
"""

# A data file ends once it has this size.
FILE_BYTES = 256 * 1024 * 1024
