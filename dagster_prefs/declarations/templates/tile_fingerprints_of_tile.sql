  select
    '$relation' as tile,
    $day as tile_date,
    $metric::numeric as metric,
    concat_ws('|', $content) as content,
    last_event_at
  from {{ ref("$relation") }}
  where {{ of_people("$key") }}
