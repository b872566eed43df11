with raw as (

  select
    {{ raw_columns("user.events") }}
  from {{ ref("raw_user_events") }}

),

messages as (

  select source, source_partition, source_offset, kafka_timestamp, arrived_at, data, {{ json_of("data") }} as j
  from raw
  {{ computed_once() }}

),

texts as (

  select
    source,
    source_partition,
    source_offset,
    kafka_timestamp,
    arrived_at,
    data,
    j,
    {{ text_field('event_id') }} as event_id,
    {{ text_field('user_id') }} as user_id,
    {{ text_field('item_id') }} as item_id,
    {{ text_field('brand') }} as brand,
    {{ text_field('category') }} as category,
    {{ text_field('price') }} as price_text,
    {{ text_field('event_type') }} as event_type,
    {{ text_field('session_id') }} as session_id,
    {{ text_field('event_time') }} as event_time_text
  from messages
  {{ computed_once() }}

),

fields as (

  select
    source,
    source_partition,
    source_offset,
    kafka_timestamp,
    arrived_at,
    data,
    j,
    event_id,
    user_id,
    item_id,
    brand,
    category,
    {{ decimal_of("price_text") }} as price,
    event_type,
    session_id,
    {{ timestamp_of("event_time_text") }} as event_time
  from texts
  {{ computed_once() }}

),

judged as (

  select
    *,
    case
      {{- common_reasons("user_id", "event_time") }}
    when event_type is null and not {{ field_given("event_type") }} then 'missing event_type'
    when event_type is null or event_type not in ({% for name in var("interaction_weights") %}'{{ name }}'{{ ", " if not loop.last }}{% endfor %}) then 'unknown event_type'
    when price is null and {{ field_given("price") }} then 'bad price'
    when price < 0 then 'negative price'
    end as reason
  from fields
  {{ computed_once() }}

),

final as (

  select
    source,
    source_partition,
    source_offset,
    kafka_timestamp,
    arrived_at,
    case when reason is not null then {{ text_of("data") }} end as payload,
    reason,
    event_id,
    user_id,
    item_id,
    brand,
    category,
    price,
    event_type,
    session_id,
    event_time
  from judged

)

select * from final
