{#
  Secrets are only named in a compiled statement and inserted when it runs, so that they are in no compiled file, no
  manifest and no deployment record. With PREFS_RISINGWAVE_SECRETS=on they are not in RisingWave's catalog either: an
  option then refers to a RisingWave secret, which is created before its first use.
#}

{# The value of an option: the name of a variable, or of a secret that holds it. #}
{% macro credential(name) -%}
  {{ return(secret_of(name) if uses_secrets() else "'${" ~ name ~ "}'") }}
{%- endmacro %}

{% macro uses_secrets() -%}
  {{ return((env_var("PREFS_RISINGWAVE_SECRETS", "") or "off") == "on") }}
{%- endmacro %}

{% macro secret_of(name) -%}
  {{ return("secret " ~ target.schema ~ "." ~ secret_name(name)) }}
{%- endmacro %}

{% macro secret_name(name) -%}
  {{ return("prefs_" ~ name | lower | replace("prefs_", "")) }}
{%- endmacro %}

{#
  The variables that hold credentials; read at execution only, because dbt stores values that it reads while parsing.
#}
{% macro credential_variables() -%}
  {{ return([
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PREFS_KAFKA_SASL_PASSWORD", "PREFS_KAFKA_SSL_KEY_PASSWORD",
    "PREFS_KAFKA_SSL_KEY_PEM", "PREFS_KAFKA_SSL_CERTIFICATE_PEM", "PREFS_KAFKA_SSL_CA_PEM", "PREFS_ICEBERG_CREDENTIAL",
  ]) }}
{%- endmacro %}

{# AWS options of a connector: a role, else the keys of this environment, else nothing and the engine's own identity. #}
{% macro aws_credentials(role) -%}
  {%- if role -%}{{ return(["aws.credentials.role.arn = " ~ text_literal(role)]) }}{%- endif -%}
  {%- set options = [] -%}
  {%- if execute and env_var("AWS_ACCESS_KEY_ID", "") -%}
    {%- for option, name in {
      "access_key_id": "AWS_ACCESS_KEY_ID", "secret_access_key": "AWS_SECRET_ACCESS_KEY", "session_token": "AWS_SESSION_TOKEN",
    }.items() if env_var(name, "") -%}
      {%- do options.append("aws.credentials." ~ option ~ " = " ~ credential(name)) -%}
    {%- endfor -%}
  {%- endif -%}
  {{ return(options) }}
{%- endmacro %}

{# A statement with its credentials inserted, for running only; missing secrets to which it refers are created. #}
{% macro with_credentials(statement) -%}
  {%- set done = namespace(text=statement) -%}
  {%- for name in credential_variables() -%}
    {%- if "${" ~ name ~ "}" in statement -%}
      {%- set done.text = done.text | replace("${" ~ name ~ "}", env_var(name) | replace("'", "''")) -%}
    {%- endif -%}
    {%- if secret_of(name) in statement and not secret_exists(name) -%}
      {% do require_feature("SecretManagement", "PREFS_RISINGWAVE_SECRETS=on", "set PREFS_RISINGWAVE_SECRETS=off") %}
      {% do run_query("create " ~ secret_of(name) ~ " with (backend = 'meta') as " ~ text_literal(env_var(name))) %}
    {%- endif -%}
  {%- endfor -%}
  {{ return(done.text) }}
{%- endmacro %}

{% macro secret_exists(name) -%}
  {{ return(run_query(
    "select 1 from rw_catalog.rw_secrets s join rw_catalog.rw_schemas n on n.id = s.schema_id where n.name = "
    ~ text_literal(target.schema) ~ " and s.name = " ~ text_literal(secret_name(name))
  ).rows | length > 0) }}
{%- endmacro %}

{# `dbt run-operation rotate_secrets`: set every existing secret to the value in this environment. #}
{% macro rotate_secrets() -%}
  {%- for name in credential_variables() if env_var(name, "") and secret_exists(name) -%}
    {% do run_query("alter " ~ secret_of(name) ~ " with (backend = 'meta') as " ~ text_literal(env_var(name))) %}
    {% do log("rotated " ~ target.schema ~ "." ~ secret_name(name), info=true) %}
  {%- endfor -%}
{%- endmacro %}

{#
  Refuse a feature that the licence does not grant before a statement is tried; a server without the licence view is
  asked by trying.
#}
{% macro require_feature(feature, wanted_by, otherwise) -%}
  {%- set rows = run_query("select available from rw_catalog.rw_features where name = '" ~ feature ~ "'").rows -%}
  {%- if rows and not rows[0][0] -%}
    {{ exceptions.raise_compiler_error(
      "RisingWave's licence does not grant " ~ feature ~ ", which " ~ wanted_by ~ " needs: set a key with `alter system set license_key = '…'`, "
      ~ "keep the cluster at 4 CPU cores and below 20 GiB of memory, where everything is granted without one, or " ~ otherwise
    ) }}
  {%- endif -%}
{%- endmacro %}
