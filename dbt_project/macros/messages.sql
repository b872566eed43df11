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
