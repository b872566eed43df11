{{ config(materialized="table_with_connector") }}
{{ raw_event_table("$topic") }}
