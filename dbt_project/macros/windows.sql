{#
  Whether a tile of `day` lies in the window of `days` days of its viewer.

  The window is day ≥ D − days, without an upper bound, where D is the UTC date of
  clock − abs(viewer_id) mod spread seconds. Solved for the clock it reads
  day + (days + 1) days + spread part > clock, which keeps all column arithmetic on one side of now(),
  as RisingWave's temporal filters ask. The remainder is taken before the absolute value because
  abs() overflows at the smallest bigint.
#}
{% macro within_window(day, viewer, days) -%}
  {%- set spread = (env_var("PREFS_EXPIRY_SPREAD_SECONDS", "0") or "0") | int -%}
  ({{ day }}::timestamp at time zone 'UTC') + interval '{{ days + 1 }} days'
  {%- if spread > 0 %} + abs({{ viewer }} % {{ spread }}) * interval '1 second'{% endif %} > {{ clock() }}
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
