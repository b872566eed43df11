{{ config(materialized="table_with_connector") }}
{{ kept_table(["kafka_topic"]) }}
