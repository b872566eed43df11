{#- Of what views have read: raw tables may forget their messages, also before this is made again. -#}
with arrivals as (

$union

),

final as (

  select
    topic,
    source,
    source_partition,
    max(source_offset) as last_offset,
    count(*) as messages,
    max(kafka_timestamp) as last_kafka_timestamp,
    max(arrived_at) as last_arrived_at
  from arrivals
  group by topic, source, source_partition

)

select * from final
