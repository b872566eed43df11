with final as (

  select
$keys
    {{ utc_date("$time") }} as event_date,
    count(*) as events,
$measures
    max($time) as last_event_at
  from {{ ref("$topic") }}
  group by $by, {{ utc_date("$time") }}

)

select * from final
