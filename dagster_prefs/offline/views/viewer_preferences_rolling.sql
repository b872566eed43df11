-- Written by `prefs contract build` from the dbt model of this name; change that instead.
with genres as (

  select
    viewer_id,
    genre,
    sum(watch_seconds) as watch_seconds,
    sum(views) as views,
    sum(completions) as completions,
    max(last_event_at) as last_event_at
  from "viewer_genre_metrics_1d"
  where (watch_date::timestamp at time zone 'UTC') + interval '29 days' > now()
  group by viewer_id, genre

),

totals as (

  select
    viewer_id,
    sum(watch_seconds) as watch_seconds,
    sum(views) as views,
    sum(completions) as completions,
    max(last_event_at) as last_event_at
  from genres
  group by viewer_id

),

ranked as (

  select
    viewer_id,
    genre,
    watch_seconds,
    row_number() over (partition by viewer_id order by watch_seconds desc, genre) as place
  from genres

),

favorites as (

  select
    ranked.viewer_id,
    max(case when ranked.place = 1 then ranked.genre end) as favorite_genre,
    array_agg(ranked.genre order by ranked.place) as favorite_genres,
    array_agg(coalesce(round((ranked.watch_seconds)::numeric / nullif(totals.watch_seconds, 0), 6), 0) order by ranked.place) as favorite_genre_shares
  from ranked
  join totals on totals.viewer_id = ranked.viewer_id
  where ranked.place <= 5
  group by ranked.viewer_id

),

final as (

  select
    totals.viewer_id,
    'engagement#preferences'::text as domain_key,
    favorites.favorite_genre,
    favorites.favorite_genres,
    favorites.favorite_genre_shares,
    round((totals.completions)::numeric / nullif(totals.views, 0), 6) as completion_rate_28d,
    round((totals.watch_seconds)::numeric / nullif(60 * totals.views, 0), 6) as minutes_per_view_28d,
    (extract(epoch from totals.last_event_at) * 1000)::bigint as last_event_at
  from totals
  join favorites on favorites.viewer_id = totals.viewer_id

)

select * from final
