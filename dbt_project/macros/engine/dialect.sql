{# The expressions that the two engines spell differently. #}

{# The present time. On the embedded engine a session may set `prefs.clock` (ISO 8601), which tests use to move time. #}
{% macro clock() -%}
  {{ return(adapter.dispatch("clock")()) }}
{%- endmacro %}

{% macro postgres__clock() -%}
  coalesce(nullif(current_setting('prefs.clock', true), '')::timestamptz, now())
{%- endmacro %}

{% macro risingwave__clock() -%}
  now()
{%- endmacro %}


{# bytea → jsonb, NULL if the bytes are not UTF-8 or not JSON. #}
{% macro json_of(bytes) -%}
  {{ return(adapter.dispatch("json_of")(bytes)) }}
{%- endmacro %}

{% macro postgres__json_of(bytes) -%}
  {{ target.schema }}.prefs_json({{ bytes }})
{%- endmacro %}

{# PostgreSQL cannot store U+0000 as text, nor can clients that read one from RisingWave, which accepts its escape. #}
{% macro risingwave__json_of(bytes) -%}
  case when convert_from({{ bytes }}, 'utf8') !~ '(^|[^\\])(\\\\)*\\u0000' then convert_from({{ bytes }}, 'utf8')::jsonb end
{%- endmacro %}


{# bytea → text for display, never NULL for non-NULL bytes. #}
{% macro text_of(bytes) -%}
  {{ return(adapter.dispatch("text_of")(bytes)) }}
{%- endmacro %}

{% macro postgres__text_of(bytes) -%}
  {{ target.schema }}.prefs_text({{ bytes }})
{%- endmacro %}

{% macro risingwave__text_of(bytes) -%}
  coalesce(convert_from({{ bytes }}, 'utf8'), encode({{ bytes }}, 'escape'))
{%- endmacro %}


{#
  A JSON number of the field as text without exponent and redundant zeros, NULL if it is too large for any field.
  PostgreSQL stores 1e131071 in 12 bytes and prints it in 131,072, so its value is checked first. RisingWave stores a
  number that is not a 64-bit integer as a double, and prints a large or small one with an exponent.
#}
{% macro measuring_number(name) -%}
  {{ return(adapter.dispatch("measuring_number")(name)) }}
{%- endmacro %}

{% macro postgres__measuring_number(name) -%}
  case when abs((j -> '{{ name }}')::numeric) < 1{{ "0" * 28 }} then trim_scale((j -> '{{ name }}')::numeric)::text end
{%- endmacro %}

{% macro risingwave__measuring_number(name) -%}
  {%- set text = "(j ->> '" ~ name ~ "')" -%}
  case when {{ text }} ~ '[eE]' then trim_scale({{ scientific_number(text) }})::text else {{ text }} end
{%- endmacro %}


{#
  The same for a number that is an identifier, where one lost digit means another entity: whole numbers up to 64 bits.
  RisingWave's doubles beyond 2^53 may differ from the number that was sent, so they are NULL there.
#}
{% macro identifying_number(name) -%}
  {{ return(adapter.dispatch("identifying_number")(name)) }}
{%- endmacro %}

{% macro postgres__identifying_number(name) -%}
  case when (j -> '{{ name }}')::numeric between -9223372036854775808 and 18446744073709551615
    then trim_scale((j -> '{{ name }}')::numeric)::text end
{%- endmacro %}

{% macro risingwave__identifying_number(name) -%}
  {%- set text = "(j ->> '" ~ name ~ "')" -%}
  case
    when {{ text }} ~ '^-?[0-9]+$' then {{ text }}
    when {{ text }}::double precision = 0 then '0'
    when abs({{ text }}::double precision) < 9007199254740992 then trim_scale({{ text }}::numeric)::text
  end
{%- endmacro %}


{#
  text that is a number with an exponent → numeric, NULL if too large. RisingWave parses at most 28 digits, so the
  number is converted through a double there, and a number too small for any field becomes 0.
#}
{% macro scientific_number(text) -%}
  {{ return(adapter.dispatch("scientific_number")(text)) }}
{%- endmacro %}

{% macro postgres__scientific_number(text) -%}
  {{ text }}::numeric
{%- endmacro %}

{% macro risingwave__scientific_number(text) -%}
  case
    when abs({{ text }}::double precision) < 0.0000000000000000001 then 0::numeric
    when abs({{ text }}::double precision) < 1{{ "0" * 28 }} then {{ text }}::double precision::numeric
  end
{%- endmacro %}


{# text in the form of a timestamp → timestamptz, NULL if the calendar has no such moment. #}
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

{# RisingWave has no bit strings: the digits are converted one by one. #}
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
  Ends a CTE whose columns are expensive and used more than once. PostgreSQL would merge it into its reader and compute
  each column again at each use: minutes instead of seconds for 200,000 messages.
#}
{% macro computed_once() -%}
  {{ return(adapter.dispatch("computed_once")()) }}
{%- endmacro %}

{% macro postgres__computed_once() -%}
  offset 0
{%- endmacro %}

{% macro risingwave__computed_once() -%}
{%- endmacro %}

{# A value as a text literal of SQL; values from the environment may contain a quote. #}
{% macro text_literal(value) -%}
  {{ return("'" ~ value | string | replace("'", "''") ~ "'") }}
{%- endmacro %}
