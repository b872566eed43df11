with valid as (

  select * from {{ ref("content_interactions_parsed") }} where reason is null

),

erased as (

  select subject_id, erased_at from {{ ref("erased_subjects") }} where subject_kind = 'viewer'

),

remembered as (

  select valid.*
  from valid
  left join erased on erased.subject_id = valid.viewer_id::text
  where erased.subject_id is null or valid.event_ts > erased.erased_at

),

deliveries as (

  select
    *,
    row_number() over (
      partition by event_id
      order by arrived_at, source, source_partition, source_offset
    ) as delivery
  from remembered

),

final as (

  select
    event_id,
    viewer_id,
    event_type,
    event_ts
  from deliveries
  where delivery = 1

)

select * from final
