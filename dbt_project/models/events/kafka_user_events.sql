-- depends_on: {{ ref("kafka_topics") }}
{{ config(topic="user.events", raw_table="raw_user_events") }}
{{ kafka_feed("user.events", ref("raw_user_events")) }}
