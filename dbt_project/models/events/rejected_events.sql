with rejected as (

  select 'user.events' as topic, source, source_partition, source_offset, reason, payload
  from {{ ref("user_events_parsed") }}
  where reason is not null
  union all
  select 'view_events' as topic, source, source_partition, source_offset, reason, payload
  from {{ ref("view_events_parsed") }}
  where reason is not null
  union all
  select 'content_interactions' as topic, source, source_partition, source_offset, reason, payload
  from {{ ref("content_interactions_parsed") }}
  where reason is not null
  union all
  select 'items' as topic, source, source_partition, source_offset, reason, payload
  from {{ ref("items_parsed") }}
  where reason is not null

),

final as (

  select
    topic,
    source,
    source_partition as "partition",
    source_offset as "offset",
    reason,
    payload
  from rejected

)

select * from final
