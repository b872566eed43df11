{%- call parsed_messages(
  ref("raw_view_events"),
  {
    "event_id": "text",
    "viewer_id": "bigint",
    "content_id": "text",
    "genre": "text",
    "watch_duration_sec": "int",
    "completion_pct": "decimal",
    "watched_at": "timestamp",
  },
) %}
    {{- common_reasons("viewer_id", "watched_at") }}
    when watch_duration_sec is null and {{ field_given("watch_duration_sec") }} then 'bad watch_duration_sec'
    when watch_duration_sec < 0 then 'negative watch_duration_sec'
    when completion_pct is null and {{ field_given("completion_pct") }} then 'bad completion_pct'
    when completion_pct < 0 or completion_pct > 1 then 'completion_pct outside 0..1'
{%- endcall %}
