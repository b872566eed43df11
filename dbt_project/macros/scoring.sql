{# The weight of an interaction; the weights are the variable `interaction_weights`. #}
{% macro interaction_weight(event_type) -%}
  case {{ event_type }}
    {%- for name, weight in var("interaction_weights").items() %}
    when '{{ name }}' then {{ weight }}
    {%- endfor %}
  end
{%- endmacro %}

{# The position of a price in the variable `price_tiers` from 0 on; NULL for a NULL price. #}
{% macro price_level(price) -%}
  case
    when {{ price }} is null then null
    {%- for tier in var("price_tiers") if tier.below is not none %}
    when {{ price }} < {{ tier.below }} then {{ loop.index0 }}
    {%- endfor %}
    else {{ var("price_tiers") | length - 1 }}
  end
{%- endmacro %}

{# The name of the tier at a level (rounded to the nearest); NULL for a NULL level. #}
{% macro tier_name(level) -%}
  case round({{ level }})
    {%- for tier in var("price_tiers") %}
    when {{ loop.index0 }} then '{{ tier.name }}'
    {%- endfor %}
  end
{%- endmacro %}

{# The tier of a price; NULL for a NULL price, because an unknown price is not a luxury. #}
{% macro price_tier(price) -%}
  case
    when {{ price }} is null then null
    {%- for tier in var("price_tiers") if tier.below is not none %}
    when {{ price }} < {{ tier.below }} then '{{ tier.name }}'
    {%- endfor %}
    else '{{ (var("price_tiers") | last).name }}'
  end
{%- endmacro %}

{#
  2^(half-lives between the fixed epoch and a moment), a float that does not depend on now(). The exponent is limited to
  ±1000 (82 years), because beyond it power() fails, and with it the whole view.
#}
{% macro decay_factor(moment) -%}
  power(2::double precision, greatest(-1000::double precision, least(1000::double precision,
    (extract(epoch from {{ moment }})::double precision - extract(epoch from '{{ var("decay").epoch }} 00:00:00Z'::timestamptz)::double precision) / {{ var("decay").half_life_days * 86400 }}
  )))
{%- endmacro %}
