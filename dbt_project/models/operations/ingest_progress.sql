with arrivals as (

{%- for topic, model in [
  ("user.events", "raw_user_events"), ("view_events", "raw_view_events"),
  ("content_interactions", "raw_content_interactions"), ("items", "raw_items"),
] %}

  select '{{ topic }}' as topic, source, source_partition, source_offset, kafka_timestamp, arrived_at
  from {{ ref(model) }}
  {{ "union all" if not loop.last }}
{%- endfor %}

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
