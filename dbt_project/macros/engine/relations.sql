{# The DDL that differs by engine: raw event tables, kept tables, DynamoDB sinks. #}

{#
  The raw table of a topic: each message unchanged, keyed by source, partition and offset. On RisingWave with Kafka the
  topic's feed fills it (kafka.sql); it accepts INSERT everywhere.
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

{#
  The first row of a key stays, so that a second reading of a message changes nothing. RisingWave deletes rows by age
  only in append-only tables; views are not told of it and keep what they counted.
#}
{% macro risingwave__raw_event_table(topic) -%}
{%- set retention = env_var("PREFS_RAW_RETENTION_SECONDS", "") -%}
create table {{ this }} (
  source varchar,
  source_partition int,
  source_offset bigint,
  data bytea,
  kafka_timestamp timestamptz,
  arrived_at timestamptz default now(),
  primary key (source, source_partition, source_offset)
)
{%- if retention %}
append only on conflict do nothing
with (retention_seconds = {{ retention | int }})
{%- else %}
on conflict do nothing
{%- endif %}
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

{#
  An index, newest first, on the column whose newest value freshness reads (`meta.time`, or a topic's time), with the
  columns by which the reading filters (`meta.time_include`), so that the cost of a reading does not depend on the
  number of rows. It is created if missing, without a rebuild. RisingWave copies every column into an index that
  includes none by name.
#}
{% macro index_time() -%}
  {%- set meta = config.get("meta", {}) -%}
  {%- if execute and time_column() and run_query(
    "select 1 from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = '" ~ this.schema
    ~ "' and c.relname = '" ~ time_index(this) ~ "'"
  ).rows | length == 0 -%}
    create index "{{ time_index(this) }}" on {{ this }} ("{{ time_column() }}" desc) include ("{{ meta.get("time_include", [time_column()]) | join('", "') }}")
  {%- else -%}
    select 1
  {%- endif -%}
{%- endmacro %}

{% macro time_column() -%}
  {%- set meta = config.get("meta", {}) -%}
  {{ return(meta.get("time") or meta.get("topic", {}).get("time")) }}
{%- endmacro %}

{% macro time_index(relation) -%}
  {{ return(relation.identifier ~ "_by_" ~ time_column()) }}
{%- endmacro %}

{#
  RisingWave already stores every relation by its key and has no unique indexes: one on that key would only be a second
  copy of the relation. `verdicts` adds two columns after the key of a parsed relation, which does not change this.
#}
{% macro risingwave__create_indexes(relation) -%}
  {%- set key = run_query(
    "select c.name from rw_catalog.rw_columns c join rw_catalog.rw_relations r on r.id = c.relation_id join rw_catalog.rw_schemas n"
    ~ " on n.id = r.schema_id where n.name = '" ~ relation.schema ~ "' and r.name = '" ~ relation.identifier ~ "' and c.is_primary_key"
    ~ " and c.name not in ('canary', '$src')"
  ).columns[0].values() | sort -%}
  {%- for index in config.get("indexes", []) if not (index.unique and key == index.columns | sort) -%}
    {% do run_query(get_create_index_sql(relation, index)) %}
  {%- endfor -%}
{%- endmacro %}

{#
  A change of indexes changes the model, which its checksum shows (`prefs plan`). The adapter would instead warn at
  every run about indexes that the two macros above create or omit.
#}
{% macro risingwave__get_materialized_view_configuration_changes(existing_relation, new_config) -%}
  {{ return(none) }}
{%- endmacro %}

{#
  The sink of one domain of an entity: on RisingWave a sink, or the relation that the changefeed reads; on the embedded
  engine a view. `attributes` are those of the items if they differ from the relation's columns: some are retired, or
  the key is composite.
#}
{% macro dynamodb_sink(relation, entity, attributes=[]) -%}
  {{ return(adapter.dispatch("dynamodb_sink")(relation, entity, attributes)) }}
{%- endmacro %}

{% macro postgres__dynamodb_sink(relation, entity, attributes) -%}
select * from {{ relation }}
{%- endmacro %}

{% macro risingwave__dynamodb_sink(relation, entity, attributes) -%}
{%- if env_var("PREFS_PUBLISH", "auto") == "publisher" -%}
select * from {{ relation }}
{%- elif env_var("PREFS_PUBLISH", "auto") == "changefeed" -%}
create subscription {{ this }} from {{ relation }}
with (retention = '{{ (env_var("PREFS_CHANGEFEED_RETENTION_HOURS", "24") or "24") | int }} hours')
{%- else -%}
create sink {{ this }}
{%- if attributes %} as select {{ first_key(entity) }}, {{ sort_key(entity) }}, {{ attributes | join(", ") }} from {{ relation }}
{%- else %} from {{ relation }}
{%- endif %}
with (
  connector = 'dynamodb',
  table = {{ text_literal(table_prefix() ~ entity_of(entity).table) }},
  primary_key = '{{ first_key(entity) }},domain_key',
  aws.region = {{ text_literal(env_var("AWS_REGION", "eu-central-1") or "eu-central-1") }}
  {%- if env_var("AWS_ENDPOINT_URL", "") %},
  aws.endpoint_url = {{ text_literal(env_var("AWS_ENDPOINT_URL")) }}
  {%- endif %}
  {%- for option in aws_credentials(env_var("PREFS_SINK_ROLE_ARN", "")) %},
  {{ option }}
  {%- endfor %}
  {%- for option, name in {
    "dynamodb.max_batch_item_nums": "PREFS_SINK_BATCH_ITEMS",
    "dynamodb.max_future_send_nums": "PREFS_SINK_PARALLEL_REQUESTS",
    "dynamodb.batch_write_retry_times": "PREFS_SINK_RETRIES",
    "dynamodb.batch_write_retry_backoff_ms": "PREFS_SINK_RETRY_BACKOFF_MS",
  }.items() if env_var(name, "") %},
  {{ option }} = '{{ env_var(name) | int }}'
  {%- endfor %}
)
{%- endif -%}
{%- endmacro %}

{#
  RisingWave's own sink into a training table, for days that one process cannot export in time. Deletes would be written
  as files that few readers apply, so the sink writes to a branch and the compactor copies whole rows to main. Catalog
  and table are those of the export (PREFS_ICEBERG_*), which creates the table beforehand.
#}
{% macro iceberg_sink(relation, entity, table, key) -%}
create sink {{ this }} as
select * from {{ relation }} where {{ of_people(first_key(entity)) }}
with (
  connector = 'iceberg',
  type = 'upsert',
  primary_key = '{{ key | join(",") }}',
  write_mode = 'copy-on-write',
  enable_compaction = 'true',
  compaction_interval_sec = '3600',
  commit_checkpoint_interval = '60',
  is_exactly_once = 'true',
  {{ iceberg_options(iceberg_namespace(), table) }}
)
{%- endmacro %}

{#
  The options of RisingWave's sink of raw messages into the lake. It appends whole rows, so that it commits to the table
  itself; its table is made beforehand, as those of the tiles.
#}
{% macro raw_sink_options(table) -%}
with (
  connector = 'iceberg',
  type = 'append-only',
  commit_checkpoint_interval = '60',
  is_exactly_once = 'true',
  {{ iceberg_options(iceberg_namespace(), table) }}
)
{%- endmacro %}

{# The options of a connector that reach a table of the platform's Iceberg catalog (PREFS_ICEBERG_*). #}
{% macro iceberg_options(namespace, table) -%}
{%- set catalog = env_var("PREFS_ICEBERG_CATALOG", "glue") -%}
catalog.type = {{ text_literal(catalog) }},
  {#- `rest_rust` is RisingWave's client of the same catalogs without Java. #}
  {%- if catalog in ("rest", "rest_rust") %}
  catalog.uri = {{ text_literal(env_var("PREFS_ICEBERG_URI")) }},
  {%- if execute and env_var("PREFS_ICEBERG_CREDENTIAL", "") %}
  catalog.credential = {{ credential("PREFS_ICEBERG_CREDENTIAL") }},
  {%- endif %}
  {%- endif %}
  warehouse.path = {{ text_literal(env_var("PREFS_ICEBERG_WAREHOUSE", "")) }},
  database.name = {{ text_literal(namespace) }},
  table.name = {{ text_literal(table) }},
  {%- if env_var("AWS_ENDPOINT_URL", "") %}
  s3.endpoint = {{ text_literal(env_var("AWS_ENDPOINT_URL")) }},
  s3.path.style.access = 'true',
  {%- endif %}
  {#- Only at execution, as for the DynamoDB sinks; without keys the engine's own identity is used. #}
  {%- if execute and env_var("AWS_ACCESS_KEY_ID", "") %}
  s3.access.key = {{ credential("AWS_ACCESS_KEY_ID") }},
  s3.secret.key = {{ credential("AWS_SECRET_ACCESS_KEY") }},
  {%- else %}
  enable_config_load = 'true',
  {%- endif %}
  s3.region = {{ text_literal(env_var("AWS_REGION", "eu-central-1") or "eu-central-1") }}
{%- endmacro %}

{#
  Create the source over which RisingWave reads a history (`prefs bootstrap`), in place of an earlier one. It stores
  nothing; credentials are inserted when the statement runs, or named as secrets.
#}
{% macro create_history_source(relation, namespace, table) -%}
  {% do run_query("drop source if exists " ~ history_relation(relation)) %}
  {% do run_query(with_credentials(history_source(relation, namespace, table))) %}
{%- endmacro %}

{# The statement of that source. RisingWave takes its columns from the table. #}
{% macro history_source(relation, namespace, table) -%}
create source {{ history_relation(relation) }}
with (
  connector = 'iceberg',
  {{ iceberg_options(namespace, table) }}
)
{%- endmacro %}

{% macro history_relation(name) -%}
  {{ return(api.Relation.create(database=target.database, schema=target.schema, identifier=name)) }}
{%- endmacro %}

{# dbt reads columns from information_schema, which omits materialized views; unit tests need theirs too. #}
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

{# RisingWave supports comments on tables and materialized views only. #}
{% macro risingwave__persist_docs(relation, model, for_relation=true, for_columns=true) -%}
  {%- if relation.type != "view" -%}
    {{ default__persist_docs(relation, model, for_relation, for_columns) }}
  {%- endif -%}
{%- endmacro %}
