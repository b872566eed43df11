with final as (

  select
    user_id,
    brand,
    sum({{ interaction_weight("event_type") }}) as brand_affinity,
    count(*) filter (where event_type = 'purchase') as purchase_count,
    max(event_time) as last_brand_interaction
  from {{ ref("user_events") }}
  where brand is not null
  group by user_id, brand

)

select * from final
