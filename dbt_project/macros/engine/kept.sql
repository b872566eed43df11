{#
  Kept views: the embedded engine's form of RisingWave's materialized views. `name` is a table, and `name__query` the
  view that defines its rows. A process that changes a relation marks its readers as pending: the follower
  (dagster_prefs/live) then rebuilds those that were not updated meanwhile.
#}
{% macro query_suffix() -%}
  {{ return("__query") }}
{%- endmacro %}

{# The view of a kept view's query. #}
{% macro query_of(relation) -%}
  {%- set name = relation.identifier ~ query_suffix() -%}
  {%- if name | length > 63 -%}
    {{ exceptions.raise_compiler_error(
      relation.identifier ~ " has " ~ relation.identifier | length ~ " characters, and the embedded engine has names of 63 with "
      ~ query_suffix() ~ " behind a view's: give it one of at most " ~ 63 - query_suffix() | length
    ) }}
  {%- endif -%}
  {{ return(relation.incorporate(path={"identifier": name}, type="view")) }}
{%- endmacro %}

{# The joins from the rows of `readers` to the views that read them, and to the kept view of each, if it is one's query. #}
{% macro joined_readers() -%}
  join pg_depend as depend on depend.refobjid = readers.oid and depend.refclassid = 'pg_class'::regclass
    and depend.classid = 'pg_rewrite'::regclass
  join pg_rewrite as rule on rule.oid = depend.objid and rule.ev_class <> readers.oid
  join pg_class as reader on reader.oid = rule.ev_class
  left join pg_class as kept on kept.relnamespace = reader.relnamespace and kept.relkind = 'r'
    and reader.relname = kept.relname || '{{ query_suffix() }}'
{%- endmacro %}

{% macro postgres__prepare_kept_views() -%}
  {% call statement("prepare_kept_views", auto_begin=false) %}
    begin;
    select pg_advisory_xact_lock(hashtext('dagster-prefs'), hashtext('{{ target.schema }}'));
    {{ kept_views_ddl() }};
    {{ builds_ddl() }};
    select {{ target.schema }}.prefs_drop_dead_builds();
    commit;
  {% endcall %}
{%- endmacro %}

{% macro risingwave__prepare_kept_views() -%}
{%- endmacro %}

{#
  `prefs_readers(relation)`: the kept views and sinks that read a relation, directly or through plain views.

  `prefs_columns(relation)`: its columns and their types, in order.

  `prefs_mark_readers(relation)`: mark its readers as pending, and the builds among them as `whole` (builds.sql).

  `prefs_changed(relation)`: mark its readers as pending, and itself as not pending, because it changed as a whole.

  `prefs_rebuild(relation)`: write the difference between a kept view and its query, and return the number of rows.

  `prefs_write_difference(kept, query)`: write the difference to a view that already has rows.

  `raw_retained`: the parsed relations of which messages from before an arrival may have left the raw table by retention
  (dagster_prefs/events/retention.py). Their rows from before it stay, as on RisingWave.
#}
{% macro kept_views_ddl() -%}
  create table if not exists {{ target.schema }}.live_pending (
    relation text primary key,
    since timestamptz not null default clock_timestamp()
  );
  create table if not exists {{ target.schema }}.live_views (
    relation text primary key, as_of timestamptz not null, latest timestamptz not null
  );
  create table if not exists {{ target.schema }}.raw_retained (
    relation text primary key, before timestamptz not null
  );
  create table if not exists {{ target.schema }}.live_due (
    relation text, key text[], primary key (relation, key)
  );
  create table if not exists {{ target.schema }}.live_changes (
    id bigint generated always as identity primary key, relation text not null, key jsonb not null
  );
  create table if not exists {{ target.schema }}.live_builds (
    relation text primary key,
    built text not null,
    definition text not null,
    builder int not null,
    builder_since timestamptz not null,
    filled boolean not null default false,
    whole boolean not null default false
  );
  create sequence if not exists {{ target.schema }}.live_steps;
  create table if not exists {{ target.schema }}.live_outbox (
    domain_key text, entity_key text, first_step bigint not null, step bigint not null, primary key (domain_key, entity_key)
  );
  create table if not exists {{ target.schema }}.live_follower (
    id int primary key default 1 check (id = 1),
    process text not null,
    seen_at timestamptz not null,
    step bigint not null default 0,
    problem text
  );
  create or replace function {{ target.schema }}.prefs_readers(changed regclass) returns table (relation text, kept boolean)
    language sql stable as $$
      with recursive readers as (
        select changed::oid as oid, false as kept, 0 as depth
        union
        select rule.ev_class, kept.oid is not null, readers.depth + 1
        from readers
        {{ joined_readers() }}
        where not readers.kept
      )
      select case when readers.kept then left(c.relname, -{{ query_suffix() | length }}) else c.relname end, readers.kept
      from readers
      join pg_class as c on c.oid = readers.oid
      left join {{ target.schema }}.deployments as deployed on deployed.relation = c.relname
      where readers.depth > 0 and c.relnamespace = '{{ target.schema }}'::regnamespace and (readers.kept or deployed.kind = 'sink')
    $$;
  create or replace function {{ target.schema }}.prefs_columns(relation regclass) returns text[]
    language sql stable as $$
      select array_agg(format('%I %s', attname, format_type(atttypid, atttypmod)) order by attnum)
      from pg_attribute
      where attrelid = relation and attnum > 0 and not attisdropped
    $$;
  create or replace function {{ target.schema }}.prefs_mark_readers(name text) returns void
    language sql as $$
      update {{ target.schema }}.live_builds set whole = true
      where built in (select relation from {{ target.schema }}.prefs_readers(format('%I.%I', '{{ target.schema }}', name)::regclass));
      insert into {{ target.schema }}.live_pending (relation)
      -- In one order, because two views that are rebuilt at once may have the same readers.
      select distinct readers.relation from {{ target.schema }}.prefs_readers(format('%I.%I', '{{ target.schema }}', name)::regclass) as readers
      where readers.relation not in (select built from {{ target.schema }}.live_builds)
      order by relation
      on conflict (relation) do update set since = clock_timestamp()
    $$;
  create or replace function {{ target.schema }}.prefs_changed(name text) returns void
    language sql as $$
      delete from {{ target.schema }}.live_pending where relation = name;
      insert into {{ target.schema }}.live_views (relation, as_of, latest) values (name, {{ clock() }}, {{ clock() }})
      on conflict (relation) do update set as_of = excluded.as_of, latest = excluded.latest;
      select {{ target.schema }}.prefs_mark_readers(name)
    $$;
  create or replace function {{ target.schema }}.prefs_rebuild(name text) returns bigint
    language plpgsql as $$
      declare
        kept text := format('%I.%I', '{{ target.schema }}', name);
        changed bigint;
        empty boolean;
      begin
        execute format('select not exists (select from %s)', kept) into empty;
        if empty then
          execute format('insert into %s select * from %I.%I', kept, '{{ target.schema }}', name || '{{ query_suffix() }}');
          get diagnostics changed = row_count;
        else
          changed := {{ target.schema }}.prefs_write_difference(kept, name || '{{ query_suffix() }}');
        end if;
        -- Steps are planned by statistics, and autovacuum comes a minute later.
        if changed > 1000 and changed > (select reltuples / 10 from pg_class where oid = kept::regclass) then
          execute format('analyze %s', kept);
        end if;
        if changed > 0 then
          perform {{ target.schema }}.prefs_changed(name);
        else
          delete from {{ target.schema }}.live_pending where relation = name;
          update {{ target.schema }}.live_views set as_of = {{ clock() }}, latest = {{ clock() }} where relation = name;
        end if;
        -- What steps have not stored for the view, they have not stored for its build.
        update {{ target.schema }}.live_builds set whole = true where relation = name;
        return changed;
      end
    $$;
  create or replace function {{ target.schema }}.prefs_write_difference(kept text, query text) returns bigint
    language plpgsql as $$
      declare
        keys text[];
        others text[];
        written bigint;
        changed bigint;
        retained text;
      begin
        select format(' and old.arrived_at >= %L', before) into retained
        from {{ target.schema }}.raw_retained
        where relation = left(query, -{{ query_suffix() | length }});
        select array_agg(format('%I', a.attname) order by key.place) into keys
        from (
          select indrelid, indkey from pg_index
          where indrelid = kept::regclass and indisunique and indexprs is null and indpred is null
          order by indexrelid limit 1
        ) as uniques
        cross join unnest(uniques.indkey::smallint[]) with ordinality as key (number, place)
        join pg_attribute as a on a.attrelid = uniques.indrelid and a.attnum = key.number;
        select array_agg(format('%I', attname)) into others
        from pg_attribute
        where attrelid = kept::regclass and attnum > 0 and not attisdropped and format('%I', attname) <> all (keys);
        drop table if exists pg_temp.prefs_rebuilt;
        execute format('create temporary table prefs_rebuilt on commit drop as select * from %I.%I', '{{ target.schema }}', query);
        analyze pg_temp.prefs_rebuilt;
        if keys is null then
          execute format(
            'with gone as (select * from %1$s except all select * from pg_temp.prefs_rebuilt),'
            ' come as (select * from pg_temp.prefs_rebuilt except all select * from %1$s)'
            ' select (select count(*) from gone) + (select count(*) from come)', kept
          ) into changed;
          if changed > 0 then
            execute format('delete from %s', kept);
            execute format('insert into %s select * from pg_temp.prefs_rebuilt', kept);
          end if;
        else
          execute format(
            'delete from %s as old where not exists (select from pg_temp.prefs_rebuilt as new where %s)%s', kept,
            (select string_agg(format('new.%1$s = old.%1$s', key), ' and ') from unnest(keys) as key),
            coalesce(retained, '')
          );
          get diagnostics changed = row_count;
          execute format(
            'insert into %1$s select new.* from pg_temp.prefs_rebuilt as new left join %1$s as old on %2$s'
            ' where old.ctid is null or new is distinct from old on conflict (%3$s) do %4$s', kept,
            (select string_agg(format('new.%1$s = old.%1$s', key), ' and ') from unnest(keys) as key),
            array_to_string(keys, ', '),
            coalesce('update set ' || (select string_agg(format('%1$s = excluded.%1$s', other), ', ') from unnest(others) as other), 'nothing')
          );
          get diagnostics written = row_count;
          changed := changed + written;
        end if;
        drop table pg_temp.prefs_rebuilt;
        return changed;
      end
    $$
{%- endmacro %}

{#
  Note every later change of a table's rows in the writer's own transaction, and wake the follower. For a raw table,
  only changes in place are noted: new rows are noted as arrivals.
#}
{% macro note_changes(relation) -%}
  {%- set raw = config.get("meta", {}).get("arrivals") -%}
  {%- if raw or is_read_by_views() -%}
    {% do run_query(note_changes_ddl()) %}
    {%- for event, rows in {"insert": "new", "update": "new", "delete": "old"}.items() if not (raw and event == "insert") -%}
      {%- if run_query(
        "select 1 from pg_trigger where tgname = 'prefs_note_" ~ event ~ "' and tgrelid = '" ~ relation ~ "'::regclass"
      ).rows | length == 0 -%}
        {% do run_query(
          "create trigger prefs_note_" ~ event ~ " after " ~ event ~ " on " ~ relation ~ " referencing " ~ rows ~ " table as changed"
          ~ " for each statement execute function " ~ target.schema ~ ".prefs_note_" ~ ("message" if raw else "row") ~ "()"
        ) %}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro %}

{% macro note_changes_ddl() -%}
  {%- for name, row in {
    "message": "jsonb_build_object('source', source, 'source_partition', source_partition, 'source_offset', source_offset)",
    "row": "to_jsonb(changed)",
  }.items() %}
  create or replace function {{ target.schema }}.prefs_note_{{ name }}() returns trigger
    language plpgsql security definer set search_path = pg_catalog as $$
      begin
        insert into {{ target.schema }}.live_changes (relation, key) select tg_table_name, {{ row }} from changed;
        perform pg_notify('prefs_live', tg_table_schema);
        return null;
      end
    $$;
  {%- endfor %}
{%- endmacro %}

{# Whether a kept view reads the current model. #}
{% macro is_read_by_views() -%}
  {%- for node in graph.nodes.values() if node.resource_type == "model" and model.unique_id in node.depends_on.nodes and node.config.materialized == "materialized_view" -%}
    {{ return(true) }}
  {%- endfor -%}
  {{ return(false) }}
{%- endmacro %}
