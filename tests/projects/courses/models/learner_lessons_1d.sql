with final as (

  select
    learner_id,
    {{ utc_date("happened_at") }} as lesson_date,
    count(*) filter (where event_type = 'started') as lessons,
    coalesce(sum(seconds), 0) as seconds,
    count(*) filter (where event_type = 'finished') as finishes,
    max(happened_at) as last_event_at
  from {{ ref("lesson_events") }}
  group by learner_id, {{ utc_date("happened_at") }}

)

select * from final
