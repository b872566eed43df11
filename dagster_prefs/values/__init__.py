"""Are the values sensible: statistics of every attribute and day, and whether a day drifted from those before it.

- `statistics.Statistics` is what is kept of one attribute of one relation and day; `describe.describe` makes it of
  Arrow batches, with DuckDB.
- `collect.collect_tiles` and `collect.collect_views` describe complete tile days and the rolling views.
- `store.write_statistics`, `store.read_statistics` and `store.latest_statistics` keep them in an Iceberg table.
- `drift.judge` compares a day with earlier days of the same weekday; `drift.causes` groups what was found.
"""
