with ranked as (

  select
    viewer_id,
    event_id,
    content_id,
    completion_pct,
    watched_at,
    row_number() over (partition by viewer_id order by watched_at desc, event_id) as place
  from {{ ref("view_events") }}
  where {{ within_window(utc_date("watched_at"), "viewer_id", var("windows").long) }}

),

final as (

  select
    viewer_id,
    {{ domain_key() }} as domain_key,
    array_agg(content_id order by watched_at desc, event_id) as recent_content_ids,
    array_agg({{ epoch_ms("watched_at") }} order by watched_at desc, event_id) as recent_watched_at,
    array_agg(completion_pct order by watched_at desc, event_id) as recent_completions,
    {{ epoch_ms("max(watched_at)") }} as last_event_at
  from ranked
  where place <= {{ var("sequence_length") }}
  group by viewer_id

)

select * from final
