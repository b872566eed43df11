{{ config(materialized="view") }}
with final as (

  select
    user_id,
    category,
    decayed_weight / {{ decay_factor(clock()) }} as affinity_score,
    last_engaged_at
  from {{ ref("user_category_affinity_decayed") }}

)

select * from final
