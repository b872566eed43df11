with hours as (

  select
    user_id,
    category,
    date_trunc('hour', event_time at time zone 'UTC') at time zone 'UTC' as window_start,
    event_time
  from {{ ref("user_events") }}
  where category is not null

),

final as (

  select
    user_id,
    category,
    count(*) as recent_interactions,
    window_start,
    window_start + interval '1 hour' as window_end,
    min(event_time) as first_event_at,
    max(event_time) as last_event_at
  from hours
  group by user_id, category, window_start

)

select * from final
