{#
  A changed kept view is built while readers and the follower go on with the old one. Its build is a kept view of its own
  (`built` and `built__query`) that nobody reads and that `live_builds` records:

  1. `prefs_begin_build`, under the engine's lock: from its commit on, steps store the keys that they touch for it.
  2. `prefs_fill_build`, without the lock: its rows, from one snapshot, which is later than 1.
  3. The follower computes the stored keys again and keeps the build current (`prefs_await_build`).
  4. `prefs_catch_up_build` and `prefs_end_build`, under the lock, in the transaction in which its table becomes the view's.

  Computing a key again is right whatever the snapshot already held. What is not kept by keys cannot be caught up in this
  way: views kept by merging, views that are rebuilt, and inputs that are read or changed as a whole. Such a build has
  `whole` set when something changed, and step 4 compares all its rows with those of its query under the lock.

  A build whose session has ended is dropped by the next run of dbt, by `prefs apply`, and by the follower.
#}

{# Whether the session that has a build goes on. PostgreSQL shows the start of others' sessions to few roles. #}
{% macro builder_lives(build) -%}
  exists (
    select from pg_stat_activity as session
    where session.pid = {{ build }}.builder and coalesce(session.backend_start = {{ build }}.builder_since, true)
  )
{%- endmacro %}

{#
  `prefs_begin_build(name, definition)`: begin the build of a view, and return the name of its empty table, whose unique
  index the same transaction has to create. An earlier build of the view is dropped.

  `prefs_fill_build(name)`: compute its rows, and create the indexes that the old view has and no model declares. If that
  fails, the build is dropped and the error's message returned.

  `prefs_await_build(name, seconds)`: wait until the follower, if there is one, has caught up.

  `prefs_catch_up_build(name, at_once)`: `ready` if the build has the rows of its query now, `behind` if the follower has
  still to compute keys, `lost` if the build was dropped meanwhile. `at_once`: compare all rows instead of `behind`.

  `prefs_end_build(name)`: the view has the table of its build now.

  `prefs_drop_build(name)`, `prefs_drop_builds_on(name)`, `prefs_drop_dead_builds()`: drop the build of a view, those
  that read a relation directly or through other views, and those whose session has ended.

  `prefs_await_other_build(name)`: wait while another session builds the view.
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
        return building;
      end
    $$;
  create or replace function {{ schema }}.prefs_fill_build(name text) returns text
    language plpgsql as $$
      declare
        building text;
        place text;
        missing record;
      begin
        select built, format('{{ schema }}.%I', built) into building, place
        from {{ schema }}.live_builds where relation = name and builder = pg_backend_pid();
        if building is null then
          return null;
        end if;
        begin
          execute format('insert into %s select * from {{ schema }}.%I', place, building || '{{ query_suffix() }}');
          for missing in
            select c.relname as index, definition
            from pg_index as i
            join pg_class as c on c.oid = i.indexrelid
            cross join substring(pg_get_indexdef(c.oid) from ' USING .*') as definition
            where i.indrelid = format('{{ schema }}.%I', name)::regclass and not i.indisunique and length(c.relname) <= 56
              -- dbt gives a model's own indexes such names.
              and c.relname !~ '^[0-9a-f]{32}$'
          loop
            begin
              execute format('create index %I on %s%s', missing.index || '__built', place, missing.definition);
            exception when undefined_column or undefined_function or datatype_mismatch or undefined_object then
              -- The changed view has other columns.
              null;
            end;
          end loop;
          execute format('analyze %s', place);
        exception when others then
          perform {{ schema }}.prefs_drop_build(name);
          return sqlerrm;
        end;
        insert into {{ schema }}.live_views (relation, as_of, latest) values (building, {{ clock() }}, {{ clock() }})
        on conflict (relation) do update set as_of = excluded.as_of, latest = excluded.latest;
        update {{ schema }}.live_builds set filled = true where relation = name;
        perform pg_notify('prefs_live', '{{ schema }}');
        return null;
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
            where build.relation = name and not build.whole
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
  create or replace function {{ schema }}.prefs_catch_up_build(name text, at_once boolean) returns text
    language plpgsql as $$
      declare
        build record;
        behind boolean;
      begin
        select * into build from {{ schema }}.live_builds where relation = name and filled and builder = pg_backend_pid();
        if not found then
          return 'lost';
        end if;
        behind := exists (select from {{ schema }}.live_due where relation = build.built);
        -- A view that waits to be rebuilt may lack what no step has stored.
        if build.whole or (behind and at_once) or exists (select from {{ schema }}.live_pending where relation = name) then
          perform {{ schema }}.prefs_write_difference(format('{{ schema }}.%I', build.built), build.built || '{{ query_suffix() }}');
          delete from {{ schema }}.live_due where relation = build.built;
          update {{ schema }}.live_views set as_of = {{ clock() }}, latest = {{ clock() }} where relation = build.built;
        elsif behind then
          return 'behind';
        end if;
        return 'ready';
      end
    $$;
  create or replace function {{ schema }}.prefs_end_build(name text) returns void
    language plpgsql as $$
      declare
        building text;
        index text;
      begin
        select built into strict building from {{ schema }}.live_builds where relation = name;
        perform {{ schema }}.prefs_changed(name);
        update {{ schema }}.live_views as kept set as_of = filled.as_of, latest = filled.latest
        from {{ schema }}.live_views as filled
        where kept.relation = name and filled.relation = building;
        -- The keys of the old rows.
        delete from {{ schema }}.live_due where relation = name;
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
        {{ joined_readers() }}
      )
      select {{ schema }}.prefs_drop_build(build.relation)
      from {{ schema }}.live_builds as build
      join readers on readers.oid = to_regclass(format('{{ schema }}.%I', build.built))
    $$;
  create or replace function {{ schema }}.prefs_drop_dead_builds() returns void
    language sql as $$
      select {{ schema }}.prefs_drop_build(build.relation) from {{ schema }}.live_builds as build where not {{ builder_lives("build") }}
    $$;
  create or replace function {{ schema }}.prefs_await_other_build(name text) returns void
    language plpgsql as $$
      begin
        while exists (
          select from {{ schema }}.live_builds as build
          where build.relation = name and build.builder <> pg_backend_pid() and {{ builder_lives("build") }}
        ) loop
          -- The activity that a transaction sees is otherwise that of its first look.
          perform pg_stat_clear_snapshot(), pg_sleep(0.1);
        end loop;
      end
    $$
{%- endmacro %}

{#
  Take the engine's lock for a view that nobody builds. Whoever does is waited for without the lock, which the follower
  needs.
#}
{% macro lock_unbuilt(relation) -%}
  {%- set name = text_literal(relation.identifier) -%}
  {%- set other = namespace(builds=true) -%}
  {% do engine_lock() %}
  {#- Another run may begin a build between the end of one and the lock. #}
  {%- for _ in range(1000) -%}
    {%- if other.builds -%}
      {%- set other.builds = run_query(
        "select 1 from " ~ target.schema ~ ".live_builds as build where relation = " ~ name ~ " and " ~ builder_lives("build")
      ).rows | length > 0 -%}
    {%- endif -%}
    {%- if other.builds -%}
      {% do adapter.commit() %}
      {% do begin_again() %}
      {% do run_query("select " ~ target.schema ~ ".prefs_await_other_build(" ~ name ~ ")") %}
      {% do adapter.commit() %}
      {% do engine_lock(again=true) %}
    {%- endif -%}
  {%- endfor -%}
{%- endmacro %}

{#
  Build a kept view next to the old one, without the engine's lock meanwhile; the lock is held again at the end. Returns
  the table, or none if another run dropped it: the view is then built under the lock.

  What the catalog refuses (the contract, a view that the change breaks) is refused before the first commit, so that it
  leaves nothing.
#}
{% macro build_beside(relation) -%}
  {% do refuse_retained(relation) %}
  {%- set name = text_literal(relation.identifier) -%}
  {%- set prefs = "select " ~ target.schema ~ ".prefs_" -%}
  {%- set begun = run_query(prefs ~ "begin_build(" ~ name ~ ", " ~ text_literal(portable_definition()) ~ ")").rows[0][0] -%}
  {%- set built = relation.incorporate(path={"identifier": begun}) -%}
  {% do create_indexes(built) %}
  {% do check_contract(relation, built) %}
  {% do run_query("savepoint prefs_rehearsal") %}
  {% do run_query(prefs ~ "drop_builds_on(" ~ name ~ ")") %}
  {% do swap_in(relation, "kept view", built, dependents_of(relation)) %}
  {% do run_query("rollback to savepoint prefs_rehearsal") %}
  {% do adapter.commit() %}

  {% do begin_again() %}
  {#- If this process is killed, its session would otherwise go on to the end of the statement. #}
  {% do run_query("set local client_connection_check_interval = '500ms'") %}
  {%- set refused = run_query(prefs ~ "fill_build(" ~ name ~ ")").rows[0][0] -%}
  {% do adapter.commit() %}
  {%- if refused is not none -%}
    {{ exceptions.raise_compiler_error(refused) }}
  {%- endif -%}

  {%- set found = namespace(state="behind") -%}
  {%- for at_once in ["false", "false", "true"] -%}
    {%- if found.state == "behind" -%}
      {% do begin_again() %}
      {% do run_query("set local client_connection_check_interval = '500ms'") %}
      {% do run_query(prefs ~ "await_build(" ~ name ~ ", 60)") %}
      {% do adapter.commit() %}
      {% do engine_lock(again=true) %}
      {%- set found.state = run_query(prefs ~ "catch_up_build(" ~ name ~ ", " ~ at_once ~ ")").rows[0][0] -%}
      {%- if found.state == "behind" -%}{% do adapter.commit() %}{%- endif -%}
    {%- endif -%}
  {%- endfor -%}
  {{ return(built if found.state == "ready" else none) }}
{%- endmacro %}
