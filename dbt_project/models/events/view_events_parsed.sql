{%- call parsed_messages(ref("raw_view_events")) %}
    {{- common_reasons("viewer_id", "watched_at") }}
    {{- optional_reasons() }}
{%- endcall %}
