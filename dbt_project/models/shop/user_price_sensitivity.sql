with priced as (

  select user_id, event_type, {{ price_tier("price") }} as price_tier
  from {{ ref("user_events") }}
  where price is not null

),

final as (

  select
    user_id,
    price_tier,
    count(*) filter (where event_type = 'view') as views,
    count(*) filter (where event_type = 'purchase') as purchases,
    {{ ratio("count(*) filter (where event_type = 'purchase')", "count(*) filter (where event_type = 'view')") }} as conversion_rate
  from priced
  group by user_id, price_tier

)

select * from final
