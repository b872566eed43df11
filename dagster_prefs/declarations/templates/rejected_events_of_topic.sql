  select '$topic' as topic, source, source_partition, source_offset, reason, payload
  from {{ ref("$parsed") }}
  where reason is not null
