{{ config(materialized="sink", enabled=target.type == "risingwave" and env_var("PREFS_EXPORT", "platform") == "sink") }}

{{ iceberg_sink(ref("viewer_genre_metrics_1d"), "viewer_genre_daily", ["viewer_id", "watch_date", "genre"]) }}
