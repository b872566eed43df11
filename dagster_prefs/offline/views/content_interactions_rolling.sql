-- Written by `prefs contract build` from the dbt model of this name; change that instead.
with final as (

  select
    viewer_id,
    'engagement#interactions'::text as domain_key,
    sum(likes)::bigint as likes_28d,
    sum(shares)::bigint as shares_28d,
    sum(searches)::bigint as searches_28d,
    (extract(epoch from max(last_event_at)) * 1000)::bigint as last_event_at
  from "viewer_interactions_1d"
  where (interaction_date::timestamp at time zone 'UTC') + interval '29 days' > now()
  group by viewer_id

)

select * from final
