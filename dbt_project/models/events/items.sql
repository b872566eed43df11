with valid as (

  select * from {{ ref("items_parsed") }} where reason is null

),

versions as (

  select
    *,
    row_number() over (
      partition by item_id
      order by arrived_at desc, source desc, source_partition desc, source_offset desc
    ) as version
  from valid

),

final as (

  select item_id, title, category, brand, price, coalesce(in_stock, true) as in_stock
  from versions
  where version = 1

)

select * from final
