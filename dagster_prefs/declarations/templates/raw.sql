{{ config(materialized="table_with_connector") }}
{%- do source("kafka", "$topic") %}
{{ raw_event_table("$topic") }}
