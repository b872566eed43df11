with final as (

  select
    visitor_id,
    {{ utc_date("viewed_at") }} as view_date,
    count(*) as views,
    coalesce(sum(seconds), 0) as seconds,
    max(viewed_at) as last_event_at
  from {{ ref("page_views") }}
  group by visitor_id, {{ utc_date("viewed_at") }}

)

select * from final
