-- depends_on: {{ ref("kafka_topics") }}
{{ config(topic="$topic", raw_table="$raw") }}
{%- do source("kafka", "$topic") %}
{{ kafka_feed("$topic", ref("$raw")$format) }}
