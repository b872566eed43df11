with final as (

  select
    visitor_id,
    {{ domain_key() }} as domain_key,
    sum(views)::bigint as views_28d,
    {{ minutes("sum(seconds)") }} as minutes_28d,
    {{ epoch_ms("max(last_event_at)") }} as last_event_at
  from {{ ref("visitor_pages_1d") }}
  where {{ within_window("view_date", "visitor_id", var("windows").long) }}
  group by visitor_id

)

select * from final
