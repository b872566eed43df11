{{ config(materialized="table_with_connector") }}
{{ kept_table(["topic", "source", "source_partition", "source_offset"]) }}
