with final as (

  select
$keys
    {{ domain_key() }} as domain_key,
$measures
    {{ epoch_ms("max(last_event_at)") }} as last_event_at
  from {{ ref("$tile") }}
  where {{ within_window("$day", "$first", $window) }}
  group by $by

)

select * from final
