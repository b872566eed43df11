{{ config(indexes=[{"columns": ["topic", "reason"]}] + (
  [{"columns": ["topic", "source", '"partition"', '"offset"'], "unique": true}] if target.type == "postgres" else []
)) }}
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
