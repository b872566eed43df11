with purchases as (

  select user_id, category
  from {{ ref("user_events") }}
  where event_type = 'purchase' and category is not null and {{ of_people("user_id") }}
  group by user_id, category

),

buyers as (

  select category, count(*) as buyers
  from purchases
  group by category

),

pairs as (

  select a.category, b.category as related_category, count(*) as pair_buyers
  from purchases as a
  join purchases as b on b.user_id = a.user_id
  where a.category <> b.category
  group by a.category, b.category

),

final as (

  select
    pairs.category,
    pairs.related_category,
    pairs.pair_buyers,
    buyers.buyers,
    related.buyers as related_buyers,
    {{ ratio("pairs.pair_buyers", "buyers.buyers") }} as confidence
  from pairs
  join buyers on buyers.category = pairs.category
  join buyers as related on related.category = pairs.related_category

)

select * from final
