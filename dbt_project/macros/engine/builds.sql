{#
  A changed kept view is built while its old rows are read and kept current. Its build is a kept view of its own
  (`built` and `built__query`), which nobody reads and which `live_builds` records:

  1. `prefs_begin_build`, under the engine's lock: from then on, steps store the keys that they touch for it in `live_due`.
  2. `prefs_fill_build`, without the lock: its rows, from one snapshot that is later than 1.
  3. The follower catches up on the stored keys and keeps it current (`prefs_await_build`).
  4. `prefs_end_build`, under the lock, in the transaction in which its table becomes the view's.

  A build whose session has ended is dropped by the follower and by the next run of dbt.
#}

{# The session that has a build, which tells whether it goes on. #}
{% macro builder_of(build) -%}
  exists (
    select from pg_stat_activity as session
    -- PostgreSQL shows the start of others' sessions to few roles.
    where session.pid = {{ build }}.builder and coalesce(session.backend_start = {{ build }}.builder_since, true)
  )
{%- endmacro %}

{#
  `prefs_begin_build(name, definition)`: begin the build of a view, and return the name of its empty table, whose unique
  index the same transaction has to create. An earlier build of the view is dropped.

  `prefs_fill_build(name)`: compute its rows, and create the indexes that the old view has and no model declares.

  `prefs_await_build(name, seconds)`: wait until the follower, if there is one, has caught up.

  `prefs_is_built(name)`: whether this session's build of the view is filled and was not dropped meanwhile.

  `prefs_end_build(name)`: the view has the rows of its build now. What steps have still to do for the build is to do
  for the view.

  `prefs_drop_build(name)`, `prefs_drop_builds_on(name)`, `prefs_drop_dead_builds()`: drop the build of a view, those
  that read a relation directly or through other views, and those whose session has ended.
#}
{% macro builds_ddl() -%}
  {%- set schema = target.schema -%}
  create or replace function {{ schema }}.prefs_begin_build(name text, definition text) returns text
    language plpgsql as $$
      declare
        -- A name of PostgreSQL has at most 63 bytes.
        building text := case when length(name || '__built{{ query_suffix() }}') > 63 then md5(name) else name end || '__built';
      begin
        perform {{ schema }}.prefs_drop_build(name);
        execute format('create view {{ schema }}.%I as %s', building || '{{ query_suffix() }}', definition);
        execute format(
          'create table {{ schema }}.%I as select * from {{ schema }}.%I with no data', building, building || '{{ query_suffix() }}'
        );
        insert into {{ schema }}.live_builds (relation, built, definition, builder, builder_since)
        select name, building, definition, pid, backend_start from pg_stat_activity where pid = pg_backend_pid();
        insert into {{ schema }}.live_views (relation, as_of, latest) values (building, {{ clock() }}, {{ clock() }});
        return building;
      end
    $$;
  create or replace function {{ schema }}.prefs_fill_build(name text) returns void
    language plpgsql as $$
      declare
        build record;
        missing record;
      begin
        select built, format('{{ schema }}.%I', built) as place into strict build
        from {{ schema }}.live_builds where relation = name;
        execute format('insert into %s select * from {{ schema }}.%I', build.place, build.built || '{{ query_suffix() }}');
        update {{ schema }}.live_views set latest = {{ clock() }} where relation = build.built;
        for missing in
          select c.relname as index, definition
          from pg_index as i
          join pg_class as c on c.oid = i.indexrelid
          cross join substring(pg_get_indexdef(c.oid) from ' USING .*') as definition
          where i.indrelid = format('{{ schema }}.%I', name)::regclass and not i.indisunique and length(c.relname) <= 56
            and definition not in (
              select substring(pg_get_indexdef(indexrelid) from ' USING .*') from pg_index where indrelid = build.place::regclass
            )
        loop
          begin
            execute format('create index %I on %s%s', missing.index || '__built', build.place, missing.definition);
          exception when undefined_column or undefined_function or datatype_mismatch or undefined_object then
            -- The changed view has other columns.
            null;
          end;
        end loop;
        execute format('analyze %s', build.place);
        update {{ schema }}.live_builds set filled = true where relation = name;
        perform pg_notify('prefs_live', '');
      end
    $$;
  create or replace function {{ schema }}.prefs_await_build(name text, seconds double precision) returns void
    language plpgsql as $$
      declare
        until timestamptz := clock_timestamp() + seconds * interval '1 second';
      begin
        while clock_timestamp() < until
          and exists (
            select from {{ schema }}.live_due as due join {{ schema }}.live_builds as build on build.built = due.relation
            where build.relation = name
          )
          and exists (
            select from pg_locks
            where locktype = 'advisory' and granted and objsubid = 1
              and database = (select oid from pg_database where datname = current_database())
              and (classid::bigint << 32) | objid::bigint = hashtextextended('dagster-prefs follow {{ schema }}', 0)
          )
        loop
          perform pg_sleep(0.02);
        end loop;
      end
    $$;
  create or replace function {{ schema }}.prefs_is_built(name text) returns boolean
    language sql stable as $$
      select exists (
        select from {{ schema }}.live_builds as build
        where build.relation = name and build.filled and build.builder = pg_backend_pid()
      )
    $$;
  create or replace function {{ schema }}.prefs_end_build(name text) returns void
    language plpgsql as $$
      declare
        build record;
        index text;
      begin
        select * into strict build from {{ schema }}.live_builds where relation = name;
        delete from {{ schema }}.live_due where relation = name;
        update {{ schema }}.live_due set relation = name where relation = build.built;
        perform {{ schema }}.prefs_changed(name);
        update {{ schema }}.live_views as kept set as_of = filled.as_of, latest = filled.latest
        from {{ schema }}.live_views as filled
        where kept.relation = name and filled.relation = build.built;
        if build.whole then
          insert into {{ schema }}.live_pending (relation) values (name) on conflict (relation) do nothing;
        end if;
        for index in
          select c.relname from pg_index as i join pg_class as c on c.oid = i.indexrelid
          where i.indrelid = format('{{ schema }}.%I', name)::regclass and c.relname like '%\_\_built'
        loop
          execute format('alter index {{ schema }}.%I rename to %I', index, left(index, -length('__built')));
        end loop;
        perform {{ schema }}.prefs_drop_build(name);
      end
    $$;
  create or replace function {{ schema }}.prefs_drop_build(name text) returns void
    language plpgsql as $$
      declare
        building text;
      begin
        select built into building from {{ schema }}.live_builds where relation = name;
        if building is not null then
          -- First, because it waits for a session that fills the table and then writes to the rows below.
          execute format('drop view if exists {{ schema }}.%I', building || '{{ query_suffix() }}');
          execute format('drop table if exists {{ schema }}.%I', building);
          delete from {{ schema }}.live_due where relation = building;
          delete from {{ schema }}.live_pending where relation = building;
          delete from {{ schema }}.live_views where relation = building;
          delete from {{ schema }}.live_builds where relation = name;
        end if;
      end
    $$;
  create or replace function {{ schema }}.prefs_drop_builds_on(name text) returns void
    language sql as $$
      with recursive readers as (
        select format('{{ schema }}.%I', name)::regclass::oid as oid
        union
        select coalesce(kept.oid, rule.ev_class)
        from readers
        join pg_depend as depend on depend.refobjid = readers.oid and depend.refclassid = 'pg_class'::regclass
          and depend.classid = 'pg_rewrite'::regclass
        join pg_rewrite as rule on rule.oid = depend.objid and rule.ev_class <> readers.oid
        join pg_class as reader on reader.oid = rule.ev_class
        left join pg_class as kept on kept.relnamespace = reader.relnamespace and kept.relkind = 'r'
          and reader.relname = kept.relname || '{{ query_suffix() }}'
      )
      select {{ schema }}.prefs_drop_build(build.relation)
      from {{ schema }}.live_builds as build
      join readers on readers.oid = to_regclass(format('{{ schema }}.%I', build.built))
    $$;
  create or replace function {{ schema }}.prefs_drop_dead_builds() returns void
    language sql as $$
      select {{ schema }}.prefs_drop_build(build.relation) from {{ schema }}.live_builds as build where not {{ builder_of("build") }}
    $$
{%- endmacro %}

{#
  Build a kept view next to the old one, without the engine's lock meanwhile; the lock is held again at the end. Returns
  the table, or none if another run dropped it: the view is then built under the lock.
#}
{% macro build_beside(relation) -%}
  {% do refuse_retained(relation) %}
  {%- set name = "'" ~ relation.identifier ~ "'" -%}
  {%- set prefs = "select " ~ target.schema ~ ".prefs_" -%}
  {%- set begun = run_query(prefs ~ "begin_build(" ~ name ~ ", " ~ text_literal(portable_definition()) ~ ")").rows[0][0] -%}
  {%- set built = relation.incorporate(path={"identifier": begun}) -%}
  {% do create_indexes(built) %}
  {% do adapter.commit() %}
  {#- If this process is killed, its session would otherwise go on to the end of the statement. #}
  {% call statement("fill", auto_begin=true) %}
    set local client_connection_check_interval = '500ms'
  {% endcall %}
  {% do run_query(prefs ~ "fill_build(" ~ name ~ ")") %}
  {% do adapter.commit() %}
  {% call statement("await", auto_begin=true) %}
    {{ prefs }}await_build({{ name }}, 60)
  {% endcall %}
  {% do adapter.commit() %}
  {% do engine_lock() %}
  {{ return(built if run_query(prefs ~ "is_built(" ~ name ~ ")").rows[0][0] else none) }}
{%- endmacro %}
