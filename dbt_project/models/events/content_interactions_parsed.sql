with raw as (

  select
    {{ raw_columns("content_interactions") }}
  from {{ ref("raw_content_interactions") }}

),

messages as (

  select source, source_partition, source_offset, kafka_timestamp, arrived_at, data, {{ json_of("data") }} as j
  from raw

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
    {{ text_field('event_id') }} as event_id,
    {{ integer_of(text_field('viewer_id'), 'bigint') }} as viewer_id,
    {{ text_field('event_type') }} as event_type,
    {{ timestamp_of(text_field('event_ts')) }} as event_ts
  from messages

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
