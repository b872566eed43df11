with final as (

  select
    viewer_id,
    {{ utc_date("watched_at") }} as watch_date,
    coalesce(sum(watch_duration_sec), 0) as watch_seconds,
    {{ minutes("coalesce(sum(watch_duration_sec), 0)") }} as watch_time_minutes,
    count(*) as views,
    count(distinct content_id) as content_started,
    count(*) filter (where completion_pct >= {{ var("completion_threshold") }}) as completions,
    count(distinct genre) as genres_watched,
    max(watched_at) as last_event_at
  from {{ ref("view_events") }}
  group by viewer_id, {{ utc_date("watched_at") }}

)

select * from final
