with ranked as (

  select
    user_id,
    event_id,
    item_id,
    event_type,
    event_time,
    row_number() over (partition by user_id order by event_time desc, event_id) as place
  from {{ ref("user_events") }}
  where {{ within_window(utc_date("event_time"), "user_id", var("windows").long) }}

),

final as (

  select
    user_id,
    array_agg(item_id order by event_time desc, event_id) as recent_item_ids,
    array_agg(event_type order by event_time desc, event_id) as recent_event_types,
    array_agg({{ epoch_ms("event_time") }} order by event_time desc, event_id) as recent_event_times,
    max(event_time) as last_event_at
  from ranked
  where place <= {{ var("sequence_length") }}
  group by user_id

)

select * from final
