with final as (

  select
    viewer_id,
    {{ utc_date("event_ts") }} as interaction_date,
    count(*) filter (where event_type = 'like') as likes,
    count(*) filter (where event_type = 'share') as shares,
    count(*) filter (where event_type = 'search') as searches,
    max(event_ts) as last_event_at
  from {{ ref("content_interactions") }}
  group by viewer_id, {{ utc_date("event_ts") }}

)

select * from final
