{{ config(materialized="sink", enabled=target.type == "risingwave" and env_var("PREFS_EXPORT", "platform") == "sink") }}

{{ iceberg_sink(ref("$relation"), "$entity", "$table", $unique) }}
