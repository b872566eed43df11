{{ config(materialized="sink", enabled=target.type == "risingwave" and env_var("PREFS_EXPORT", "platform") == "sink" and env_var("PREFS_RAW_RETENTION_SECONDS", "") != "") }}

create sink {{ this }} as
select * from (
$query
) as messages
{{ raw_sink_options("$raw") }}
