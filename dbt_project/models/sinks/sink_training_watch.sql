{{ config(materialized="sink", enabled=target.type == "risingwave" and env_var("PREFS_EXPORT", "platform") == "sink") }}

{{ iceberg_sink(ref("viewer_watch_metrics_1d"), "viewer_watch_daily", ["viewer_id", "watch_date"]) }}
