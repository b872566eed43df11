with long_window as (

  select
    learner_id,
    course_id,
    sum(lessons) as lessons,
    sum(seconds) as seconds,
    max(last_event_at) as last_event_at
  from {{ ref("course_lessons_1d") }}
  where {{ within_window("lesson_date", "learner_id", var("windows").long) }}
  group by learner_id, course_id

),

short_window as (

  select
    learner_id,
    course_id,
    sum(lessons) as lessons
  from {{ ref("course_lessons_1d") }}
  where {{ within_window("lesson_date", "learner_id", var("windows").short) }}
  group by learner_id, course_id

),

final as (

  select
    long_window.learner_id,
    long_window.course_id,
    {{ domain_key() }} as domain_key,
    coalesce(short_window.lessons, 0)::bigint as course_lessons_7d,
    {{ minutes("long_window.seconds") }} as course_minutes_28d,
    {{ epoch_ms("long_window.last_event_at") }} as last_event_at
  from long_window
  left join short_window
    on short_window.learner_id = long_window.learner_id and short_window.course_id = long_window.course_id

)

select * from final
