-- depends_on: {{ ref("kafka_topics") }}
{{ config(topic="content_interactions", raw_table="raw_content_interactions") }}
{{ kafka_feed("content_interactions", ref("raw_content_interactions")) }}
