with final as (

  select
    user_id,
    category,
    sum({{ interaction_weight("event_type") }} * {{ decay_factor("event_time") }}) as decayed_weight,
    max(event_time) as last_engaged_at
  from {{ ref("user_events") }}
  where category is not null
  group by user_id, category

)

select * from final
