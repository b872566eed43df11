{{ config(materialized="view") }}
with all_buyers as (

  select count(distinct user_id) as buyers
  from {{ ref("user_events") }}
  where event_type = 'purchase' and {{ of_people("user_id") }}

),

final as (

  select
    affinity.category,
    affinity.related_category,
    affinity.pair_buyers,
    affinity.buyers,
    affinity.related_buyers,
    affinity.confidence,
    {{ ratio("affinity.pair_buyers", "all_buyers.buyers") }} as support,
    {{ ratio("affinity.pair_buyers * all_buyers.buyers", "(affinity.buyers * affinity.related_buyers)") }} as lift
  from {{ ref("category_cross_affinity") }} as affinity
  cross join all_buyers

)

select * from final
