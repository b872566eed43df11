{#
  The ids that are reserved for canaries, by the type of an entity's first key (`entities` in dbt_project.yml): numbers
  below 0, texts that start with `canary:`, UUIDs that start with 00000000-0000-0000-0000-; and identities of events
  that start with `canary:`. Only the freshness probe may send events with reserved ids: every other such message is
  rejected. The probe's events are left out of exports, rankings and counts across entities.
  dagster_prefs/declarations/reserved.py is the same rule.
#}

{# The declaration of an entity. #}
{% macro entity_of(entity) -%}
  {%- if entity not in var("entities") -%}
    {{ exceptions.raise_compiler_error("no entity " ~ entity ~ " in dbt_project.yml, vars: entities, which has " ~ var("entities") | join(", ")) }}
  {%- endif -%}
  {{ return(var("entities")[entity]) }}
{%- endmacro %}

{# The first key column of an entity, to which reserved ids and events refer. #}
{% macro first_key(entity) -%}
  {{ return(entity_of(entity)["keys"] | first) }}
{%- endmacro %}

{#
  The name under which an erasure is recorded: the first entity with the same first key, because an erasure covers all
  of them.
#}
{% macro subject_kind(entity) -%}
  {%- for name, declared in var("entities").items() if declared["keys"] | first == first_key(entity) -%}
    {{ return(name) }}
  {%- endfor -%}
{%- endmacro %}

{#
  The sort key of an entity's items, named domain_key: the domain's key, followed by every key column but the first.
  Table.sort_text in dagster_prefs/declarations/contract.py is the same rule.
#}
{% macro sort_key(entity) -%}
  domain_key
  {%- for column in (entity_of(entity)["keys"] | list)[1:] %} || '#' || {{ key_part(column) }}{{ " as domain_key" if loop.last }}{% endfor %}
{%- endmacro %}

{#
  A part of a sort key, in which `#`, the separator, is escaped; encode_part in dagster_prefs/ids.py is the same rule.
#}
{% macro key_part(column) -%}
  replace(replace({{ column }}::text, '%', '%25'), '#', '%23')
{%- endmacro %}

{# The type of a key column, which may be qualified (`totals.viewer_id`): bigint, text or uuid. #}
{% macro key_type(column) -%}
  {%- set name = column.split(".") | last -%}
  {%- for entity in var("entities").values() if name in entity["keys"] -%}
    {{ return(entity["keys"][name]) }}
  {%- endfor -%}
  {{ exceptions.raise_compiler_error(name ~ " is no key column of any entity in dbt_project.yml, vars: entities") }}
{%- endmacro %}

{# Whether a row belongs to a person and not to a canary; `key` is a key column. #}
{% macro of_people(key) -%}
  {{ key }} {{ {"bigint": ">= 0", "text": "not like 'canary:%'", "uuid": "not like '00000000-0000-0000-0000-%'"}[key_type(key)] }}
{%- endmacro %}

{% macro reserved_key(key) -%}
  {{ key }} {{ {"bigint": "< 0", "text": "like 'canary:%'", "uuid": "like '00000000-0000-0000-0000-%'"}[key_type(key)] }}
{%- endmacro %}

{# Whether a message claims to be a canary: it has the probe's own key, and an identity in the form of canaries'. #}
{% macro claims_canary(key, identity) -%}
  {{ key }} = {{ {"bigint": "-1", "text": "'canary:prefs'", "uuid": "'00000000-0000-0000-0000-000000000000'"}[key_type(key)] }} and {{ identity }} ~ '^canary:[0-9a-f]{16}:[0-9]{1,19}:[0-9a-f]{32}$'
{%- endmacro %}

{#
  The reasons for rejecting a message with a reserved id that does not claim to be a canary, as `when … then …` arms.
#}
{% macro reserved_reasons(key, identity) %}
    when {{ reserved_key(key) }} and not ({{ claims_canary(key, identity) }}) then 'reserved {{ key }}'
    when {{ identity }} like 'canary:%' and not ({{ claims_canary(key, identity) }}) then 'reserved {{ identity }}'
{%- endmacro %}

{# The deployment whose canary a message claims to be; NULL for all other messages, and if it is rejected anyway. #}
{% macro claimed_deployment(key, identity) -%}
  case when reason is null and {{ claims_canary(key, identity) }} then split_part({{ identity }}, ':', 2) end
{%- endmacro %}

{#
  The reason why a claim is invalid, NULL if it is valid. The digest covers the event time, so that the id of a canary
  cannot be reused for another time; CanaryKey.event_id in dagster_prefs/events/canaries.py makes the same text.
#}
{% macro unproven_reason(key, identity, moment) -%}
  {%- set milliseconds = epoch_ms(moment) ~ "::text" -%}
  {%- set inner = hex_digest("canary_keys.secret_hex || " ~ milliseconds) -%}
  case
    when canary_keys.deployment is null then 'canary of another deployment'
    when {{ identity }} = 'canary:' || canary_keys.deployment || ':' || {{ milliseconds }} || ':'
      || substr({{ hex_digest("canary_keys.secret_hex || " ~ inner) }}, 1, 32) then null
    else 'reserved {{ key }}'
  end
{%- endmacro %}

{% macro hex_digest(text) -%}
  encode(sha256(convert_to({{ text }}, 'UTF8')), 'hex')
{%- endmacro %}

{#
  Each message of the CTE `messages` with its final reason, `verdict`: that of `reason`, or, if the message claims to be
  a canary (`canary`), the result of checking the claim with the deployment's key.
#}
{% macro verdicts(messages, key, identity, moment) -%}
  {{ return(adapter.dispatch("verdicts")(messages, key, identity, moment)) }}
{%- endmacro %}

{% macro postgres__verdicts(messages, key, identity, moment) -%}
  select {{ messages }}.*, case when canary is null then reason else {{ unproven_reason(key, identity, moment) }} end as verdict
  from {{ messages }}
  left join {{ ref("canary_keys") }} as canary_keys on canary_keys.deployment = {{ messages }}.canary
{%- endmacro %}

{#
  Only claims are joined: all other messages have a NULL key, and the join would send them to the same actor. RisingWave
  adds `canary` to the key of the relation, after source, partition and offset.
#}
{% macro risingwave__verdicts(messages, key, identity, moment) -%}
  select {{ messages }}.*, reason as verdict
  from {{ messages }}
  where canary is null
  union all
  select {{ messages }}.*, {{ unproven_reason(key, identity, moment) }} as verdict
  from {{ messages }}
  left join {{ ref("canary_keys") }} as canary_keys on canary_keys.deployment = {{ messages }}.canary
  where {{ messages }}.canary is not null
{%- endmacro %}
