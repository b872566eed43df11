  select '$topic' as topic, source, source_partition, source_offset, kafka_timestamp, arrived_at
  from {{ ref("$parsed") }}
