with final as (

  select
    viewer_id,
    {{ utc_date("watched_at") }} as watch_date,
    genre,
    coalesce(sum(watch_duration_sec), 0) as watch_seconds,
    count(*) as views,
    count(*) filter (where completion_pct >= {{ var("completion_threshold") }}) as completions,
    max(watched_at) as last_event_at
  from {{ ref("view_events") }}
  where genre is not null
  group by viewer_id, {{ utc_date("watched_at") }}, genre

)

select * from final
