with genres as (

  select
    viewer_id,
    genre,
    sum(watch_seconds) as watch_seconds,
    sum(views) as views,
    sum(completions) as completions,
    max(last_event_at) as last_event_at
  from {{ ref("viewer_genre_metrics_1d") }}
  where {{ within_window("watch_date", "viewer_id", var("windows").long) }}
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
    array_agg(coalesce({{ ratio("ranked.watch_seconds", "totals.watch_seconds") }}, 0) order by ranked.place) as favorite_genre_shares
  from ranked
  join totals on totals.viewer_id = ranked.viewer_id
  where ranked.place <= {{ var("favorite_genres") }}
  group by ranked.viewer_id

),

final as (

  select
    totals.viewer_id,
    {{ domain_key() }} as domain_key,
    favorites.favorite_genre,
    favorites.favorite_genres,
    favorites.favorite_genre_shares,
    {{ ratio("totals.completions", "totals.views") }} as completion_rate_28d,
    {{ ratio("totals.watch_seconds", "60 * totals.views") }} as minutes_per_view_28d,
    {{ epoch_ms("totals.last_event_at") }} as last_event_at
  from totals
  join favorites on favorites.viewer_id = totals.viewer_id

)

select * from final
