{#
  Whether a tile of `day` is in the window of `days` days of the entity whose key column is `key`.

  The window is day ≥ D − days, without an upper bound, where D is the UTC date of clock − spread seconds of the key
  (`expiry_spread`). Solved for the clock, the condition is day + (days + 1) days + spread part > clock, which keeps all
  column arithmetic on one side of now(), as RisingWave's temporal filters require.
#}
{% macro within_window(day, key, days) -%}
  {%- if execute and (days is not number or days < 1) -%}
    {{ exceptions.raise_compiler_error(
      "within_window(\"" ~ day ~ "\", \"" ~ key ~ "\", " ~ days ~ ") in " ~ model.name ~ ": the days of a window must be a whole number of at least 1, "
      ~ "e.g. within_window(\"" ~ day ~ "\", \"" ~ key ~ "\", var(\"windows\").long)"
    ) }}
  {%- endif -%}
  {%- set spread = (env_var("PREFS_EXPIRY_SPREAD_SECONDS", "0") or "0") | int -%}
  ({{ day }}::timestamp at time zone 'UTC') + interval '{{ days + 1 }} days'
  {%- if spread > 0 %} + {{ expiry_spread(key, spread) }} * interval '1 second'{% endif %} > {{ clock() }}
{%- endmacro %}

{#
  The number of seconds, below `spread`, by which the day of a key begins later. For a whole number it is the remainder,
  computed before the absolute value because abs() overflows at the smallest bigint; for a text, the hash.
#}
{% macro expiry_spread(key, spread) -%}
  {%- if key_type(key) == "bigint" -%} abs({{ key }} % {{ spread }})
  {%- else -%} {{ row_hash(key) }} % {{ spread }}
  {%- endif -%}
{%- endmacro %}

{# Minutes of a sum of seconds: rounded last, to 6 places. #}
{% macro minutes(seconds) -%}
  round({{ seconds }} / 60.0, 6)
{%- endmacro %}

{# A ratio that is exact to 6 places on both engines, NULL where the denominator is 0. #}
{% macro ratio(numerator, denominator) -%}
  round(({{ numerator }})::numeric / nullif({{ denominator }}, 0), 6)
{%- endmacro %}

{# timestamptz → milliseconds since 1970, as the serving contract has them. #}
{% macro epoch_ms(moment) -%}
  (extract(epoch from {{ moment }}) * 1000)::bigint
{%- endmacro %}

{# timestamptz → UTC date. #}
{% macro utc_date(moment) -%}
  ({{ moment }} at time zone 'UTC')::date
{%- endmacro %}

{# The sort key of a domain's items, as the current model declares it in `meta.domain.key`. #}
{% macro domain_key() -%}
  {#- dbt reads a model's YAML after parsing its SQL. -#}
  {%- set domain = config.get("meta", {}).get("domain") if execute else {"key": ""} -%}
  {%- if not domain -%}
    {{ exceptions.raise_compiler_error("domain_key() in " ~ model.name ~ ": its YAML declares no meta.domain, e.g. meta: { domain: { key: \"product#name\" } }") }}
  {%- endif -%}
  '{{ domain.key }}'::text
{%- endmacro %}
