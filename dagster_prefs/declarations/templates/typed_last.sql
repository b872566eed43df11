${config}with valid as (

  select * from {{ ref("$parsed") }} where reason is null

),

versions as (

  select
    *,
    row_number() over (
      partition by $identity
      order by arrived_at desc, source desc, source_partition desc, source_offset desc
    ) as version
  from valid

),

final as (

  select $columns
  from versions
  where version = 1

)

select * from final
