{# Reading one message: every macro takes the parsed JSON column `j` and is NULL, never an error, on bad input. #}

{# A field as text where it is a string or a number, trimmed; NULL where absent, empty or of another type. #}
{% macro text_field(name) -%}
  case when jsonb_typeof(j -> '{{ name }}') in ('string', 'number') then nullif(btrim(j ->> '{{ name }}', E' \t\r\n'), '') end
{%- endmacro %}

{# Whether a field is there with any content at all. #}
{% macro field_given(name) -%}
  (j -> '{{ name }}' is not null and jsonb_typeof(j -> '{{ name }}') <> 'null' and (j ->> '{{ name }}') <> '')
{%- endmacro %}

{# At most 28 digits and one of exponent: what both engines hold exactly. #}
{% macro decimal_of(text) -%}
  case when {{ text }} ~ '^-?[0-9]{1,10}([.][0-9]{1,18})?([eE][+-]?[0-9])?$' then ({{ text }})::numeric end
{%- endmacro %}

{# true or false, in any case, or 1 or 0. #}
{% macro boolean_of(text) -%}
  case {{ text }} when 'true' then true when '1' then true when 'false' then false when '0' then false end
{%- endmacro %}

{# A whole number, also where it was written as 12.0; NULL outside the type's range. #}
{% macro integer_of(text, type) -%}
  {%- set bound = {"int": "2147483647", "bigint": "9223372036854775807"}[type] -%}
  case when {{ text }} ~ '^-?[0-9]{1,19}([.]0+)?$' then
    case when split_part({{ text }}, '.', 1)::numeric between -{{ bound }} - 1 and {{ bound }}
      then split_part({{ text }}, '.', 1)::{{ type }} end
  end
{%- endmacro %}

{#
  ISO 8601 with T or blank, with Z, an offset, UTC or nothing (UTC), or epoch milliseconds. Years from 1000 on,
  hours to 23 and offsets to 15:59, because beyond these the engines disagree on what is a moment;
  RisingWave reads over an offset of hours alone, so it is given its minutes.
#}
{% macro timestamp_of(text) -%}
  {%- set moment = "[1-9][0-9]{3}-[01][0-9]-[0-3][0-9][T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,6})?)?" -%}
  case
    when {{ text }} ~ '^[0-9]{1,15}$' then to_timestamp(({{ text }})::bigint / 1000.0)
    when {{ text }} ~ '^{{ moment }}$' then {{ calendar_timestamp(text ~ " || 'Z'") }}
    when {{ text }} ~ '^{{ moment }} ?[+-](0[0-9]|1[0-5])$' then {{ calendar_timestamp(text ~ " || ':00'") }}
    when {{ text }} ~ '^{{ moment }} ?(Z|UTC|[+-](0[0-9]|1[0-5]):?[0-5][0-9])$' then {{ calendar_timestamp(text) }}
  end
{%- endmacro %}

{# Whether the message is what an erasure leaves of one: its place in the source, and nothing of its content. #}
{% macro erased(identity) -%}
  j ->> 'erased' = 'true' and {{ identity }} is null
{%- endmacro %}

{# Why an event is refused whatever its topic, as `when … then …` arms; `key` and `moment` are columns. #}
{% macro common_reasons(key, moment) %}
    when j is null then 'not valid JSON'
    when jsonb_typeof(j) <> 'object' then 'not a JSON object'
    when {{ erased("event_id") }} then 'erased'
    {%- for name in ["event_id", key, moment] %}
    when {{ name }} is null and not {{ field_given(name) }} then 'missing {{ name }}'
    when {{ name }} is null then 'bad {{ name }}'
    {%- endfor %}
    when {{ moment }} > coalesce(kafka_timestamp, arrived_at) + interval '{{ var("future_tolerance_hours") }} hours'
      then 'event time in the future'
{%- endmacro %}

{#
  The query of a model that reads one topic: where each message is from, its fields, and in `reason` why it is refused.

  `fields` says the type of each field: text, decimal, int, bigint, boolean or timestamp. The block of the call is what
  is refused, as `when … then '<reason>'` arms over the fields; a field is NULL where it is absent and where it is no
  such type, and `field_given` tells the two apart. A message that is refused keeps its text in `payload`.
#}
{% macro parsed_messages(raw, fields) -%}
{%- set place = "source, source_partition, source_offset, kafka_timestamp, arrived_at" -%}
with messages as (

  select {{ place }}, data, {{ json_of("data") }} as j
  from {{ raw }}
  {{ computed_once() }}

),

texts as (

  select
    {{ place }}, data, j
    {%- for name, type in fields.items() %},
    {{ "lower(j ->> '" ~ name ~ "')" if type == "boolean" else text_field(name) }} as {{ name }}_text
    {%- endfor %}
  from messages
  {{ computed_once() }}

),

fields as (

  select
    {{ place }}, data, j
    {%- for name, type in fields.items() %},
    {{ field_of(name ~ "_text", type) }} as {{ name }}
    {%- endfor %}
  from texts
  {{ computed_once() }}

),

judged as (

  select
    *,
    case
      {{- caller() }}
    end as reason
  from fields
  {{ computed_once() }}

),

final as (

  select
    {{ place }},
    case when reason is not null then {{ text_of("data") }} end as payload,
    reason,
    {{ fields | join(", ") }}
  from judged

)

select * from final
{%- endmacro %}

{# A field's text as its type. #}
{% macro field_of(text, type) -%}
  {%- if type == "text" -%} {{ text }}
  {%- elif type == "decimal" -%} {{ decimal_of(text) }}
  {%- elif type in ("int", "bigint") -%} {{ integer_of(text, type) }}
  {%- elif type == "boolean" -%} {{ boolean_of(text) }}
  {%- elif type == "timestamp" -%} {{ timestamp_of(text) }}
  {%- else -%} {{ exceptions.raise_compiler_error(text ~ " is a " ~ type ~ ", which parsed_messages does not read") }}
  {%- endif -%}
{%- endmacro %}

{#
  The query of a model of typed events: of every valid event the first delivery, without what an erasure covers.

  `subject` and `moment` are the columns that say whom an event is about and when it happened.
#}
{% macro first_deliveries(parsed, subject_kind, subject, moment, columns) -%}
with valid as (

  select * from {{ parsed }} where reason is null

),

erased as (

  select subject_id, erased_at from {{ ref("erased_subjects") }} where subject_kind = '{{ subject_kind }}'

),

remembered as (

  select valid.*
  from valid
  left join erased on erased.subject_id = valid.{{ subject }}::text
  where erased.subject_id is null or valid.{{ moment }} > erased.erased_at

),

deliveries as (

  select
    *,
    row_number() over (
      partition by event_id
      order by arrived_at, source, source_partition, source_offset
    ) as delivery
  from remembered

),

final as (

  select {{ columns | join(", ") }}
  from deliveries
  where delivery = 1

)

select * from final
{%- endmacro %}
