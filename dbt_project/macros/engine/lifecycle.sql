{#
  The setup of a run: the few objects that are not models, the ownership of relations, and the record of deployed
  relations. `deployments` is stored in the engine itself, so that bare dbt, Dagster and `prefs` agree.
#}

{% macro deployments_ddl() -%}
  create table if not exists {{ target.schema }}.deployments (
    relation {{ catalog_type("text") }} primary key,
    kind {{ catalog_type("text") }},
    checksum {{ catalog_type("text") }},
    source_checksum {{ catalog_type("text") }},
    definition {{ catalog_type("text") }},
    state {{ catalog_type("text") }},
    deployed_at timestamp with time zone,
    invocation_id {{ catalog_type("text") }}
  )
{%- endmacro %}

{#
  The lock that every refresh and every change of a relation in this database takes. `again` is for after a commit
  (`begin_again`).
#}
{% macro engine_lock(again=false) -%}
  {%- if again -%}{% do begin_again() %}{%- endif -%}
  {% call statement("engine_lock", auto_begin=true) %}
    select pg_advisory_xact_lock(hashtext('dagster-prefs'), hashtext('{{ target.schema }}'))
  {% endcall %}
{%- endmacro %}

{#
  Begin a transaction after a commit: dbt commits by a statement, after which its driver begins no other transaction by
  itself, so that each later statement would be committed alone.
#}
{% macro begin_again() -%}
  {% call statement("begin_again", auto_begin=true) %}
    begin
  {% endcall %}
{%- endmacro %}

{% macro prepare_engine() -%}
  {%- if execute and flags.WHICH in ("run", "build", "test") -%}
    {% do refuse_stale() %}
    {% do refuse_environment_contradictions() %}
    {% do adapter.dispatch("require_version")() %}
    {% do refuse_impostors() %}
    {% do adapter.dispatch("prepare_engine")() %}
    {% do refuse_foreign_relations() %}
    {% do adapter.dispatch("prepare_kept_views")() %}
  {%- endif -%}
{%- endmacro %}

{#
  Refuse a server that is older than the project requires, before anything is created (dagster_prefs/engine/version.py).
#}
{% macro postgres__require_version() -%}
{%- endmacro %}

{% macro risingwave__require_version() -%}
  {%- set needed = var("requires_risingwave") -%}
  {%- set text = run_query("select version()").rows[0][0] -%}
  {%- set found = modules.re.search("RisingWave-(\\d+)\\.(\\d+)\\.(\\d+)", text) -%}
  {%- set version = found.groups() | map("int") | list if found else [0, 0, 0] -%}
  {%- if version < needed.version.split(".") | map("int") | list -%}
    {{ exceptions.raise_compiler_error(
      "RisingWave at " ~ target.host ~ ":" ~ target.port ~ " is " ~ text.split("RisingWave-")[-1].split(" ")[0] ~ ", and this project needs "
      ~ needed.version ~ " or newer: " ~ needed.because ~ ". Nothing was changed: upgrade RisingWave, then run again"
    ) }}
  {%- endif -%}
{%- endmacro %}

{# dbt creates a missing schema before any of our hooks run. #}
{% macro risingwave__create_schema(relation) -%}
  {% do risingwave__require_version() %}
  {% call statement("create_schema") %}
    create schema if not exists {{ relation.without_identifier().include(database=false) }}
  {% endcall %}
{%- endmacro %}

{#
  The two functions catch only the errors of invalid bytes, and are excluded from parallel plans: inside one, while a
  materialized view is refreshed, their exception block itself fails, and every event was then rejected as invalid JSON.
#}
{% macro postgres__prepare_engine() -%}
  {% call statement("prepare_engine", auto_begin=false) %}
    begin;
    select pg_advisory_xact_lock(hashtext('dagster-prefs'), hashtext('{{ target.schema }}'));
    create schema if not exists {{ target.schema }};
    {{ deployments_ddl() }};
    create or replace function {{ target.schema }}.prefs_text(bytes bytea) returns text
      language plpgsql immutable strict parallel unsafe as $$
        begin
          return convert_from(bytes, 'utf8');
        exception when data_exception or program_limit_exceeded then
          return encode(bytes, 'escape');
        end
      $$;
    create or replace function {{ target.schema }}.prefs_json(bytes bytea) returns jsonb
      language plpgsql immutable strict parallel unsafe as $$
        begin
          return convert_from(bytes, 'utf8')::jsonb;
        exception when data_exception or program_limit_exceeded then
          return null;
        end
      $$;
    commit;
  {% endcall %}
{%- endmacro %}

{% macro risingwave__prepare_engine() -%}
  {% do run_query("set rw_implicit_flush to true") %}
  {% do run_query("create schema if not exists " ~ target.schema) %}
  {% do run_query(deployments_ddl()) %}
{%- endmacro %}

{# The tables that are not models are recognised by their columns, because nothing else records them. #}
{% macro refuse_impostors() -%}
  {%- set foreign = [] -%}
  {%- for name, columns in {
    "deployments": ["relation", "checksum", "definition", "invocation_id"],
    "online_published": ["table_id", "domain_key", "entity_key", "fingerprint"],
    "live_pending": ["relation", "since"],
    "live_views": ["relation", "as_of"],
    "live_due": ["relation", "key"],
    "live_builds": ["relation", "built", "definition", "filled", "whole"],
    "live_changes": ["relation", "key"],
    "live_outbox": ["domain_key", "entity_key", "step"],
    "live_follower": ["process", "seen_at", "step"],
    "raw_retained": ["relation", "before"],
    "raw_arrivals": ["relation", "source", "source_partition", "first_offset", "last_offset", "messages"],
  }.items() -%}
    {%- set there = run_query(
      "select column_name from information_schema.columns where table_schema = '" ~ target.schema ~ "' and table_name = '" ~ name ~ "'"
    ).columns[0].values() | list -%}
    {%- if there and columns | reject("in", there) | list -%}{%- do foreign.append(name) -%}{%- endif -%}
  {%- endfor -%}
  {%- if foreign -%}{{ refuse_foreign(foreign) }}{%- endif -%}
{%- endmacro %}

{# A relation with a model's name that no deployment created belongs to someone else: it is never changed. #}
{% macro refuse_foreign_relations() -%}
  {%- set there = [] -%}
  {%- for row in list_relations_without_caching(api.Relation.create(database=target.database, schema=target.schema)) -%}
    {%- do there.append(row["name"]) -%}
  {%- endfor -%}
  {#- Read second: a relation that another run creates meanwhile was announced before it was created. #}
  {%- set ours = run_query("select relation from " ~ target.schema ~ ".deployments").columns[0].values() | list -%}
  {%- set foreign = [] -%}
  {%- for node in own_models() if node.alias in there and node.alias not in ours and node.alias != "deployments" -%}
    {%- do foreign.append(node.alias) -%}
  {%- endfor -%}
  {%- if foreign -%}{{ refuse_foreign(foreign) }}{%- endif -%}
{%- endmacro %}

{% macro refuse_foreign(names) -%}
  {{ exceptions.raise_compiler_error(
    "schema " ~ target.schema ~ " of database " ~ target.dbname ~ " holds relations that this project did not make: "
    ~ names | sort | join(", ") ~ ". They are left as they are: rename them, or choose another PREFS_ENGINE_SCHEMA or PREFS_ENGINE_DATABASE."
  ) }}
{%- endmacro %}

{#
  A model's SQL without the database's name, which differs in a copy or a restored backup, and without the suffix that
  `prefs apply` adds to the names of shadow relations.
#}
{% macro portable_definition() -%}
  {{ return(modules.re.sub('__next_[0-9a-f]{8}"', '"', sql | trim | replace(adapter.quote(target.dbname) ~ ".", ""))) }}
{%- endmacro %}

{# The checksum of a model's definition: its SQL and its indexes. #}
{% macro definition_checksum() -%}
  {{ return(local_md5(portable_definition() ~ "\n" ~ tojson(config.get("indexes", [])))) }}
{%- endmacro %}

{#
  Record a relation's owner before it is created, so that a crash between the two leaves no relation without an owner.
#}
{% macro announce_deployment() -%}
  {%- if execute and load_relation(this) is none -%}
    {{ write_deployment("creating", none) }}
  {%- else -%}
    select 1
  {%- endif -%}
{%- endmacro %}

{#
  Record the deployed relation. A model that was skipped although its SQL changed keeps its old record; if it was
  skipped because nothing changed, its contract may still have changed.
#}
{% macro record_deployment() -%}
  {%- if execute and load_result("main") -%}
    {%- set checksum = definition_checksum() -%}
    {%- if load_result("main").response.code != "skip" -%}
      {% do run_query(write_deployment("deployed", checksum)) %}
      {% do record_spread() %}
      {{ record_contract() }}
    {%- elif config.get("meta", {}).get("domain") and run_query(
      "select 1 from " ~ target.schema ~ ".deployments where relation = '" ~ this.identifier ~ "' and checksum = '" ~ checksum ~ "'"
    ).rows -%}
      {% do record_spread() %}
      {{ record_contract() }}
    {%- else -%}
      select 1
    {%- endif -%}
  {%- else -%}
    select 1
  {%- endif -%}
{%- endmacro %}

{# The serving contract of a domain's view: the parts of the manifest from which the contract is built. #}
{% macro record_contract() -%}
  {%- if config.get("meta", {}).get("domain") -%}
    {{ adapter.dispatch("upsert_deployment")(deployment_values("contract:" ~ this.identifier, "contract", none, none, tojson(contract_fragment()), "deployed")) }}
  {%- else -%}
    select 1
  {%- endif -%}
{%- endmacro %}

{#
  The expiry spread of a domain's view and the time from which it is in force, where it differs from the one before:
  training values of an earlier time are those of its spread (dagster_prefs/engine/spreads.py reads the records).
#}
{% macro record_spread() -%}
  {%- if config.get("meta", {}).get("domain") -%}
    {%- set seconds = (env_var("PREFS_EXPIRY_SPREAD_SECONDS", "0") or "0") | int -%}
    {%- set suffix = ":" ~ modules.re.sub("__next_[0-9a-f]{8}$", "", this.identifier) -%}
    {%- set before = run_query(
      "select checksum from " ~ target.schema ~ ".deployments where kind = 'spread' and right(relation, " ~ suffix | length ~ ") = '" ~ suffix
      ~ "' order by deployed_at desc limit 1"
    ).rows -%}
    {%- if not before or before[0][0] != seconds | string -%}
      {%- set at = modules.datetime.datetime.now(modules.pytz.utc).isoformat() -%}
      {% do run_query(adapter.dispatch("upsert_deployment")(
        deployment_values("spread:" ~ at ~ ":" ~ this.identifier, "spread", seconds, none, none, "deployed", at)
      )) %}
    {%- endif -%}
  {%- endif -%}
{%- endmacro %}

{% macro contract_fragment() -%}
  {%- set fragment = {"exposures": {}, "nodes": {}} -%}
  {#-
    `prefs generate` fills in the defaults of declarations: the contract's head, and the domain that each sink
    publishes.
  -#}
  {%- set found = namespace(domain=config.get("meta").domain) -%}
  {%- for id, node in graph.nodes.items() if node.resource_type == "model" -%}
    {%- if node.config.meta.contract -%}
      {%- do fragment.exposures.update({id: {"name": node.name, "config": {"meta": {"contract": node.config.meta.contract}}}}) -%}
    {%- elif node.config.meta.publishes and model.unique_id in node.depends_on.nodes -%}
      {%- set found.domain = node.config.meta.publishes -%}
    {%- endif -%}
  {%- endfor -%}
  {%- set columns = {} -%}
  {%- for column in model.columns.values() -%}
    {%- do columns.update({column.name: {"data_type": column.data_type, "description": column.description}}) -%}
    {%- set meta = {} -%}
    {%- for key in ["retired", "null_elements"] if column.meta.get(key) -%}{%- do meta.update({key: true}) -%}{%- endfor -%}
    {%- if meta -%}{%- do columns[column.name].update({"config": {"meta": meta}}) -%}{%- endif -%}
  {%- endfor -%}
  {%- do fragment.nodes.update({model.unique_id: {
    "name": model.name, "resource_type": "model", "columns": columns, "config": {"meta": {"domain": found.domain}}
  }}) -%}
  {%- for id, node in graph.nodes.items() if node.resource_type == "test" and node.attached_node == model.unique_id -%}
    {%- do fragment.nodes.update({id: {
      "resource_type": "test", "attached_node": node.attached_node, "column_name": node.column_name,
      "test_metadata": {"name": node.test_metadata.name if node.test_metadata else none}
    }}) -%}
  {%- endfor -%}
  {{ return(fragment) }}
{%- endmacro %}

{% macro write_deployment(state, checksum) -%}
  {{ return(adapter.dispatch("upsert_deployment")(deployment_values(
    this.identifier,
    config.get("materialized"),
    checksum,
    graph.nodes[model.unique_id].checksum.checksum if checksum else none,
    redacted(portable_definition()) if checksum else none,
    state
  ))) }}
{%- endmacro %}

{% macro deployment_values(relation, kind, checksum, source_checksum, definition, state, at=none) -%}
  insert into {{ target.schema }}.deployments (relation, kind, checksum, source_checksum, definition, state, deployed_at, invocation_id)
  values (
    {%- for value in [relation, kind, checksum, source_checksum, definition, state, at or run_started_at.isoformat(), invocation_id] %}
    {% if value is none %}null{% else %}'{{ value | string | replace("'", "''") }}'{% endif %}{{ "," if not loop.last }}
    {%- endfor %}
  )
{%- endmacro %}

{% macro postgres__upsert_deployment(insert) -%}
  {{ insert }}
  on conflict (relation) do update set
    kind = excluded.kind, checksum = excluded.checksum, source_checksum = excluded.source_checksum, definition = excluded.definition,
    state = excluded.state, deployed_at = excluded.deployed_at, invocation_id = excluded.invocation_id
{%- endmacro %}

{# An insert into a keyed RisingWave table replaces the row of that key. #}
{% macro risingwave__upsert_deployment(insert) -%}
  {{ insert }}
{%- endmacro %}

{# A definition without the values of options that hold credentials. #}
{% macro redacted(text) -%}
  {{ return(modules.re.sub("(?i)((?:secret|password|access[._]key|token|jaas)[a-z._]*\\s*=\\s*)'[^']*'", "\\1'***'", text)) }}
{%- endmacro %}
