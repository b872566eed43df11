with tiles as (

$union

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
