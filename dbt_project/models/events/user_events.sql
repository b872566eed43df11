with valid as (

  select * from {{ ref("user_events_parsed") }} where reason is null

),

erased as (

  select subject_id, erased_at from {{ ref("erased_subjects") }} where subject_kind = 'user'

),

remembered as (

  select valid.*
  from valid
  left join erased on erased.subject_id = valid.user_id
  where erased.subject_id is null or valid.event_time > erased.erased_at

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
    user_id,
    item_id,
    brand,
    category,
    price,
    event_type,
    session_id,
    event_time
  from deliveries
  where delivery = 1

)

select * from final
