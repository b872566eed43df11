{%- call parsed_messages(ref("raw_view_events"), subject="viewer_id", moment="watched_at") %}
    {{- common_reasons("viewer_id", "watched_at") }}
    {{- optional_reasons() }}
{%- endcall %}
