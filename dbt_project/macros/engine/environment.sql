{#
  The names of the environment in PREFS_ENVIRONMENT, for dbt alone. `prefs` and Dagster pass each name as a setting of its
  own. The rules are those of dagster_prefs/environment.py, and the schema's is in profiles.yml.
#}

{# The environment's name; empty without one. #}
{% macro environment_name() -%}
  {{ return(env_var("PREFS_ENVIRONMENT", "")) }}
{%- endmacro %}

{# The prefix of the DynamoDB tables. #}
{% macro table_prefix() -%}
  {{ return(env_var("PREFS_TABLE_PREFIX", "") or (environment_name() | replace("_", "-") ~ "-" if environment_name() else "")) }}
{%- endmacro %}

{# The namespace of the training tables. #}
{% macro iceberg_namespace() -%}
  {{ return(env_var("PREFS_ICEBERG_NAMESPACE", "") or (environment_name() ~ "_training" if environment_name() else "training")) }}
{%- endmacro %}

{# Refuse an unsuitable name, and settings that name a part of the environment differently. #}
{% macro refuse_environment_contradictions() -%}
  {%- set name = environment_name() -%}
  {%- if name -%}
    {%- if not modules.re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or name | length > 20 -%}
      {{ exceptions.raise_compiler_error(
        "PREFS_ENVIRONMENT=" ~ name ~ " is not an environment: 1 to 20 of a-z, 0-9 and single `_`, beginning with a letter"
      ) }}
    {%- endif -%}
    {%- for variable, found, given in [
      ("PREFS_ENGINE_SCHEMA", target.schema, name),
      ("PREFS_TABLE_PREFIX", table_prefix(), name | replace("_", "-") ~ "-"),
      ("PREFS_ICEBERG_NAMESPACE", iceberg_namespace(), name ~ "_training"),
    ] if found != given -%}
      {{ exceptions.raise_compiler_error(
        variable ~ "=" ~ found ~ " contradicts PREFS_ENVIRONMENT=" ~ name ~ ", which gives " ~ given ~ ": unset one of the two"
      ) }}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro %}
