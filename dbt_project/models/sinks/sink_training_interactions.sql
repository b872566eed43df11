{{ config(materialized="sink", enabled=target.type == "risingwave" and env_var("PREFS_EXPORT", "platform") == "sink") }}

{{ iceberg_sink(ref("viewer_interactions_1d"), "viewer_interactions_daily", ["viewer_id", "interaction_date"]) }}
