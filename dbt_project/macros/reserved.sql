{#
  The ids that are reserved for canaries: viewer ids below 0, and user ids and event ids that start with `canary:`.
  Nobody but the freshness probe sends events with them, so that every other message that has one is rejected; what the
  probe sent is left out of exports, rankings and counts across subjects. dagster_prefs/online/reserved.py is the same rule.
#}

{# Whether a row is of a person and not of a canary; `subject` is the column of the id. #}
{% macro of_people(subject) -%}
  {{ subject }} {{ ">= 0" if subject == "viewer_id" else "not like 'canary:%'" }}
{%- endmacro %}

{% macro reserved_id(subject) -%}
  {{ subject }} {{ "< 0" if subject == "viewer_id" else "like 'canary:%'" }}
{%- endmacro %}

{# Whether a message claims to be a canary: the probe's viewer or user, under an event id as canaries have. #}
{% macro claims_canary(subject) -%}
  {{ subject }} = {{ {"viewer_id": "-1", "user_id": "'canary:prefs'"}[subject] }} and event_id ~ '^canary:[0-9a-f]{16}:[0-9]{1,19}:[0-9a-f]{32}$'
{%- endmacro %}

{# Why a message with a reserved id is rejected that does not even claim to be a canary, as `when … then …` arms. #}
{% macro reserved_reasons(subject) %}
    when {{ reserved_id(subject) }} and not ({{ claims_canary(subject) }}) then 'reserved {{ subject }}'
    when {{ reserved_id("event_id") }} and not ({{ claims_canary(subject) }}) then 'reserved event_id'
{%- endmacro %}

{# The deployment whose canary a message claims to be; NULL for all others, and where it is rejected anyway. #}
{% macro claimed_deployment(subject) -%}
  case when reason is null and {{ claims_canary(subject) }} then split_part(event_id, ':', 2) end
{%- endmacro %}

{#
  Why a claim does not hold, NULL where it does. The digest is over the time that the message says, so that the id of a
  canary is of no use for another time; CanaryKey.event_id in dagster_prefs/events/canaries.py makes the same text.
#}
{% macro unproven_reason(subject, moment) -%}
  {%- set milliseconds = epoch_ms(moment) ~ "::text" -%}
  {%- set inner = hex_digest("canary_keys.secret_hex || " ~ milliseconds) -%}
  case
    when canary_keys.deployment is null then 'canary of another deployment'
    when event_id = 'canary:' || canary_keys.deployment || ':' || {{ milliseconds }} || ':'
      || substr({{ hex_digest("canary_keys.secret_hex || " ~ inner) }}, 1, 32) then null
    else 'reserved {{ subject }}'
  end
{%- endmacro %}

{% macro hex_digest(text) -%}
  encode(sha256(convert_to({{ text }}, 'UTF8')), 'hex')
{%- endmacro %}

{#
  Each message of the CTE `messages` with its final reason, `verdict`: that of `reason`, or where the message claims to be
  a canary (`canary`), whether the deployment's key bears it out.
#}
{% macro verdicts(messages, subject, moment) -%}
  {{ return(adapter.dispatch("verdicts")(messages, subject, moment)) }}
{%- endmacro %}

{% macro postgres__verdicts(messages, subject, moment) -%}
  select {{ messages }}.*, case when canary is null then reason else {{ unproven_reason(subject, moment) }} end as verdict
  from {{ messages }}
  left join {{ ref("canary_keys") }} as canary_keys on canary_keys.deployment = {{ messages }}.canary
{%- endmacro %}

{#
  Only claims go through the join: it would send all other messages, whose key is NULL, to one and the same actor.
  RisingWave takes `canary` into the key of the relation, behind source, partition and offset.
#}
{% macro risingwave__verdicts(messages, subject, moment) -%}
  select {{ messages }}.*, reason as verdict
  from {{ messages }}
  where canary is null
  union all
  select {{ messages }}.*, {{ unproven_reason(subject, moment) }} as verdict
  from {{ messages }}
  left join {{ ref("canary_keys") }} as canary_keys on canary_keys.deployment = {{ messages }}.canary
  where {{ messages }}.canary is not null
{%- endmacro %}
