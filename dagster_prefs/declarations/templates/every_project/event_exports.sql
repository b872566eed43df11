{{ config(materialized="table_with_connector") }}
{{ kept_table(["topic"]) }}
