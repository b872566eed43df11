with long_window as (

  select
    viewer_id,
    sum(watch_seconds) as watch_seconds,
    sum(completions) as completions,
    sum(genres_watched) as genres_watched,
    max(last_event_at) as last_event_at
  from {{ ref("viewer_watch_metrics_1d") }}
  where {{ within_window("watch_date", "viewer_id", var("windows").long) }}
  group by viewer_id

),

short_window as (

  select
    viewer_id,
    sum(watch_seconds) as watch_seconds,
    sum(content_started) as titles
  from {{ ref("viewer_watch_metrics_1d") }}
  where {{ within_window("watch_date", "viewer_id", var("windows").short) }}
  group by viewer_id

),

final as (

  select
    long_window.viewer_id,
    {{ domain_key() }} as domain_key,
    {{ minutes("coalesce(short_window.watch_seconds, 0)") }} as watch_minutes_7d,
    {{ minutes("long_window.watch_seconds") }} as watch_minutes_28d,
    coalesce(short_window.titles, 0)::bigint as titles_7d,
    long_window.completions::bigint as completions_28d,
    long_window.genres_watched::bigint as genres_watched_28d,
    {{ epoch_ms("long_window.last_event_at") }} as last_event_at
  from long_window
  left join short_window on short_window.viewer_id = long_window.viewer_id

)

select * from final
