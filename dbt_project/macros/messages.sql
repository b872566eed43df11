{#
  Reading one message: every macro takes the parsed JSON column `j` and is NULL, never an error, on bad input. A field's
  JSON type is asked before any text is made of it, because a list of 9,000 numbers like 1e131071 is a gigabyte as text.
#}

{#
  What the YAML of the model at hand declares of its message fields: name → type, and in `meta` `optional`, `max_bytes`
  (of a text), `scale` (decimals that are kept), `min` and `max`, `accepted` (values) or `accepted_from` (a variable whose
  names are the values), and `format: uuid`. Empty while the project is parsed, before YAML is read.
#}
{% macro declared_fields() -%}
  {%- set fields = {} -%}
  {%- if execute -%}
    {%- for column in model.columns.values() if column.name not in place_columns() + ["payload", "reason", "canary"] -%}
      {%- do fields.update({column.name: dict(column.config.meta, type=column.data_type | lower)}) -%}
    {%- endfor -%}
  {%- endif -%}
  {{ return(fields) }}
{%- endmacro %}

{# Where a message is from, in every raw and parsed relation. #}
{% macro place_columns() -%}
  {{ return(["source", "source_partition", "source_offset", "kafka_timestamp", "arrived_at"]) }}
{%- endmacro %}

{#
  A field as text, trimmed; NULL where absent, empty, or of a JSON type that the field cannot have. A number comes without
  exponent and without needless zeros, so that 12345.0 and 1.2345e4 are 12345, and NULL where no field could hold it.
#}
{% macro text_field(name, type) -%}
  case jsonb_typeof(j -> '{{ name }}')
    when 'string' then nullif(btrim(j ->> '{{ name }}', E' \t\r\n'), '')
    when 'number' then {{ measuring_number(name) if type in ("decimal", "timestamptz") else identifying_number(name) }}
    {%- if type == "boolean" %}
    when 'boolean' then j ->> '{{ name }}'
    {%- endif %}
  end
{%- endmacro %}

{# Whether a field is there with any content at all. #}
{% macro field_given(name) -%}
  case coalesce(jsonb_typeof(j -> '{{ name }}'), 'null')
    when 'null' then false
    when 'string' then (j ->> '{{ name }}') <> ''
    else true
  end
{%- endmacro %}

{#
  A number, however precisely it was written, rounded to `scale` decimals; NULL beyond the 28 digits that both engines
  hold exactly. Of a number without exponent no digit behind the first 30 decimals can change what it is rounded to.
#}
{% macro decimal_of(text, scale) -%}
  {%- set bound = "1" ~ "0" * (28 - scale) -%}
  case
    when {{ text }} ~ '^-?[0-9]{1,28}([.][0-9]+)?$' then
      case when abs(left({{ text }}, 60)::numeric) < {{ bound }} then round(left({{ text }}, 60)::numeric, {{ scale }}) end
    when {{ text }} ~ '^-?[0-9]{1,28}([.][0-9]{1,255})?[eE][+-]?[0-9]{1,3}$' then
      case when abs({{ scientific_number(text) }}) < {{ bound }} then round({{ scientific_number(text) }}, {{ scale }}) end
  end
{%- endmacro %}

{# true or false, in any case, or 1 or 0. #}
{% macro boolean_of(text) -%}
  case lower({{ text }}) when 'true' then true when '1' then true when 'false' then false when '0' then false end
{%- endmacro %}

{# A UUID in lower case, as 8-4-4-4-12 hexadecimal digits. #}
{% macro uuid_of(text) -%}
  case when lower({{ text }}) ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' then lower({{ text }}) end
{%- endmacro %}

{# A whole number, also where it was written as 12.0; NULL outside the type's range. #}
{% macro integer_of(text, type) -%}
  {%- set bound = {"int": "2147483647", "bigint": "9223372036854775807"}[type] -%}
  case when {{ text }} ~ '^-?[0-9]{1,19}([.]0+)?$' then
    case when split_part({{ text }}, '.', 1)::numeric between -{{ bound }} - 1 and {{ bound }}
      then split_part({{ text }}, '.', 1)::{{ type }} end
  end
{%- endmacro %}

{# A field's text that is to be read as a time: what is finer than microseconds is cut off. #}
{% macro to_microseconds(text) -%}
  regexp_replace({{ text }}, '([.][0-9]{6})[0-9]+', '\1')
{%- endmacro %}

{#
  A time: ISO 8601 with T or blank, with Z, an offset, UTC or nothing (UTC), letters in any case; or a number since 1970,
  whose magnitude says whether it counts seconds, milliseconds, microseconds or nanoseconds. A time that is none of the
  plausible years comes out as 1970, which never is plausible: `implausible` tells it from text that is no time.

  Hours to 23 and offsets to 15:59, because beyond these the engines disagree on what is a moment; RisingWave reads over
  an offset of hours alone, so it is given its minutes.
#}
{% macro timestamp_of(text) -%}
  {%- set years = var("plausible_years") -%}
  {%- set day = "[0-9]{4}-[01][0-9]-[0-3][0-9]" -%}
  {%- set moment = day ~ "[Tt ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,6})?)?" -%}
  {%- set hours = " ?[+-](0[0-9]|1[0-5])" -%}
  {%- set zone = " ?([Zz]|[Uu][Tt][Cc])|" ~ hours ~ "(:?[0-5][0-9])?" -%}
  {%- set number = "left(" ~ text ~ ", 60)::numeric" -%}
  case
    when {{ text }} ~ '^-?[0-9]{1,28}([.][0-9]+)?$' then
      case
        {%- for per_second, microseconds in {1: "1000000", 1000: "1000", 1000000: "1", 1000000000: "0.001"}.items() %}
        when {{ number }} >= {{ epoch_seconds(years.first) * per_second }} and {{ number }} < {{ epoch_seconds(years.last + 1) * per_second }}
          then to_timestamp(trunc({{ number }} * {{ microseconds }}) * 0.000001)
        {%- endfor %}
        else to_timestamp(0)
      end
    when {{ text }} ~ '^{{ moment }}({{ zone }})?$' then
      case
        when left({{ text }}, 4)::int not between {{ years.first - 1 }} and {{ years.last + 1 }} then to_timestamp(0)
        when {{ text }} ~ '^{{ moment }}$' then {{ calendar_timestamp("upper(" ~ text ~ ") || 'Z'") }}
        when {{ text }} ~ '^{{ moment }}{{ hours }}$' then {{ calendar_timestamp("upper(" ~ text ~ ") || ':00'") }}
        else {{ calendar_timestamp("upper(" ~ text ~ ")") }}
      end
  end
{%- endmacro %}

{# Whether a time that could be read is of none of the plausible years. #}
{% macro implausible(moment) -%}
  {%- set years = var("plausible_years") -%}
  {#- The units of a number would overlap, and 1970 is what stands for an implausible time. -#}
  {%- if years.first < 1971 or epoch_seconds(years.last + 1) >= 1000 * epoch_seconds(years.first) -%}
    {{ exceptions.raise_compiler_error(
      "plausible_years is " ~ years ~ ": a time as a number would not say its unit; begin with 1971 or later"
    ) }}
  {%- endif -%}
  ({{ moment }} < to_timestamp({{ epoch_seconds(years.first) }}) or {{ moment }} >= to_timestamp({{ epoch_seconds(years.last + 1) }}))
{%- endmacro %}

{# Seconds from 1970 to the start of a year in UTC. #}
{% macro epoch_seconds(year) -%}
  {%- set since = modules.datetime.datetime(year, 1, 1) - modules.datetime.datetime(1970, 1, 1) -%}
  {{ return(since.days * 86400) }}
{%- endmacro %}

{# Whether the message is what an erasure leaves of one: its place in the source, and nothing of its content. #}
{% macro erased(identity) -%}
  case when jsonb_typeof(j -> 'erased') in ('boolean', 'string') then j ->> 'erased' = 'true' end and {{ identity }} is null
{%- endmacro %}

{# What is refused whatever the topic, as `when … then …` arms; `identity` is the field that tells messages apart. #}
{% macro message_reasons(identity) %}
    when octet_length(data) > {{ var("max_message_bytes") }} then {{ too_many_bytes("message", "data", var("max_message_bytes")) }}
    when j is null then 'not valid JSON'
    when jsonb_typeof(j) <> 'object' then 'not a JSON object'
    when {{ erased(identity) }} then 'erased'
    {{- malformed_row_reasons(identity) }}
{%- endmacro %}

{#
  Why an event is refused whatever its topic, as `when … then …` arms; `required` are the fields that it cannot lack
  (beside those with a list of accepted values), `moment` the one that says when it happened.
#}
{% macro common_reasons(identity, required, moment) %}
    {{- message_reasons(identity) }}
    {{- required_reasons(required) }}
    when {{ moment }} > coalesce(kafka_timestamp, arrived_at) + interval '{{ var("future_tolerance_hours") }} hours'
      then 'event time in the future'
{%- endmacro %}

{# Fields without which a message says nothing. #}
{% macro required_reasons(names) %}
    {%- for name in names %}
    when {{ name }} is null and not {{ field_given(name) }} then 'missing {{ name }}'
    when {{ name }} is null then 'bad {{ name }}'
    {{- bound_reasons(name) }}
    {%- endfor %}
{%- endmacro %}

{# A field without which a message says nothing, and whose values are listed. #}
{% macro accepted_reasons(name) %}
    when {{ name }} is null and not {{ field_given(name) }} then 'missing {{ name }}'
    when {{ name }} is null or {{ not_accepted(name) }} then 'unknown {{ name }}'
{%- endmacro %}

{# Whether a field has none of the values that are declared for it. #}
{% macro not_accepted(name) -%}
  {%- set field = declared_fields().get(name) or {} -%}
  {%- set values = (var(field.accepted_from) if field.accepted_from else field.accepted or []) | list -%}
  {{ name }} not in ('{{ values | join("', '") }}')
{%- endmacro %}

{#
  Fields that a message may leave out: what is there must be of the field's type and within its bounds. Text that is
  empty, null and absence are NULL; a list, an object or a boolean is no text.
#}
{% macro optional_reasons() %}
    {%- for name, field in declared_fields().items() if field.optional %}
    {%- if field.type == "text" and not field.format %}
    when {{ name }} is null and jsonb_typeof(j -> '{{ name }}') not in ('null', 'string') then 'bad {{ name }}'
    {%- else %}
    when {{ name }} is null and {{ field_given(name) }} then 'bad {{ name }}'
    {%- endif %}
    {%- if field.accepted or field.accepted_from %}
    when {{ not_accepted(name) }} then 'unknown {{ name }}'
    {%- endif %}
    {{- bound_reasons(name) }}
    {%- endfor %}
{%- endmacro %}

{# The arms for a value beyond what is declared: a text's bytes, a number's range, a time's years; or nothing. #}
{% macro bound_reasons(name) %}
    {%- set field = declared_fields().get(name) or {} -%}
    {{- size_reason(name) }}
    {%- if field.type == "timestamptz" %}
    when {{ implausible(name) }} then 'implausible time'
    {%- endif %}
    {%- if field.max is defined %}
    when {{ name }} < {{ field.min }} or {{ name }} > {{ field.max }} then '{{ name }} outside {{ field.min }}..{{ field.max }}'
    {%- elif field.min is defined %}
    when {{ name }} < {{ field.min }} then 'negative {{ name }}'
    {%- endif %}
{%- endmacro %}

{# The arm for a text that is longer than declared, or nothing. #}
{% macro size_reason(name) %}
    {%- set limit = (declared_fields().get(name) or {}).get("max_bytes") -%}
    {%- if limit %}
    when octet_length({{ name }}) > {{ limit }} then {{ too_many_bytes(name, name, limit) }}
    {%- endif -%}
{%- endmacro %}

{# `prefs rejected` counts by what is left without the size: the pattern of dagster_prefs/events/rejected.py. #}
{% macro too_many_bytes(what, column, limit) -%}
  '{{ what }} has ' || octet_length({{ column }})::text || ' bytes, at most {{ limit }}'
{%- endmacro %}

{#
  The query of a model that reads one topic: where each message is from, its fields, and in `reason` why it is refused.

  The fields are those that the model's YAML declares (`declared_fields`). The block of the call is what is refused, as
  `when … then '<reason>'` arms over the fields; a field is NULL where it is absent and where it is no such type, and
  `field_given` tells the two apart. A message that is refused keeps its text in `payload`, of one that is too long
  the beginning; it is not parsed, because that takes memory many times its size.

  Of an event, `identity` tells it from others, `key` says whom it is about (an entity's first key) and `moment` when it
  happened; with them reserved ids are refused (reserved.sql).
#}
{% macro parsed_messages(raw, identity=none, key=none, moment=none) -%}
{%- set place = place_columns() | join(", ") -%}
{%- set fields = declared_fields() -%}
{%- set most = var("max_message_bytes") -%}
with messages as (

  select {{ place }}, data, case when octet_length(data) <= {{ most }} then {{ json_of("data") }} end as j
  from {{ raw }}
  {{ computed_once() }}

),

texts as (

  select
    {{ place }}, data, j
    {%- for name, field in fields.items() %},
    {{ to_microseconds(text_field(name, field.type)) if field.type == "timestamptz" else text_field(name, field.type) }} as {{ name }}_text
    {%- endfor %}
  from messages
  {{ computed_once() }}

),

fields as (

  select
    {{ place }}, data, j
    {%- for name, field in fields.items() %},
    {{ field_of(name ~ "_text", field) }} as {{ name }}
    {%- endfor %}
  from texts
  {{ computed_once() }}

),

judged as (

  select
    *,
    case
      {{- caller() }}
      {%- if key %}{{ reserved_reasons(key, identity) }}{% endif %}
    end as reason
  from fields
  {{ computed_once() }}

),

{% if key %}
claims as (

  select *, {{ claimed_deployment(key, identity) }} as canary
  from judged

),

shown as (

  select
    {{ place }},
    case when reason is not null or canary is not null then {{ text_of("substr(data, 1, " ~ most ~ ")") }} end as payload,
    reason,
    canary,
    {{ fields | join(", ") }}
  from claims

),

verdicts as (

  {{ verdicts("shown", key, identity, moment) }}

),

final as (

  select
    {{ place }},
    case when verdict is not null then payload end as payload,
    verdict as reason,
    canary,
    {{ fields | join(", ") }}
  from verdicts

)
{% else %}
final as (

  select
    {{ place }},
    case when reason is not null then {{ text_of("substr(data, 1, " ~ most ~ ")") }} end as payload,
    reason,
    {{ fields | join(", ") }}
  from judged

)
{% endif %}

select * from final
{%- endmacro %}

{# A field's text as its type. #}
{% macro field_of(text, field) -%}
  {%- if field.format == "uuid" -%} {{ uuid_of(text) }}
  {%- elif field.type == "text" -%} {{ text }}
  {%- elif field.type == "decimal" -%} {{ decimal_of(text, field.scale) }}
  {%- elif field.type in ("int", "bigint") -%} {{ integer_of(text, field.type) }}
  {%- elif field.type == "boolean" -%} {{ boolean_of(text) }}
  {%- elif field.type == "timestamptz" -%} {{ timestamp_of(text) }}
  {%- else -%} {{ exceptions.raise_compiler_error(text ~ " is a " ~ field.type ~ ", which parsed_messages does not read") }}
  {%- endif -%}
{%- endmacro %}

{#
  The query of a model of typed events: of every valid event the first delivery, without what an erasure of its entity
  covers. `moment` is the column that says when it happened.
#}
{% macro first_deliveries(parsed, entity, identity, moment, columns) -%}
with valid as (

  select * from {{ parsed }} where reason is null

),
{%- if entity_of(entity).erasable %}

erased as (

  select subject_id, erased_at from {{ ref("erased_subjects") }} where subject_kind = '{{ subject_kind(entity) }}'

),

remembered as (

  select valid.*
  from valid
  left join erased on erased.subject_id = valid.{{ first_key(entity) }}::text
  where erased.subject_id is null or valid.{{ moment }} > erased.erased_at

),
{%- endif %}

deliveries as (

  select
    *,
    row_number() over (
      partition by {{ identity }}
      order by arrived_at, source, source_partition, source_offset
    ) as delivery
  from {{ "remembered" if entity_of(entity).erasable else "valid" }}

),

final as (

  select {{ columns | join(", ") }}
  from deliveries
  where delivery = 1

)

select * from final
{%- endmacro %}
