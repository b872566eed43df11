-- depends_on: {{ ref("kafka_topics") }}
{{ config(topic="view_events", raw_table="raw_view_events") }}
{{ kafka_feed("view_events", ref("raw_view_events")) }}
