with long_window as (

  select
    learner_id,
    sum(seconds) as seconds,
    max(last_event_at) as last_event_at
  from {{ ref("learner_lessons_1d") }}
  where {{ within_window("lesson_date", "learner_id", var("windows").long) }}
  group by learner_id

),

short_window as (

  select
    learner_id,
    sum(lessons) as lessons
  from {{ ref("learner_lessons_1d") }}
  where {{ within_window("lesson_date", "learner_id", var("windows").short) }}
  group by learner_id

),

subjects as (

  select
    learner_id,
    subject,
    sum(coalesce(seconds, 0)) as seconds
  from {{ ref("lesson_events") }}
  where subject is not null
  group by learner_id, subject

),

ranked as (

  select
    learner_id,
    subject,
    row_number() over (partition by learner_id order by seconds desc, subject) as place
  from subjects

),

favorites as (

  select
    learner_id,
    array_agg(subject order by place) as favorite_subjects
  from ranked
  where place <= 5
  group by learner_id

),

final as (

  select
    long_window.learner_id,
    {{ domain_key() }} as domain_key,
    coalesce(short_window.lessons, 0)::bigint as lessons_7d,
    {{ minutes("long_window.seconds") }} as minutes_28d,
    favorites.favorite_subjects,
    {{ epoch_ms("long_window.last_event_at") }} as last_event_at
  from long_window
  left join short_window on short_window.learner_id = long_window.learner_id
  left join favorites on favorites.learner_id = long_window.learner_id

)

select * from final
