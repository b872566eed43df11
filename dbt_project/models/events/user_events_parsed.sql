{%- call parsed_messages(
  ref("raw_user_events"),
  {
    "event_id": "text",
    "user_id": "text",
    "item_id": "text",
    "brand": "text",
    "category": "text",
    "price": "decimal",
    "event_type": "text",
    "session_id": "text",
    "event_time": "timestamp",
  },
) %}
    {{- common_reasons("user_id", "event_time") }}
    when event_type is null and not {{ field_given("event_type") }} then 'missing event_type'
    when event_type is null or event_type not in ('{{ var("interaction_weights") | join("', '") }}') then 'unknown event_type'
    when price is null and {{ field_given("price") }} then 'bad price'
    when price < 0 then 'negative price'
{%- endcall %}
