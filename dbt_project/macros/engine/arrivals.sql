{#
  The arrivals in the raw tables of the embedded engine that were not read yet. They need neither a clock nor a
  sequence, which writers may take in one order and commit in another.

  Every INSERT adds one row for each partition that it wrote to, in its own transaction. Its messages become visible
  together, so they have been read if and only if the first of them is in the parsed relation, regardless of which
  process refreshed that. A row is deleted when the typed relation is refreshed with its messages visible, or when its
  messages were deleted.
#}
{% macro arrivals_ddl() -%}
  create table if not exists {{ target.schema }}.raw_arrivals (
    relation text,
    source text,
    source_partition int,
    first_offset bigint,
    last_offset bigint,
    messages bigint,
    arrived_at timestamptz,
    primary key (relation, source, source_partition, first_offset)
  );
  create or replace function {{ target.schema }}.prefs_note_arrival() returns trigger
    language plpgsql security definer set search_path = pg_catalog as $$
      begin
        {{ insert_arrivals("tg_table_name::text", "arrived") }};
        perform pg_notify('prefs_live', tg_table_schema);
        return null;
      end
    $$
{%- endmacro %}

{# The messages of a relation as arrivals. An existing key belongs to a message that was deleted since. #}
{% macro insert_arrivals(name, relation) -%}
  insert into {{ target.schema }}.raw_arrivals
  select {{ name }}, source, source_partition, min(source_offset), max(source_offset), count(*), min(arrived_at)
  from {{ relation }}
  group by source, source_partition
  on conflict (relation, source, source_partition, first_offset) do update
    set last_offset = excluded.last_offset, messages = excluded.messages, arrived_at = excluded.arrived_at
{%- endmacro %}

{#
  Note the arrivals in a raw table; done at every run, so that a table that was deployed without the trigger gets it
  too.
#}
{% macro note_arrivals(relation) -%}
  {%- if config.get("meta", {}).get("arrivals") -%}
    {% do run_query(arrivals_ddl()) %}
    {%- if run_query(
      "select 1 from pg_trigger where tgname = 'prefs_note_arrival' and tgrelid = '" ~ relation ~ "'::regclass"
    ).rows | length == 0 -%}
      {% do run_query(
        "create trigger prefs_note_arrival after insert on " ~ relation ~ " referencing new table as arrived"
        ~ " for each statement execute function " ~ target.schema ~ ".prefs_note_arrival()"
      ) %}
      {%- set parsed = parsed_of(relation.identifier) -%}
      {%- if is_there(parsed) -%}
        {%- set unread = "(select raw.* from " ~ relation ~ " as raw left join " ~ parsed
          ~ " as parsed using (source, source_partition, source_offset) where parsed.source is null) as arrived" -%}
        {% do run_query(insert_arrivals("'" ~ relation.identifier ~ "'", unread)) %}
      {%- endif -%}
    {%- endif -%}
  {%- endif -%}
{%- endmacro %}

{#
  Delete the arrivals whose messages the typed relation is about to read; called before that, in the same transaction. A
  shadow relation, which `prefs apply` builds, deletes none of the live relation's arrivals.
#}
{% macro delete_read_arrivals() -%}
  {%- set arrivals = this.incorporate(path={"identifier": "raw_arrivals"}, type="table") -%}
  {%- set parsed = parsed_of("raw_" ~ model.name) -%}
  {%- if model.unique_id ~ "_parsed" in model.depends_on.nodes and this.identifier == model.name
    and is_there(arrivals) and is_there(parsed) -%}
    {%- set raw = this.incorporate(path={"identifier": "raw_" ~ model.name}, type="table") -%}
    {% do run_query(
      "delete from " ~ arrivals ~ " as arrival where relation = '" ~ raw.identifier ~ "' and ("
      ~ "exists (select from " ~ parsed ~ " as parsed where parsed.source = arrival.source"
      ~ " and parsed.source_partition = arrival.source_partition and parsed.source_offset = arrival.first_offset)"
      ~ " or not exists (select from " ~ raw ~ " as raw left join " ~ parsed ~ " as parsed"
      ~ " using (source, source_partition, source_offset) where raw.source = arrival.source"
      ~ " and raw.source_partition = arrival.source_partition"
      ~ " and raw.source_offset between arrival.first_offset and arrival.last_offset and parsed.source is null))"
    ) %}
  {%- endif -%}
{%- endmacro %}

{% macro is_there(relation) -%}
  {{ return(run_query("select 1 where to_regclass('" ~ relation ~ "') is not null").rows | length > 0) }}
{%- endmacro %}

{# The relation that reads a raw table. #}
{% macro parsed_of(raw) -%}
  {{ return(this.incorporate(path={"identifier": raw[4:] ~ "_parsed"}, type="materialized_view")) }}
{%- endmacro %}
