{# The expressions that the two engines spell differently. #}

{# Now. On the embedded engine a session may set `prefs.clock` (ISO 8601), which is how tests move time. #}
{% macro clock() -%}
  {{ return(adapter.dispatch("clock")()) }}
{%- endmacro %}

{% macro postgres__clock() -%}
  coalesce(nullif(current_setting('prefs.clock', true), '')::timestamptz, now())
{%- endmacro %}

{% macro risingwave__clock() -%}
  now()
{%- endmacro %}


{# bytea → jsonb, NULL where the bytes are not UTF-8 or not JSON. #}
{% macro json_of(bytes) -%}
  {{ return(adapter.dispatch("json_of")(bytes)) }}
{%- endmacro %}

{% macro postgres__json_of(bytes) -%}
  {{ target.schema }}.prefs_json({{ bytes }})
{%- endmacro %}

{% macro risingwave__json_of(bytes) -%}
  convert_from({{ bytes }}, 'utf8')::jsonb
{%- endmacro %}


{# bytea → text for people, never NULL for non-NULL bytes. #}
{% macro text_of(bytes) -%}
  {{ return(adapter.dispatch("text_of")(bytes)) }}
{%- endmacro %}

{% macro postgres__text_of(bytes) -%}
  {{ target.schema }}.prefs_text({{ bytes }})
{%- endmacro %}

{% macro risingwave__text_of(bytes) -%}
  coalesce(convert_from({{ bytes }}, 'utf8'), encode({{ bytes }}, 'escape'))
{%- endmacro %}


{# text that already looks like a timestamp → timestamptz, NULL where the calendar has no such moment. #}
{% macro calendar_timestamp(text) -%}
  {{ return(adapter.dispatch("calendar_timestamp")(text)) }}
{%- endmacro %}

{% macro postgres__calendar_timestamp(text) -%}
  case when pg_input_is_valid({{ text }}, 'timestamptz') then ({{ text }})::timestamptz end
{%- endmacro %}

{% macro risingwave__calendar_timestamp(text) -%}
  ({{ text }})::timestamptz
{%- endmacro %}


{# text → a 60-bit integer that differs where the text differs; its sum over rows is a set fingerprint. #}
{% macro row_hash(text) -%}
  {{ return(adapter.dispatch("row_hash")(text)) }}
{%- endmacro %}

{% macro postgres__row_hash(text) -%}
  ('x' || left(md5({{ text }}), 15))::bit(60)::bigint
{%- endmacro %}

{# RisingWave has no bit strings: the digits are read one by one. #}
{% macro risingwave__row_hash(text) -%}
  (
    {%- for digit in range(1, 16) %}
    {{ "+ " if not loop.first }}(strpos('0123456789abcdef', substr(md5({{ text }}), {{ digit }}, 1)) - 1)::bigint * {{ 16 ** (15 - digit) }}
    {%- endfor %}
  )
{%- endmacro %}


{# Column types as this engine's catalog spells them. #}
{% macro catalog_type(data_type) -%}
  {{ return(adapter.dispatch("catalog_type")(data_type)) }}
{%- endmacro %}

{% macro default__catalog_type(data_type) -%}
  {%- set element = data_type | replace("[]", "") -%}
  {%- set names = {"int": "integer", "timestamptz": "timestamp with time zone", "decimal": "numeric", "bool": "boolean"} -%}
  {{ return(names.get(element, element) ~ ("[]" if data_type.endswith("[]") else "")) }}
{%- endmacro %}

{% macro risingwave__catalog_type(data_type) -%}
  {{ return(default__catalog_type(data_type) | replace("text", "character varying")) }}
{%- endmacro %}


{#
  Ends a CTE whose columns are expensive and used more than once. PostgreSQL would merge it into its reader and
  compute each column again wherever it is named: minutes instead of seconds for 200,000 messages.
#}
{% macro computed_once() -%}
  {{ return(adapter.dispatch("computed_once")()) }}
{%- endmacro %}

{% macro postgres__computed_once() -%}
  offset 0
{%- endmacro %}

{% macro risingwave__computed_once() -%}
{%- endmacro %}

{# A value as a text literal of SQL: what comes from the environment may hold a quote. #}
{% macro text_literal(value) -%}
  {{ return("'" ~ value | string | replace("'", "''") ~ "'") }}
{%- endmacro %}
