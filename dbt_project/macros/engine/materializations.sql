{#
  The materializations of the embedded engine. RisingWave's own come from dbt-risingwave under the same names,
  so a model says `materialized_view`, `table_with_connector` or `sink` and runs on both.
#}

{# What stands in the catalog under this name: kind, and the checksum of the deployed definition. #}
{% macro deployed_state(relation) -%}
  {%- set rows = run_query(
    "select c.relkind::text, d.checksum from pg_class c join pg_namespace n on n.oid = c.relnamespace left join "
    ~ target.schema ~ ".deployments d on d.relation = c.relname where n.nspname = '" ~ relation.schema
    ~ "' and c.relname = '" ~ relation.identifier ~ "' and c.relkind in ('r', 'v', 'm', 'p', 'f')"
  ).rows -%}
  {{ return(rows[0] if rows else none) }}
{%- endmacro %}

{# Every view on a relation, direct or not, nearest first, with all that is needed to make it again. #}
{% macro dependents_of(relation) -%}
  {{ return(run_query("
    with recursive dependents as (
      select '" ~ relation ~ "'::regclass::oid as oid, 0 as depth
      union
      select rule.ev_class, dependents.depth + 1
      from dependents
      join pg_depend on pg_depend.refobjid = dependents.oid and pg_depend.refclassid = 'pg_class'::regclass
        and pg_depend.classid = 'pg_rewrite'::regclass
      join pg_rewrite as rule on rule.oid = pg_depend.objid and rule.ev_class <> dependents.oid
    )
    select
      format('%I.%I', n.nspname, c.relname) as name,
      case c.relkind when 'm' then 'materialized view' else 'view' end as kind,
      pg_get_viewdef(c.oid) as definition,
      coalesce(obj_description(c.oid, 'pg_class'), '') as description,
      coalesce((select string_agg(pg_get_indexdef(indexrelid), ';' order by indexrelid) from pg_index where indrelid = c.oid), '') as indexes
    from dependents
    join pg_class as c on c.oid = dependents.oid and c.relkind in ('m', 'v')
    join pg_namespace as n on n.oid = c.relnamespace
    where dependents.depth > 0
    group by c.oid, c.relname, c.relkind, n.nspname
    order by max(dependents.depth)
  ").rows) }}
{%- endmacro %}

{# Drop a view with all that stands on it, and give the statements that make the latter again. #}
{% macro drop_and_remember(relation, relkind) -%}
  {%- set again = [] -%}
  {%- for row in dependents_of(relation) -%}
    {%- do again.append("create " ~ row["kind"] ~ " " ~ row["name"] ~ " as " ~ row["definition"]) -%}
    {%- if row["indexes"] -%}{%- do again.append(row["indexes"]) -%}{%- endif -%}
    {%- if row["description"] -%}
      {%- do again.append("comment on " ~ row["kind"] ~ " " ~ row["name"] ~ " is '" ~ row["description"] | replace("'", "''") ~ "'") -%}
    {%- endif -%}
  {%- endfor -%}
  {% do run_query("drop " ~ {"m": "materialized view", "v": "view", "r": "table"}[relkind] ~ " " ~ relation ~ " cascade") %}
  {{ return(again) }}
{%- endmacro %}

{# PostgreSQL lets a materialized view have any columns, so the contract is checked against the catalog. #}
{% macro check_contract(relation) -%}
  {%- if config.get("contract") and config.get("contract").enforced -%}
    {%- set there = [] -%}
    {%- for row in run_query(
      "select attname, format_type(atttypid, atttypmod) from pg_attribute where attrelid = '" ~ relation
      ~ "'::regclass and attnum > 0 and not attisdropped order by attnum"
    ).rows -%}
      {%- do there.append(row[0] ~ " " ~ row[1]) -%}
    {%- endfor -%}
    {%- set promised = [] -%}
    {%- for column in model.columns.values() -%}
      {%- do promised.append(column.name ~ " " ~ catalog_type(column.data_type)) -%}
    {%- endfor -%}
    {%- if there != promised -%}
      {{ exceptions.raise_compiler_error(
        "the columns of " ~ relation.identifier ~ " are not those of its contract. It has: " ~ there | join(", ")
        ~ ". The contract says: " ~ promised | join(", ") ~ ". Change the SQL or the YAML."
      ) }}
    {%- endif -%}
  {%- endif -%}
{%- endmacro %}

{#
  The descriptions of the YAML as comments. dbt's own macro looks each column up in information_schema, which
  leaves materialized views out, and would warn about every one.
#}
{% macro describe(relation) -%}
  {% call statement("describe") %}
    comment on {{ relation.type | replace("_", " ") }} {{ relation }} is '{{ model.description | trim | replace("'", "''") }}';
    {%- for column in model.columns.values() if column.description %}
    comment on column {{ relation }}.{{ adapter.quote(column.name) }} is '{{ column.description | replace("'", "''") }}';
    {%- endfor %}
  {% endcall %}
{%- endmacro %}

{# Make or replace a view; whatever stood on the old one is made again in the same transaction. #}
{% macro put_view(relation, kind, state) -%}
  {%- set again = drop_and_remember(relation, state[0]) if state else [] -%}
  {% call statement("main") %}
    create {{ kind }} {{ relation }} as {{ sql }}
  {% endcall %}
  {%- if kind == "materialized view" -%}{% do create_indexes(relation) %}{%- endif -%}
  {% do check_contract(relation) %}
  {%- for statement in again -%}{% do run_query(statement) %}{%- endfor -%}
{%- endmacro %}

{% materialization materialized_view, adapter='postgres' %}
  {%- set relation = this.incorporate(type="materialized_view") -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {% do engine_lock() %}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}
  {%- set state = deployed_state(relation) -%}
  {%- if state and state[0] == "m" and state[1] == definition_checksum() and not should_full_refresh() -%}
    {% call statement("main") %}
      refresh materialized view {{ relation }}
    {% endcall %}
  {%- else -%}
    {% do put_view(relation, "materialized view", state) %}
    {% call statement("analyze") %}
      analyze {{ relation }}
    {% endcall %}
  {%- endif -%}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{# A plain view needs no refresh: it is made where it is missing or its definition changed. #}
{% macro put_plain_view(relation) -%}
  {%- set state = deployed_state(relation) -%}
  {%- if state and state[0] == "v" and state[1] == definition_checksum() -%}
    {% do store_raw_result(name="main", message="SKIP", code="SKIP", rows_affected="-1") %}
  {%- else -%}
    {% do put_view(relation, "view", state) %}
  {%- endif -%}
{%- endmacro %}

{% materialization view, adapter='postgres' %}
  {%- set relation = this.incorporate(type="view") -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {% do engine_lock() %}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}
  {% do put_plain_view(relation) %}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{# What the publisher reads: a view of the items, and the table that remembers what was published. #}
{% materialization sink, adapter='postgres' %}
  {%- set relation = this.incorporate(type="view") -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {% do engine_lock() %}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}
  {% do run_query(
    "create table if not exists " ~ target.schema ~ ".online_published (table_id text, domain_key text, viewer_id bigint, fingerprint text not null, primary key (table_id, domain_key, viewer_id))"
  ) %}
  {% do put_plain_view(relation) %}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{# A table that holds what arrived: made once, never replaced, whatever flags a run has. #}
{% materialization table_with_connector, adapter='postgres' %}
  {%- set relation = this.incorporate(type="table") -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {% do engine_lock() %}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}
  {%- set state = deployed_state(relation) -%}
  {%- if state and state[0] != "r" -%}
    {{ exceptions.raise_compiler_error(relation.identifier ~ " exists and is not a table: it holds what arrived and is never replaced; rename it first") }}
  {%- endif -%}
  {%- if state -%}
    {% do store_raw_result(name="main", message="SKIP", code="SKIP", rows_affected="-1") %}
  {%- else -%}
    {% call statement("main") %}
      {{ sql }}
    {% endcall %}
    {% do create_indexes(relation) %}
  {%- endif -%}
  {% do check_contract(relation) %}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}
