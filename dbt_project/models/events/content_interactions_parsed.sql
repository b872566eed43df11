with raw as (

  select
    {{ raw_columns("content_interactions") }}
  from {{ ref("raw_content_interactions") }}

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
    {{ text_field('viewer_id') }} as viewer_id_text,
    {{ text_field('event_type') }} as event_type,
    {{ text_field('event_ts') }} as event_ts_text
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
    {{ integer_of("viewer_id_text", 'bigint') }} as viewer_id,
    event_type,
    {{ timestamp_of("event_ts_text") }} as event_ts
  from texts
  {{ computed_once() }}

),

judged as (

  select
    *,
    case
      {{- common_reasons("viewer_id", "event_ts") }}
    when event_type is null and not {{ field_given("event_type") }} then 'missing event_type'
    when event_type is null or event_type not in ('like', 'share', 'search') then 'unknown event_type'
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
    viewer_id,
    event_type,
    event_ts
  from judged

)

select * from final
