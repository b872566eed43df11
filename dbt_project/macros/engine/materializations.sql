{#
  The materializations of the embedded engine. RisingWave's own come from dbt-risingwave under the same names, so a
  model's `materialized_view`, `table_with_connector` or `sink` runs on both. Only RisingWave's sink is ours, because
  dbt-risingwave writes its statement, credentials included, to dbt's target folder.
#}

{#
  The object in the catalog with this name: kind (`k` is a kept view, else PostgreSQL's relkind), and the checksum of
  the deployed definition.
#}
{% macro deployed_state(relation) -%}
  {%- set rows = run_query(
    "select case when c.relkind = 'r' and to_regclass('" ~ query_of(relation) ~ "') is not null then 'k' else c.relkind::text end, d.checksum"
    ~ " from pg_class c join pg_namespace n on n.oid = c.relnamespace left join "
    ~ target.schema ~ ".deployments d on d.relation = c.relname where n.nspname = '" ~ relation.schema
    ~ "' and c.relname = '" ~ relation.identifier ~ "' and c.relkind in ('r', 'v', 'm', 'p', 'f')"
  ).rows -%}
  {{ return(rows[0] if rows else none) }}
{%- endmacro %}

{#
  A relation and every view on it, direct or indirect, nearest first, with everything needed to recreate them:
  definition, indexes, comments, grants. The relation itself is the first row, at depth 0. The reader of a kept view is
  its query, and dependents of the view depend on its table.
#}
{% macro dependents_of(relation) -%}
  {{ return(run_query("
    with recursive dependents as (
      select '" ~ relation ~ "'::regclass::oid as oid, 0 as depth
      union
      select coalesce(kept.oid, rule.ev_class), dependents.depth + 1
      from dependents
      join pg_depend on pg_depend.refobjid = dependents.oid and pg_depend.refclassid = 'pg_class'::regclass
        and pg_depend.classid = 'pg_rewrite'::regclass
      join pg_rewrite as rule on rule.oid = pg_depend.objid and rule.ev_class <> dependents.oid
      join pg_class as reader on reader.oid = rule.ev_class
      left join pg_class as kept on kept.relnamespace = reader.relnamespace and kept.relkind = 'r'
        and reader.relname = kept.relname || '" ~ query_suffix() ~ "'
    )
    select
      max(dependents.depth) as depth,
      c.relname as identifier,
      format('%I.%I', n.nspname, c.relname) as name,
      case when query.oid is not null then 'kept view' when c.relkind = 'm' then 'materialized view' when c.relkind = 'v' then 'view' else 'table' end as kind,
      case when query.oid is not null then format('%I.%I', n.nspname, query.relname) end as query,
      case when c.relkind <> 'r' or query.oid is not null then pg_get_viewdef(coalesce(query.oid, c.oid)) end as definition,
      coalesce((select string_agg(pg_get_indexdef(indexrelid), ';' order by indexrelid) from pg_index where indrelid = c.oid), '') as indexes,
      coalesce((
        select string_agg(
          case when a.attname is null
            then format('comment on %s %I.%I is %L', case c.relkind when 'm' then 'materialized view' when 'r' then 'table' else 'view' end, n.nspname, c.relname, d.description)
            else format('comment on column %I.%I.%I is %L', n.nspname, c.relname, a.attname, d.description) end, ';')
        from pg_description as d
        left join pg_attribute as a on a.attrelid = d.objoid and a.attnum = d.objsubid and d.objsubid > 0
        where d.objoid = c.oid and d.classoid = 'pg_class'::regclass
      ), '') as comments,
      coalesce((
        select string_agg(format('grant %s on %I.%I to %s', acl.privilege_type, n.nspname, c.relname,
          case when acl.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(acl.grantee)) end), ';')
        from aclexplode(c.relacl) as acl where acl.grantee <> c.relowner
      ), '') as grants
    from dependents
    join pg_class as c on c.oid = dependents.oid
    join pg_namespace as n on n.oid = c.relnamespace
    left join pg_class as query on query.relnamespace = c.relnamespace and query.relkind = 'v' and c.relkind = 'r'
      and query.relname = c.relname || '" ~ query_suffix() ~ "'
    where c.relkind in ('m', 'v') or query.oid is not null or dependents.depth = 0
    group by c.oid, c.relname, c.relkind, c.relowner, c.relacl, n.oid, n.nspname, query.oid, query.relname
    order by max(dependents.depth)
  ").rows) }}
{%- endmacro %}

{# The statements that create a relation of a kind from a query, and that drop one. #}
{% macro create_statement(kind, name, query, definition) -%}
  {%- if kind == "kept view" -%}
    create view {{ query }} as {{ definition }}; create table {{ name }} as select * from {{ query }}
  {%- else -%}
    create {{ kind }} {{ name }} as {{ definition }}
  {%- endif -%}
{%- endmacro %}

{% macro drop_statement(kind, name, query) -%}
  {%- if kind == "kept view" -%}
    drop view {{ query }} cascade; drop table {{ name }} cascade
  {%- else -%}
    drop {{ kind }} {{ name }} cascade
  {%- endif -%}
{%- endmacro %}

{#
  The PL/pgSQL that recreates a dropped dependent from a definition. The rows of a kept view stayed, and are compared
  with those of its query after the change, so that nobody waits for them meanwhile; unless they have other columns now.
#}
{% macro remake(row, definition, extras) -%}
  {%- set extra = namespace(text="") -%}
  {%- for one in extras if one -%}
    {%- set extra.text = extra.text ~ "execute $prefs_sql$" ~ one ~ "$prefs_sql$;\n      " -%}
  {%- endfor -%}
  {%- if row["kind"] == "kept view" -%}
      execute $prefs_sql$create view {{ row["query"] }} as {{ definition }}$prefs_sql$;
      if {{ target.schema }}.prefs_columns('{{ row["query"] }}') <> {{ target.schema }}.prefs_columns('{{ row["name"] }}') then
        execute $prefs_sql$drop table {{ row["name"] }} cascade; create table {{ row["name"] }} as select * from {{ row["query"] }}$prefs_sql$;
      {{ extra.text }}perform {{ target.schema }}.prefs_changed('{{ row["identifier"] }}');
      end if;
  {%- else -%}
      execute $prefs_sql${{ create_statement(row["kind"], row["name"], row["query"], definition) }}$prefs_sql$;
      {{ extra.text }}
  {%- endif -%}
{%- endmacro %}

{#
  The statement that recreates a dropped dependent. If its old definition no longer fits, the one of its model is tried,
  which `prefs apply` stores in `deployments`: so the dependent is not missing until its own turn, and a `select *`
  follows its relation. If neither fits, the change is refused and rolled back, unless this run will recreate the
  dependent from a changed definition anyway.
#}
{% macro remake_statement(relation, row) -%}
  {%- set coming = run_query(
    "select definition from " ~ target.schema ~ ".deployments where relation = 'pending:" ~ row["identifier"] ~ "'"
  ).rows -%}
  {%- set here = namespace(selected=false, changed=false, definition=row["definition"]) -%}
  {%- for node in graph.nodes.values() if node.resource_type == "model" and node.alias == row["identifier"] -%}
    {%- set here.selected = node.unique_id in selected_resources -%}
    {%- set here.changed = here.selected and run_query(
      "select 1 from " ~ target.schema ~ ".deployments where relation = '" ~ node.alias ~ "' and source_checksum = '" ~ node.checksum.checksum ~ "'"
    ).rows | length == 0 -%}
    {#- A sink's view was stored with its earlier columns, and needs the current ones. #}
    {%- if node.config.materialized == "sink" and model.unique_id in node.depends_on.nodes -%}
      {%- set here.definition = dynamodb_sink(relation) -%}
    {%- endif -%}
  {%- endfor -%}
  {%- set otherwise = "
    if " ~ here.selected ~ " and (" ~ here.changed ~ " or (sqlstate = '42P01' and current_setting('prefs.waiting', true) <> '')) then
      perform set_config('prefs.waiting', 'yes', true);
      " ~ ("drop table " ~ row["name"] ~ " cascade;" if row["kind"] == "kept view" else "") ~ "
    else
      raise exception 'the changed " ~ relation.identifier ~ " breaks " ~ row["identifier"] ~ ", which stands on it: %. Nothing was changed: change " ~ row["identifier"] ~ " too and run both', sqlerrm;
    end if;" -%}
  {%- if coming -%}
    {%- set otherwise = "
    begin
      " ~ remake(row, coming[0][0], ["" if here.changed else row["indexes"], row["grants"]]) ~ "
    exception when others then" ~ otherwise ~ "
    end;" -%}
  {%- endif -%}
  {{ return("do $prefs_remake$
    begin
      " ~ remake(row, here.definition, [row["indexes"], row["comments"], row["grants"]]) ~ "
    exception when others then" ~ otherwise ~ "
    end
  $prefs_remake$") }}
{%- endmacro %}

{#
  Drop a view with all its dependents, but for the rows of kept ones, and return the statements that recreate them. The
  most distant dependent is dropped first: readers lock in that order too, and the opposite order would deadlock.
#}
{% macro drop_and_remember(relation, rows) -%}
  {%- set again = [] -%}
  {%- for row in rows -%}
    {%- if row["depth"] == 0 -%}
      {%- if row["grants"] -%}{%- do again.append(row["grants"]) -%}{%- endif -%}
    {%- else -%}
      {%- do again.append(remake_statement(relation, row)) -%}
    {%- endif -%}
  {%- endfor -%}
  {%- for row in rows | reverse -%}
    {%- if row["depth"] > 0 and row["kind"] == "kept view" -%}
      {% do run_query("drop view " ~ row["query"] ~ " cascade") %}
    {%- else -%}
      {% do run_query(drop_statement(row["kind"], row["name"], row["query"])) %}
    {%- endif -%}
  {%- endfor -%}
  {{ return(again) }}
{%- endmacro %}

{# PostgreSQL accepts any columns in a view, so the contract is checked against the catalog: by `table`, if the relation's is another yet. #}
{% macro check_contract(relation, table=none) -%}
  {%- if config.get("contract") and config.get("contract").enforced -%}
    {%- set there = [] -%}
    {%- for row in run_query(
      "select attname, format_type(atttypid, atttypmod) from pg_attribute where attrelid = '" ~ (table or relation)
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

{# The descriptions of the YAML as comments, in one statement. #}
{% macro describe(relation) -%}
  {% call statement("describe") %}
    comment on {{ relation.type | replace("_", " ") }} {{ relation }} is '{{ model.description | trim | replace("'", "''") }}';
    {%- for column in model.columns.values() if column.description %}
    comment on column {{ relation }}.{{ adapter.quote(column.name) }} is '{{ column.description | replace("'", "''") }}';
    {%- endfor %}
  {% endcall %}
{%- endmacro %}

{#
  Put a view in the place of an old one with its dependents (rows of `dependents_of`), which are recreated. A kept view
  gets the table `built`, if it is given.
#}
{% macro swap_in(relation, kind, built, dependents) -%}
  {%- set again = drop_and_remember(relation, dependents) -%}
  {% call statement("main") %}
    {%- if built %}
    create view {{ query_of(relation) }} as {{ sql }};
    alter table {{ built }} rename to {{ adapter.quote(relation.identifier) }}
    {%- else %}
    {{ create_statement(kind, relation, query_of(relation), sql) }}
    {%- endif %}
  {% endcall %}
  {% do check_contract(relation) %}
  {%- for statement in again -%}{% do run_query(statement) %}{%- endfor -%}
{%- endmacro %}

{#
  Create or replace a view; its dependents are recreated in the same transaction. The rows of a kept view are computed
  next to the old view, which serves readers until it is dropped, or are those of its build (`build_beside`). Returns
  the names of the kept dependents, nearest first, whose rows are still to be compared (`rebuild_marked`).
#}
{% macro put_view(relation, kind, state, build=none) -%}
  {%- set prefs = "select " ~ target.schema ~ ".prefs_" -%}
  {%- set name = "('" ~ relation.identifier ~ "')" -%}
  {%- set built = build or (relation.incorporate(path={"identifier": relation.identifier ~ "__built"}) if state and kind == "kept view" else none) -%}
  {%- if state -%}
    {% do run_query(prefs ~ "drop_builds_on" ~ name) %}
  {%- endif -%}
  {%- if built -%}
    {#- Also where retention came while the view was built. #}
    {% do refuse_retained(relation) %}
  {%- endif -%}
  {%- if built and not build -%}
    {% do run_query(prefs ~ "drop_build" ~ name) %}
    {% do run_query("create table " ~ built ~ " as " ~ sql) %}
    {% do create_indexes(built) %}
  {%- endif -%}
  {%- set dependents = dependents_of(relation) if state else [] -%}
  {% do swap_in(relation, kind, built, dependents) %}
  {%- if kind == "kept view" and not built -%}
    {% do create_indexes(relation) %}
  {%- endif -%}
  {% do run_query(prefs ~ ("end_build" if build else "changed" if kind == "kept view" else "mark_readers") ~ name) %}
  {%- set kept = [] -%}
  {%- for row in dependents if row["depth"] > 0 and row["kind"] == "kept view" -%}
    {%- do kept.append(row["identifier"]) -%}
  {%- endfor -%}
  {{ return(kept) }}
{%- endmacro %}

{# A parsed relation that is built anew holds only the messages whose bytes the engine still has. #}
{% macro refuse_retained(relation) -%}
  {%- if run_query("select 1 from " ~ target.schema ~ ".raw_retained where relation = '" ~ relation.identifier ~ "'").rows | length -%}
    {{ exceptions.raise_compiler_error(
      relation.identifier ~ " has a changed definition, and messages that it was made from have left the engine by"
      ~ " retention. Nothing was changed: run `prefs rebuild " ~ relation.identifier ~ " --from-lake`, then this again"
    ) }}
  {%- endif -%}
{%- endmacro %}

{# Compare the rows of these kept views, nearest first, if a change marked them, each in a transaction of its own. #}
{% macro rebuild_marked(names) -%}
  {%- for name in names -%}
    {% do engine_lock(again=true) %}
    {% do run_query(
      "select " ~ target.schema ~ ".prefs_rebuild(relation) from " ~ target.schema ~ ".live_pending where relation = '" ~ name ~ "'"
    ) %}
    {% do adapter.commit() %}
  {%- endfor -%}
{%- endmacro %}

{#
  A materialized view of the embedded engine is a table and the view of its query (kept.sql), because PostgreSQL can
  only compute its own materialized views from scratch. A run of its model compares all rows with those of the query, or
  builds a changed view next to the old one (builds.sql); the follower compares the rows of the changed keys.
#}
{% materialization materialized_view, adapter='postgres' %}
  {%- set relation = this.incorporate(type="table") -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {% do lock_unbuilt(relation) %}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}
  {%- set state = deployed_state(relation) -%}
  {%- set readers = [] -%}
  {%- if state and state[0] not in ("k", "m", "v") -%}
    {{ exceptions.raise_compiler_error(relation.identifier ~ " exists and is a table: what it holds is never replaced; rename it first, or give the model another name") }}
  {%- elif state and state[0] == "k" and state[1] == definition_checksum() and not should_full_refresh() -%}
    {% do delete_read_arrivals() %}
    {% call statement("main") %}
      select {{ target.schema }}.prefs_rebuild('{{ relation.identifier }}')
    {% endcall %}
  {%- else -%}
    {%- set build = build_beside(relation) if state and state[0] == "k" else none -%}
    {% do delete_read_arrivals() %}
    {%- do readers.extend(put_view(relation, "kept view", state, build)) -%}
    {%- if not build -%}
      {% call statement("analyze") %}
        analyze {{ relation }}
      {% endcall %}
    {%- endif -%}
  {%- endif -%}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {% do rebuild_marked(readers) %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{# A plain view needs no refresh: it is created if it is missing or its definition changed. Returns what `put_view` does. #}
{% macro put_plain_view(relation) -%}
  {%- set state = deployed_state(relation) -%}
  {%- if state and state[0] == "v" and state[1] == definition_checksum() -%}
    {% do store_raw_result(name="main", message="SKIP", code="SKIP", rows_affected="-1") %}
  {%- else -%}
    {{ return(put_view(relation, "view", state)) }}
  {%- endif -%}
  {{ return([]) }}
{%- endmacro %}

{% materialization view, adapter='postgres' %}
  {%- set relation = this.incorporate(type="view") -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {% do engine_lock() %}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}
  {%- set readers = put_plain_view(relation) -%}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {% do rebuild_marked(readers) %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{# The relations of the publisher: a view of the items, and the table of published items. #}
{% materialization sink, adapter='postgres' %}
  {%- set relation = this.incorporate(type="view") -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {% do engine_lock() %}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}
  {% do run_query(
    "create table if not exists " ~ target.schema ~ ".online_published (table_id text, domain_key text, entity_key text, fingerprint text not null, primary key (table_id, domain_key, entity_key))"
  ) %}
  {% do put_plain_view(relation) %}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{# A table of arrived messages: created once, never replaced, whatever flags a run has. #}
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
  {% do note_arrivals(relation) %}
  {% do note_changes(relation) %}
  {% do check_contract(relation) %}
  {% do describe(relation) %}
  {{ run_hooks(post_hooks, inside_transaction=True) }}
  {% do adapter.commit() %}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{% materialization sink, adapter='risingwave' %}
  {{ return(made_once("sink")) }}
{% endmaterialization %}

{# Whole statements, like sinks: the retention of changes is part of the compared and recorded definition. #}
{% materialization subscription, adapter='risingwave' %}
  {{ return(made_once("subscription")) }}
{% endmaterialization %}

{# Objects that RisingWave can neither replace nor alter: created if missing, recreated only on a full refresh. #}
{% macro made_once(kind) -%}
  {%- set relation = this.incorporate(type=kind) -%}
  {%- set there = risingwave__get_relation_without_caching(relation) -%}
  {{ run_hooks(pre_hooks) }}
  {%- if there and there.type != kind -%}
    {{ exceptions.raise_compiler_error(relation.identifier ~ " exists and is a " ~ there.type ~ ", not a " ~ kind ~ ": drop it first, or keep PREFS_PUBLISH as it was when it was made") }}
  {%- endif -%}
  {%- if there and should_full_refresh() -%}
    {% do run_query("drop " ~ kind ~ " " ~ relation) %}
    {%- set there = none -%}
  {%- endif -%}
  {%- if there -%}
    {% do store_raw_result(name="main", message="SKIP", code="skip", rows_affected="-1") %}
  {%- else -%}
    {%- if "connector = 'dynamodb'" in sql -%}
      {% do require_feature("DynamoDbSink", "a DynamoDB sink", "set PREFS_PUBLISH=changefeed, which needs no licence") %}
    {%- endif -%}
    {% do run_query(with_credentials(sql)) %}
    {% do store_raw_result(name="main", message="CREATE_" ~ kind | upper, code="CREATE_" ~ kind | upper, rows_affected="-1") %}
  {%- endif -%}
  {{ run_hooks(post_hooks) }}
  {{ return({"relations": [relation]}) }}
{%- endmacro %}
