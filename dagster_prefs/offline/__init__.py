"""The offline store: training tables in Iceberg, filled day by day from the engine's tiles.

- `catalog.open_catalog(kind, warehouse, uri=, region=, endpoint_url=)` opens SQLite, Glue or REST.
- `tables.TILE_TABLES` maps a table's name to its `TileTable` (`WATCH`, `GENRE`, `INTERACTIONS`).
- `export.export_day(engine, catalog, spec, day)` makes one day current, or says that it already was;
  `export.export_days` does so for a range, `export.days_to_export` says which days differ.

Every expected failure is a `catalog.OfflineError`.
"""
