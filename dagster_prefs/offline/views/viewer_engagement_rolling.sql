-- Written by `prefs contract build` from the dbt model of this name; change that instead.
with long_window as (

  select
    viewer_id,
    sum(watch_seconds) as watch_seconds,
    sum(completions) as completions,
    sum(genres_watched) as genres_watched,
    max(last_event_at) as last_event_at
  from "viewer_watch_metrics_1d"
  where (watch_date::timestamp at time zone 'UTC') + interval '29 days' > now()
  group by viewer_id

),

short_window as (

  select
    viewer_id,
    sum(watch_seconds) as watch_seconds,
    sum(content_started) as titles
  from "viewer_watch_metrics_1d"
  where (watch_date::timestamp at time zone 'UTC') + interval '8 days' > now()
  group by viewer_id

),

final as (

  select
    long_window.viewer_id,
    'engagement#watch'::text as domain_key,
    round(coalesce(short_window.watch_seconds, 0) / 60.0, 6) as watch_minutes_7d,
    round(long_window.watch_seconds / 60.0, 6) as watch_minutes_28d,
    coalesce(short_window.titles, 0)::bigint as titles_7d,
    long_window.completions::bigint as completions_28d,
    long_window.genres_watched::bigint as genres_watched_28d,
    (extract(epoch from long_window.last_event_at) * 1000)::bigint as last_event_at
  from long_window
  left join short_window on short_window.viewer_id = long_window.viewer_id

)

select * from final
