with final as (

  select
    learner_id,
    course_id,
    {{ utc_date("happened_at") }} as lesson_date,
    count(*) filter (where event_type = 'started') as lessons,
    coalesce(sum(seconds), 0) as seconds,
    max(happened_at) as last_event_at
  from {{ ref("lesson_events") }}
  where course_id is not null
  group by learner_id, course_id, {{ utc_date("happened_at") }}

)

select * from final
