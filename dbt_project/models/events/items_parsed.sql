with raw as (

  select
    {{ raw_columns("items") }}
  from {{ ref("raw_items") }}

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
    {{ text_field('item_id') }} as item_id,
    {{ text_field('title') }} as title,
    {{ text_field('category') }} as category,
    {{ text_field('brand') }} as brand,
    {{ text_field('price') }} as price_text,
    lower(j ->> 'in_stock') as in_stock_text
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
    item_id,
    title,
    category,
    brand,
    {{ decimal_of("price_text") }} as price,
    case in_stock_text when 'true' then true when '1' then true when 'false' then false when '0' then false end as in_stock
  from texts
  {{ computed_once() }}

),

judged as (

  select
    *,
    case
      when j is null then 'not valid JSON'
      when jsonb_typeof(j) <> 'object' then 'not a JSON object'
      when {{ erased("item_id") }} then 'erased'
      when item_id is null and not {{ field_given("item_id") }} then 'missing item_id'
      when item_id is null then 'bad item_id'
      when price is null and {{ field_given("price") }} then 'bad price'
      when price < 0 then 'negative price'
      when in_stock is null and {{ field_given("in_stock") }} then 'bad in_stock'
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
    item_id,
    title,
    category,
    brand,
    price,
    coalesce(in_stock, true) as in_stock
  from judged

)

select * from final
