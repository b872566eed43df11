with final as (

  select
    viewer_id,
    {{ domain_key() }} as domain_key,
    sum(likes)::bigint as likes_28d,
    sum(shares)::bigint as shares_28d,
    sum(searches)::bigint as searches_28d,
    {{ epoch_ms("max(last_event_at)") }} as last_event_at
  from {{ ref("viewer_interactions_1d") }}
  where {{ within_window("interaction_date", "viewer_id", var("windows").long) }}
  group by viewer_id

)

select * from final
