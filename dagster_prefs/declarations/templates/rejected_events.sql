with rejected as (

$union

),

final as (

  select
    topic,
    source,
    source_partition as "partition",
    source_offset as "offset",
    reason,
    payload
  from rejected

)

select * from final
