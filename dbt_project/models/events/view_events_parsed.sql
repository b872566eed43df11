with raw as (

  select
    {{ raw_columns("view_events") }}
  from {{ ref("raw_view_events") }}

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
    {{ text_field('content_id') }} as content_id,
    {{ text_field('genre') }} as genre,
    {{ text_field('watch_duration_sec') }} as watch_duration_sec_text,
    {{ text_field('completion_pct') }} as completion_pct_text,
    {{ text_field('watched_at') }} as watched_at_text
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
    content_id,
    genre,
    {{ integer_of("watch_duration_sec_text", 'int') }} as watch_duration_sec,
    {{ decimal_of("completion_pct_text") }} as completion_pct,
    {{ timestamp_of("watched_at_text") }} as watched_at
  from texts
  {{ computed_once() }}

),

judged as (

  select
    *,
    case
      {{- common_reasons("viewer_id", "watched_at") }}
    when watch_duration_sec is null and {{ field_given("watch_duration_sec") }} then 'bad watch_duration_sec'
    when watch_duration_sec < 0 then 'negative watch_duration_sec'
    when completion_pct is null and {{ field_given("completion_pct") }} then 'bad completion_pct'
    when completion_pct < 0 or completion_pct > 1 then 'completion_pct outside 0..1'
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
    content_id,
    genre,
    watch_duration_sec,
    completion_pct,
    watched_at
  from judged

)

select * from final
