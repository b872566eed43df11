{#
  Macros that read one message. Each takes the parsed JSON column `j` and returns NULL, never an error, for invalid
  input. The JSON type of a field is checked before the field is converted to text, because a list of 9,000 numbers like
  1e131071 is a gigabyte as text.
#}

{#
  The message fields that the current model's YAML declares, or that of the model in its `meta.fields_of`: name → type, and in `meta` `optional`, `max_bytes` (of a
  text), `scale` (decimals that are kept), `min` and `max`, `accepted` (values) or `accepted_from` (a variable whose
  names are the values), and `format: uuid`. Empty while the project is parsed, before YAML is read.
#}
{% macro declared_fields() -%}
  {%- set fields = {} -%}
  {%- if execute -%}
    {%- set of = config.get("meta", {}).get("fields_of") -%}
    {%- set declaring = graph.nodes["model." ~ model.package_name ~ "." ~ of] if of else model -%}
    {%- for column in declaring.columns.values() if column.name not in place_columns() + ["payload", "reason", "canary"] -%}
      {%- do fields.update({column.name: dict(column.config.meta, type=column.data_type | lower)}) -%}
    {%- endfor -%}
  {%- endif -%}
  {{ return(fields) }}
{%- endmacro %}

{# The position of a message in its source, in every raw and parsed relation. #}
{% macro place_columns() -%}
  {{ return(["source", "source_partition", "source_offset", "kafka_timestamp", "arrived_at"]) }}
{%- endmacro %}

{#
  A field as text, trimmed; NULL if it is absent, empty, or of a JSON type that the field cannot have. A number is
  written without exponent and redundant zeros, so that 12345.0 and 1.2345e4 are 12345; it is NULL if no field could
  hold it.
#}
{% macro text_field(name, type) -%}
  case jsonb_typeof(j -> '{{ name }}')
    when 'string' then nullif(btrim(j ->> '{{ name }}', E' \t\r\n'), '')
    when 'number' then {{ measuring_number(name) if type in ("decimal", "timestamptz") else identifying_number(name) }}
    {%- if type == "boolean" %}
    when 'boolean' then j ->> '{{ name }}'
    {%- endif %}
  end
{%- endmacro %}

{# Whether a field is present with any content. #}
{% macro field_given(name) -%}
  case coalesce(jsonb_typeof(j -> '{{ name }}'), 'null')
    when 'null' then false
    when 'string' then (j ->> '{{ name }}') <> ''
    else true
  end
{%- endmacro %}

{#
  A number, rounded to `scale` decimals; NULL beyond the 28 digits that both engines store exactly. For a number without
  exponent, no digit after the first 30 decimals can change the rounded value.
#}
{% macro decimal_of(text, scale) -%}
  {%- set bound = "1" ~ "0" * (28 - scale) -%}
  case
    when {{ text }} ~ '^-?[0-9]{1,28}([.][0-9]+)?$' then
      case when abs(left({{ text }}, 60)::numeric) < {{ bound }} then round(left({{ text }}, 60)::numeric, {{ scale }}) end
    when {{ text }} ~ '^-?[0-9]{1,28}([.][0-9]{1,255})?[eE][+-]?[0-9]{1,3}$' then
      case when abs({{ scientific_number(text) }}) < {{ bound }} then round({{ scientific_number(text) }}, {{ scale }}) end
  end
{%- endmacro %}

{# true or false, in any case, or 1 or 0. #}
{% macro boolean_of(text) -%}
  case lower({{ text }}) when 'true' then true when '1' then true when 'false' then false when '0' then false end
{%- endmacro %}

{# A UUID in lower case, as 8-4-4-4-12 hexadecimal digits. #}
{% macro uuid_of(text) -%}
  case when lower({{ text }}) ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' then lower({{ text }}) end
{%- endmacro %}

{# A whole number, also if written as 12.0; NULL outside the type's range. #}
{% macro integer_of(text, type) -%}
  {%- set bound = {"int": "2147483647", "bigint": "9223372036854775807"}[type] -%}
  case when {{ text }} ~ '^-?[0-9]{1,19}([.]0+)?$' then
    case when split_part({{ text }}, '.', 1)::numeric between -{{ bound }} - 1 and {{ bound }}
      then split_part({{ text }}, '.', 1)::{{ type }} end
  end
{%- endmacro %}

{# A field's text to be parsed as a time, cut off after microseconds. #}
{% macro to_microseconds(text) -%}
  regexp_replace({{ text }}, '([.][0-9]{6})[0-9]+', '\1')
{%- endmacro %}

{#
  A time: ISO 8601 with T or blank, with Z, an offset, UTC or nothing (UTC), letters in any case; or a number since
  1970, whose magnitude determines whether it counts seconds, milliseconds, microseconds or nanoseconds. A time outside
  the plausible years becomes 1970, which is never plausible: `implausible` distinguishes it from text that is not a
  time.

  Hours up to 23 and offsets up to 15:59, because beyond these the engines disagree on which times are valid. RisingWave
  misreads an offset of hours alone, so its minutes are added.
#}
{% macro timestamp_of(text) -%}
  {%- set years = var("plausible_years") -%}
  {%- set day = "[0-9]{4}-[01][0-9]-[0-3][0-9]" -%}
  {%- set moment = day ~ "[Tt ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,6})?)?" -%}
  {%- set hours = " ?[+-](0[0-9]|1[0-5])" -%}
  {%- set zone = " ?([Zz]|[Uu][Tt][Cc])|" ~ hours ~ "(:?[0-5][0-9])?" -%}
  {%- set number = "left(" ~ text ~ ", 60)::numeric" -%}
  case
    when {{ text }} ~ '^-?[0-9]{1,28}([.][0-9]+)?$' then
      case
        {%- for per_second, microseconds in {1: "1000000", 1000: "1000", 1000000: "1", 1000000000: "0.001"}.items() %}
        when {{ number }} >= {{ epoch_seconds(years.first) * per_second }} and {{ number }} < {{ epoch_seconds(years.last + 1) * per_second }}
          then to_timestamp(trunc({{ number }} * {{ microseconds }}) * 0.000001)
        {%- endfor %}
        else to_timestamp(0)
      end
    when {{ text }} ~ '^{{ moment }}({{ zone }})?$' then
      case
        when left({{ text }}, 4)::int not between {{ years.first - 1 }} and {{ years.last + 1 }} then to_timestamp(0)
        when {{ text }} ~ '^{{ moment }}$' then {{ calendar_timestamp("upper(" ~ text ~ ") || 'Z'") }}
        when {{ text }} ~ '^{{ moment }}{{ hours }}$' then {{ calendar_timestamp("upper(" ~ text ~ ") || ':00'") }}
        else {{ calendar_timestamp("upper(" ~ text ~ ")") }}
      end
  end
{%- endmacro %}

{# Whether a readable time is outside the plausible years. #}
{% macro implausible(moment) -%}
  {%- set years = var("plausible_years") -%}
  {#- The units of a number would overlap, and 1970 represents an implausible time. -#}
  {%- if years.first < 1971 or epoch_seconds(years.last + 1) >= 1000 * epoch_seconds(years.first) -%}
    {{ exceptions.raise_compiler_error(
      "plausible_years is " ~ years ~ ": a time as a number would not say its unit; begin with 1971 or later"
    ) }}
  {%- endif -%}
  ({{ moment }} < to_timestamp({{ epoch_seconds(years.first) }}) or {{ moment }} >= to_timestamp({{ epoch_seconds(years.last + 1) }}))
{%- endmacro %}

{# Seconds from 1970 to the start of a year in UTC. #}
{% macro epoch_seconds(year) -%}
  {%- set since = modules.datetime.datetime(year, 1, 1) - modules.datetime.datetime(1970, 1, 1) -%}
  {{ return(since.days * 86400) }}
{%- endmacro %}

{# Whether the message was redacted by an erasure, which keeps its position and removes its content. #}
{% macro erased(identity) -%}
  case when jsonb_typeof(j -> 'erased') in ('boolean', 'string') then j ->> 'erased' = 'true' end and {{ identity }} is null
{%- endmacro %}

{#
  The reasons for rejecting a message of any topic, as `when … then …` arms; `identity` is the field that identifies a
  message.
#}
{% macro message_reasons(identity) %}
    when octet_length(data) > {{ var("max_message_bytes") }} then {{ too_many_bytes("message", "data", var("max_message_bytes")) }}
    when j is null then 'not valid JSON'
    when jsonb_typeof(j) <> 'object' then 'not a JSON object'
    when {{ erased(identity) }} then 'erased'
    {{- malformed_row_reasons(identity) }}
{%- endmacro %}

{#
  The reasons for rejecting an event of any topic, as `when … then …` arms; `required` are the mandatory fields (without
  those that have a list of accepted values), `moment` is the field of the event time.
#}
{% macro common_reasons(identity, required, moment) %}
    {{- message_reasons(identity) }}
    {{- required_reasons(required) }}
    when {{ moment }} > coalesce(kafka_timestamp, arrived_at) + interval '{{ var("future_tolerance_hours") }} hours'
      then 'event time in the future'
{%- endmacro %}

{# The arms for mandatory fields. #}
{% macro required_reasons(names) %}
    {%- for name in names %}
    when {{ name }} is null and not {{ field_given(name) }} then 'missing {{ name }}'
    when {{ name }} is null then 'bad {{ name }}'
    {{- bound_reasons(name) }}
    {%- endfor %}
{%- endmacro %}

{# The arms for a mandatory field with a list of accepted values. #}
{% macro accepted_reasons(name) %}
    when {{ name }} is null and not {{ field_given(name) }} then 'missing {{ name }}'
    when {{ name }} is null or {{ not_accepted(name) }} then 'unknown {{ name }}'
{%- endmacro %}

{# Whether the value of a field is not one of its accepted values. #}
{% macro not_accepted(name) -%}
  {%- set field = declared_fields().get(name) or {} -%}
  {%- set values = (var(field.accepted_from) if field.accepted_from else field.accepted or []) | list -%}
  {{ name }} not in ('{{ values | join("', '") }}')
{%- endmacro %}

{#
  The arms for optional fields: a value must have the field's type and lie within its bounds. Empty text, null and
  absence are NULL; a list, an object or a boolean is not text.
#}
{% macro optional_reasons() %}
    {%- for name, field in declared_fields().items() if field.optional %}
    {%- if field.type == "text" and not field.format %}
    when {{ name }} is null and jsonb_typeof(j -> '{{ name }}') not in ('null', 'string') then 'bad {{ name }}'
    {%- else %}
    when {{ name }} is null and {{ field_given(name) }} then 'bad {{ name }}'
    {%- endif %}
    {%- if field.accepted or field.accepted_from %}
    when {{ not_accepted(name) }} then 'unknown {{ name }}'
    {%- endif %}
    {{- bound_reasons(name) }}
    {%- endfor %}
{%- endmacro %}

{# The arms for a value beyond the declared bounds: a text's bytes, a number's range, a time's years; or nothing. #}
{% macro bound_reasons(name) %}
    {%- set field = declared_fields().get(name) or {} -%}
    {{- size_reason(name) }}
    {%- if field.type == "timestamptz" %}
    when {{ implausible(name) }} then 'implausible time'
    {%- endif %}
    {%- if field.max is defined %}
    when {{ name }} < {{ field.min }} or {{ name }} > {{ field.max }} then '{{ name }} outside {{ field.min }}..{{ field.max }}'
    {%- elif field.min is defined %}
    when {{ name }} < {{ field.min }} then 'negative {{ name }}'
    {%- endif %}
{%- endmacro %}

{# The arm for a text that is longer than declared, or nothing. #}
{% macro size_reason(name) %}
    {%- set limit = (declared_fields().get(name) or {}).get("max_bytes") -%}
    {%- if limit %}
    when octet_length({{ name }}) > {{ limit }} then {{ too_many_bytes(name, name, limit) }}
    {%- endif -%}
{%- endmacro %}

{# The reason without its size is what `prefs rejected` counts by: the pattern of dagster_prefs/events/rejected.py. #}
{% macro too_many_bytes(what, column, limit) -%}
  '{{ what }} has ' || octet_length({{ column }})::text || ' bytes, at most {{ limit }}'
{%- endmacro %}

{#
  The query of a model that reads one topic: the position of each message, its fields, and in `reason` why it is
  rejected.

  The fields are those that the model's YAML declares (`declared_fields`). The block of the call has the reasons for
  rejection, as `when … then '<reason>'` arms over the fields. A field is NULL if it is absent or has another type, and
  `field_given` distinguishes the two. A rejected message keeps its text in `payload`; a message that is too long keeps
  its beginning. It is not parsed, because parsing takes many times its size in memory.

  `format` is that of the messages: `json`, or in Confluent's wire format `json_schema`, whose header is removed, or
  `avro`, which becomes JSON before it is stored, so that what still has the header could not be decoded.

  For an event, `identity` is the field that identifies it, `key` is the first key of its entity, and `moment` is its
  time; with these, reserved ids are rejected (reserved.sql).

  With `lake`, a list of fields, it is the query of the raw messages in the lake instead: their bytes with these fields,
  the day of arrival, and whether they are rejected. Only the bytes decide: the verdict on what claims to be a canary
  changes when a key arrives, which an append-only sink cannot take back, so such a message is among the rejected.
#}
{% macro parsed_messages(raw, identity=none, key=none, moment=none, format="json", lake=none) -%}
{%- set body = "data" if format != "json_schema" or lake is none else "data, message" -%}
{%- set place = place_columns() | join(", ") -%}
{%- set fields = declared_fields() -%}
{%- set most = var("max_message_bytes") -%}
with
{%- if format == "json_schema" %} bodies as (

  select {{ place }}, {{ unframed("data") }} as data{{ ", data as message" if lake is not none }}
  from {{ raw }}

),
{%- endif %} messages as (

  select {{ place }}, {{ body }}, case when octet_length(data) <= {{ most }} then {{ json_of("data") }} end as j
  from {{ "bodies" if format == "json_schema" else raw }}
  {{ computed_once() }}

),

texts as (

  select
    {{ place }}, {{ body }}, j
    {%- for name, field in fields.items() %},
    {{ to_microseconds(text_field(name, field.type)) if field.type == "timestamptz" else text_field(name, field.type) }} as {{ name }}_text
    {%- endfor %}
  from messages
  {{ computed_once() }}

),

fields as (

  select
    {{ place }}, {{ body }}, j
    {%- for name, field in fields.items() %},
    {{ field_of(name ~ "_text", field) }} as {{ name }}
    {%- endfor %}
  from texts
  {{ computed_once() }}

),

judged as (

  select
    *,
    case
      {%- if format == "avro" %}
      when {{ has_header("data") }} then 'unreadable Avro or unknown schema'
      {%- endif %}
      {{- caller() }}
      {%- if key %}{{ reserved_reasons(key, identity) }}{% endif %}
    end as reason
  from fields
  {{ computed_once() }}

),

{% if key %}
claims as (

  select *, {{ claimed_deployment(key, identity) }} as canary
  from judged

),
{% endif %}

{%- if lake is not none %}
final as (

  select
    (arrived_at at time zone 'UTC')::date as arrival_day,
    reason is not null{{ " or canary is not null" if key }} as rejected,
    {{ place }},
    {{ "message as data" if format == "json_schema" else "data" }},
    {{ lake | join(", ") }}
  from {{ "claims" if key else "judged" }}

)
{% elif key %}
shown as (

  select
    {{ place }},
    case when reason is not null or canary is not null then {{ text_of("substr(data, 1, " ~ most ~ ")") }} end as payload,
    reason,
    canary,
    {{ fields | join(", ") }}
  from claims

),

verdicts as (

  {{ verdicts("shown", key, identity, moment) }}

),

final as (

  select
    {{ place }},
    case when verdict is not null then payload end as payload,
    verdict as reason,
    canary,
    {{ fields | join(", ") }}
  from verdicts

)
{% else %}
final as (

  select
    {{ place }},
    case when reason is not null then {{ text_of("substr(data, 1, " ~ most ~ ")") }} end as payload,
    reason,
    {{ fields | join(", ") }}
  from judged

)
{% endif %}

select * from final
{%- endmacro %}

{# Whether a message has the header of Confluent's wire format, a zero byte and four bytes of the schema's id. #}
{% macro has_header(bytes) -%}
  substr({{ bytes }}, 1, 1) = '\x00'::bytea
{%- endmacro %}

{# A message without that header, with which no JSON text begins. #}
{% macro unframed(bytes) -%}
  case when {{ has_header(bytes) }} then substr({{ bytes }}, 6) else {{ bytes }} end
{%- endmacro %}

{# A field's text, cast to its type. #}
{% macro field_of(text, field) -%}
  {%- if field.format == "uuid" -%} {{ uuid_of(text) }}
  {%- elif field.type == "text" -%} {{ text }}
  {%- elif field.type == "decimal" -%} {{ decimal_of(text, field.scale) }}
  {%- elif field.type in ("int", "bigint") -%} {{ integer_of(text, field.type) }}
  {%- elif field.type == "boolean" -%} {{ boolean_of(text) }}
  {%- elif field.type == "timestamptz" -%} {{ timestamp_of(text) }}
  {%- else -%} {{ exceptions.raise_compiler_error(text ~ " is a " ~ field.type ~ ", which parsed_messages does not read") }}
  {%- endif -%}
{%- endmacro %}

{#
  The query of a model of typed events: the first delivery of every valid event, without the events covered by an
  erasure of their entity. `moment` is the column of the event time.
#}
{% macro first_deliveries(parsed, entity, identity, moment, columns) -%}
with valid as (

  select * from {{ parsed }} where reason is null

),
{%- if entity_of(entity).erasable %}

erased as (

  select subject_id, erased_at from {{ ref("erased_subjects") }} where subject_kind = '{{ subject_kind(entity) }}'

),

remembered as (

  select valid.*
  from valid
  left join erased on erased.subject_id = valid.{{ first_key(entity) }}::text
  where erased.subject_id is null or valid.{{ moment }} > erased.erased_at

),
{%- endif %}

{{ one_delivery(
  "remembered" if entity_of(entity).erasable else "valid",
  identity,
  columns,
  order="arrived_at, source, source_partition, source_offset",
) }}
{%- endmacro %}

{#
  The query of a model of reference data: the last delivery of every valid message about `identity`. `columns` are
  expressions over the fields.

  What came from Kafka outranks everything else, whatever arrived later and whatever time of arrival was given to it:
  history that is ingested next to Kafka adds what Kafka has not told, and never takes back what it has. Among messages
  of one rank the last arrival counts. `load_accepted` of dagster_prefs/iceberg/event_reader.py has the same rule.
#}
{% macro last_deliveries(parsed, identity, columns) -%}
with valid as (

  select *, {{ kafka_rank() }} as prefs_rank from {{ parsed }} where reason is null

),

{{ one_delivery(
  "valid",
  identity,
  columns,
  order="prefs_rank desc, arrived_at desc, source desc, source_partition desc, source_offset desc",
) }}
{%- endmacro %}

{#
  1 for a message that came from Kafka, also for the correction of a rejected one, else 0. A source's name begins with
  what it is (`kafka:`, `file:` …), behind `replay:` for each correction.
#}
{% macro kafka_rank() -%}
  case when source ~ '^(replay:)*kafka:' then 1 else 0 end
{%- endmacro %}

{# The end of a typed model's query: of the rows of a CTE, the first of every `identity` in an order. #}
{% macro one_delivery(rows, identity, columns, order) -%}
deliveries as (

  select
    *,
    row_number() over (
      partition by {{ identity }}
      order by {{ order }}
    ) as delivery
  from {{ rows }}

),

final as (

  select {{ columns | join(", ") }}
  from deliveries
  where delivery = 1

)

select * from final
{%- endmacro %}
