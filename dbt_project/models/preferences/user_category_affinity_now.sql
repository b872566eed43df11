{{ config(materialized="view") }}
with final as (

  select
    user_id,
    category,
    decayed_weight / power(2::double precision, {{ half_lives(clock()) }}) as affinity_score,
    last_engaged_at
  from {{ ref("user_category_affinity_decayed") }}

)

select * from final
