{%- call parsed_messages(ref("raw_user_events"), subject="user_id", moment="event_time") %}
    {{- common_reasons("user_id", "event_time") }}
    when event_type is null and not {{ field_given("event_type") }} then 'missing event_type'
    when event_type is null or event_type not in ('{{ var("interaction_weights") | join("', '") }}') then 'unknown event_type'
    {{- optional_reasons() }}
{%- endcall %}
