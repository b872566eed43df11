-- depends_on: {{ ref("kafka_topics") }}
{{ config(topic="$topic", raw_table="$raw") }}
{{ kafka_feed("$topic", ref("$raw")$format) }}
