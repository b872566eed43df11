{%- set drift = var("tier_drift") %}
with recent as (

  select user_id, {{ ratio("sum(" ~ price_level("price") ~ ")", "count(*)") }} as level, count(*) as views
  from {{ ref("user_events") }}
  where
    event_type = 'view'
    and price is not null
    and event_time >= {{ clock() }} - interval '{{ drift.recent_days }} days'
  group by user_id

),

baseline as (

  select user_id, {{ ratio("sum(" ~ price_level("price") ~ ")", "count(*)") }} as level, count(*) as views
  from {{ ref("user_events") }}
  where
    event_type = 'view'
    and price is not null
    and event_time >= {{ clock() }} - interval '{{ drift.recent_days + drift.baseline_days }} days'
    and event_time < {{ clock() }} - interval '{{ drift.recent_days }} days'
  group by user_id

),

compared as (

  select
    coalesce(baseline.user_id, recent.user_id) as user_id,
    baseline.level as baseline_level,
    recent.level as recent_level,
    recent.level - baseline.level as drift,
    coalesce(baseline.views, 0) >= {{ drift.min_views }} and coalesce(recent.views, 0) >= {{ drift.min_views }} as enough_views
  from baseline
  full outer join recent on recent.user_id = baseline.user_id

),

final as (

  select
    user_id,
    {{ tier_name("baseline_level") }} as baseline_tier,
    {{ tier_name("recent_level") }} as recent_tier,
    baseline_level,
    recent_level,
    drift,
    case
      when enough_views and drift >= {{ drift.threshold }} then 'up'
      when enough_views and drift <= -{{ drift.threshold }} then 'down'
      else 'none'
    end as direction
  from compared

)

select * from final
