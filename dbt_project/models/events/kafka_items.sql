-- depends_on: {{ ref("kafka_topics") }}
{{ config(topic="items", raw_table="raw_items") }}
{{ kafka_feed("items", ref("raw_items")) }}
