{# The DDL that differs by engine: raw event tables, kept tables, DynamoDB sinks. #}

{#
  The raw table of a topic: each message as it came, keyed by source, partition and offset.
  With Kafka on RisingWave the connector fills it; everywhere else it is filled by INSERT or COPY.
#}
{% macro raw_event_table(topic) -%}
  {{ return(adapter.dispatch("raw_event_table")(topic)) }}
{%- endmacro %}

{% macro postgres__raw_event_table(topic) -%}
create table {{ this }} (
  source text not null,
  source_partition int not null,
  source_offset bigint not null,
  data bytea not null,
  kafka_timestamp timestamptz,
  arrived_at timestamptz not null default clock_timestamp(),
  primary key (source, source_partition, source_offset)
)
{%- endmacro %}

{% macro risingwave__raw_event_table(topic) -%}
{%- if kafka_bootstrap() %}
create table {{ this }} (
  data bytea,
  arrived_at timestamptz as proctime(),
  primary key (source_partition, source_offset)
)
include partition as source_partition
include offset as source_offset
include timestamp as kafka_timestamp
with (
  connector = 'kafka',
  topic = '{{ kafka_topic(topic) }}',
  properties.bootstrap.server = '{{ kafka_bootstrap() }}',
  scan.startup.mode = '{{ env_var("PREFS_KAFKA_START", "earliest") or "earliest" }}'
)
format plain encode bytes
{%- else %}
create table {{ this }} (
  source varchar,
  source_partition int,
  source_offset bigint,
  data bytea,
  kafka_timestamp timestamptz,
  arrived_at timestamptz default now(),
  primary key (source, source_partition, source_offset)
)
{%- endif %}
{%- endmacro %}

{% macro kafka_bootstrap() -%}
  {{ return(env_var("PREFS_KAFKA_BOOTSTRAP", "")) }}
{%- endmacro %}

{# The topic's name in Kafka; PREFS_KAFKA_TOPIC_USER_EVENTS and the like change it. #}
{% macro kafka_topic(topic) -%}
  {{ return(env_var("PREFS_KAFKA_TOPIC_" ~ topic | replace(".", "_") | upper, topic) or topic) }}
{%- endmacro %}

{# The columns of a raw table under one set of types, whoever filled it. #}
{% macro raw_columns(topic) -%}
  {%- if target.type == "risingwave" and kafka_bootstrap() -%}
    'kafka:{{ kafka_topic(topic) }}' as source,
    source_partition::int as source_partition,
    source_offset::bigint as source_offset,
  {%- else -%}
    source,
    source_partition,
    source_offset,
  {%- endif %}
    kafka_timestamp,
    arrived_at,
    data
{%- endmacro %}

{# A table that this platform writes and keeps; its columns are those of its YAML. #}
{% macro kept_table(primary_key) -%}
create table {{ this }} (
  {%- for column in model.columns.values() %}
  {{ column.name }} {{ catalog_type(column.data_type) }},
  {%- endfor %}
  primary key ({{ primary_key | join(", ") }})
)
{%- endmacro %}

{# The sink of one domain: DDL on RisingWave, the view that the publisher reads on the embedded engine. #}
{% macro dynamodb_sink(relation) -%}
  {{ return(adapter.dispatch("dynamodb_sink")(relation)) }}
{%- endmacro %}

{% macro postgres__dynamodb_sink(relation) -%}
select * from {{ relation }}
{%- endmacro %}

{#
  Credentials are named, not given: the materialization puts them in when it runs the statement, so that they are
  in no compiled file, no manifest and no record of what is deployed. A role needs none of them.
#}
{% macro risingwave__dynamodb_sink(relation) -%}
{%- if env_var("PREFS_PUBLISH", "auto") == "publisher" -%}
select * from {{ relation }}
{%- else -%}
create sink {{ this }} from {{ relation }}
with (
  connector = 'dynamodb',
  table = '{{ env_var("PREFS_TABLE_PREFIX", "") }}viewer_profiles',
  primary_key = 'viewer_id,domain_key',
  aws.region = '{{ env_var("AWS_REGION", "eu-central-1") or "eu-central-1" }}'
  {%- if env_var("AWS_ENDPOINT_URL", "") %},
  aws.endpoint_url = '{{ env_var("AWS_ENDPOINT_URL") }}'
  {%- endif %}
  {%- if env_var("PREFS_SINK_ROLE_ARN", "") %},
  aws.credentials.role.arn = '{{ env_var("PREFS_SINK_ROLE_ARN") }}'
  {#- Only at execution: dbt keeps every value that was read while parsing in its partial-parse file. #}
  {%- elif execute and env_var("AWS_ACCESS_KEY_ID", "") %},
  aws.credentials.access_key_id = '${AWS_ACCESS_KEY_ID}',
  aws.credentials.secret_access_key = '${AWS_SECRET_ACCESS_KEY}'
  {%- endif %}
)
{%- endif -%}
{%- endmacro %}

{#
  RisingWave's own writing of a training table, for days that one process no longer exports in time. Deletes would come
  as files that few readers apply, so the sink writes to a branch and the compactor carries whole rows over to main.
  Catalog and table are those of the export (PREFS_ICEBERG_*), which makes the table beforehand.
#}
{% macro iceberg_sink(relation, table, key) -%}
{%- set catalog = env_var("PREFS_ICEBERG_CATALOG", "glue") -%}
create sink {{ this }} as
select * from {{ relation }} where viewer_id >= 0
with (
  connector = 'iceberg',
  type = 'upsert',
  primary_key = '{{ key | join(",") }}',
  write_mode = 'copy-on-write',
  enable_compaction = 'true',
  compaction_interval_sec = '600',
  commit_checkpoint_interval = '60',
  is_exactly_once = 'true',
  catalog.type = '{{ catalog }}',
  {%- if catalog == "rest" %}
  catalog.uri = '{{ env_var("PREFS_ICEBERG_URI") }}',
  {%- endif %}
  warehouse.path = '{{ env_var("PREFS_ICEBERG_WAREHOUSE", "") }}',
  database.name = '{{ env_var("PREFS_ICEBERG_NAMESPACE", "training") }}',
  table.name = '{{ table }}',
  {%- if env_var("AWS_ENDPOINT_URL", "") %}
  s3.endpoint = '{{ env_var("AWS_ENDPOINT_URL") }}',
  s3.path.style.access = 'true',
  {%- endif %}
  {#- Only at execution, as for the DynamoDB sinks; without keys the engine's own identity is used. #}
  {%- if execute and env_var("AWS_ACCESS_KEY_ID", "") %}
  s3.access.key = '${AWS_ACCESS_KEY_ID}',
  s3.secret.key = '${AWS_SECRET_ACCESS_KEY}',
  {%- else %}
  enable_config_load = 'true',
  {%- endif %}
  s3.region = '{{ env_var("AWS_REGION", "eu-central-1") or "eu-central-1" }}'
)
{%- endmacro %}

{# A statement with the credentials it names, for running only. #}
{% macro with_credentials(statement) -%}
  {%- set done = namespace(text=statement) -%}
  {%- for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] if "${" ~ name ~ "}" in statement -%}
    {%- set done.text = done.text | replace("${" ~ name ~ "}", env_var(name) | replace("'", "''")) -%}
  {%- endfor -%}
  {{ return(done.text) }}
{%- endmacro %}

{# dbt reads columns from information_schema, which leaves materialized views out; unit tests need theirs too. #}
{% macro postgres__get_columns_in_relation(relation) -%}
  {% call statement("get_columns_in_relation", fetch_result=True) %}
    select
      a.attname as column_name,
      format_type(a.atttypid, a.atttypmod) as data_type,
      null::int as character_maximum_length,
      null::int as numeric_precision,
      null::int as numeric_scale
    from pg_attribute as a
    join pg_class as c on c.oid = a.attrelid
    join pg_namespace as n on n.oid = c.relnamespace
    where a.attnum > 0 and not a.attisdropped and c.relname = '{{ relation.identifier }}'
      {%- if relation.schema %} and n.nspname = '{{ relation.schema }}'{% else %} and pg_table_is_visible(c.oid){% endif %}
    order by a.attnum
  {% endcall %}
  {{ return(sql_convert_columns_in_relation(load_result("get_columns_in_relation").table)) }}
{%- endmacro %}

{# RisingWave comments on tables and materialized views only. #}
{% macro risingwave__persist_docs(relation, model, for_relation=true, for_columns=true) -%}
  {%- if relation.type != "view" -%}
    {{ default__persist_docs(relation, model, for_relation, for_columns) }}
  {%- endif -%}
{%- endmacro %}
