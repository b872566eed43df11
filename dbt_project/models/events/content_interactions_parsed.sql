{%- call parsed_messages(ref("raw_content_interactions"), subject="viewer_id", moment="event_ts") %}
    {{- common_reasons("viewer_id", "event_ts") }}
    when event_type is null and not {{ field_given("event_type") }} then 'missing event_type'
    when event_type is null or event_type not in ('like', 'share', 'search') then 'unknown event_type'
{%- endcall %}
