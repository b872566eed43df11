with tiles as (

  select
    'viewer_watch_metrics_1d' as tile,
    watch_date as tile_date,
    watch_seconds::numeric as metric,
    concat_ws('|', viewer_id, watch_seconds, views, content_started, completions, genres_watched, {{ epoch_ms("last_event_at") }}) as content,
    last_event_at
  from {{ ref("viewer_watch_metrics_1d") }}
  where {{ of_people("viewer_id") }}
  union all
  select
    'viewer_genre_metrics_1d' as tile,
    watch_date as tile_date,
    watch_seconds::numeric as metric,
    concat_ws('|', viewer_id, genre, watch_seconds, views, completions, {{ epoch_ms("last_event_at") }}) as content,
    last_event_at
  from {{ ref("viewer_genre_metrics_1d") }}
  where {{ of_people("viewer_id") }}
  union all
  select
    'viewer_interactions_1d' as tile,
    interaction_date as tile_date,
    (likes + shares + searches)::numeric as metric,
    concat_ws('|', viewer_id, likes, shares, searches, {{ epoch_ms("last_event_at") }}) as content,
    last_event_at
  from {{ ref("viewer_interactions_1d") }}
  where {{ of_people("viewer_id") }}

),

final as (

  select
    tile,
    tile_date,
    count(*) as row_count,
    sum(metric) as metric_total,
    sum({{ row_hash("content") }}) as content_hash,
    max(last_event_at) as last_event_at
  from tiles
  group by tile, tile_date

)

select * from final
