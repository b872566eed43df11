{#
  Kafka on RisingWave. A feed is a source, which stores nothing, and a sink from it into the topic's raw table. So a
  feed can be recreated, with other brokers or credentials or after its topic was recreated, without changing a row or
  view of the raw table: an existing row takes precedence over a second reading of it.
#}

{# The brokers, empty without Kafka. #}
{% macro kafka_bootstrap() -%}
  {{ return(env_var("PREFS_KAFKA_BOOTSTRAP", "")) }}
{%- endmacro %}

{# The topic's name in Kafka, from PREFS_KAFKA_TOPIC_USER_EVENTS and the like. #}
{% macro kafka_topic(topic) -%}
  {%- set variable = "PREFS_KAFKA_TOPIC_" ~ topic | replace(".", "_") | replace("-", "_") | upper -%}
  {%- set name = env_var(variable, topic) or topic -%}
  {#- `${…}` in it would be replaced when the statement runs. -#}
  {%- if not modules.re.fullmatch("[A-Za-z0-9._-]{1,249}", name) -%}
    {{ exceptions.raise_compiler_error(variable ~ "=" ~ name ~ " is no Kafka topic: use letters, digits, `.`, `_` and `-`") }}
  {%- endif -%}
  {{ return(name) }}
{%- endmacro %}

{# The connector's options; secret or long values are only named, and inserted when the statement runs. #}
{% macro kafka_options(topic) -%}
  {%- set protocol = env_var("PREFS_KAFKA_SECURITY_PROTOCOL", "") or "PLAINTEXT" -%}
  {%- set mechanism = env_var("PREFS_KAFKA_SASL_MECHANISM", "") -%}
  {%- set options = [
    "connector = 'kafka'",
    "topic = " ~ text_literal(kafka_topic(topic)),
    "properties.bootstrap.server = " ~ text_literal(kafka_bootstrap()),
    "scan.startup.mode = " ~ text_literal(env_var("PREFS_KAFKA_START", "") or "earliest"),
  ] -%}
  {%- if environment_name() -%}
    {#- RisingWave reads from no group; it reports its offsets to one, which Kafka's tools and access lists see. -#}
    {%- do options.append("group.id.prefix = " ~ text_literal("dagster-prefs-" ~ environment_name())) -%}
  {%- endif -%}
  {%- if execute -%}{%- do refuse_kafka_contradictions(protocol, mechanism) -%}{%- endif -%}
  {%- if protocol != "PLAINTEXT" -%}
    {%- do options.append("properties.security.protocol = " ~ text_literal(protocol)) -%}
  {%- endif -%}
  {%- if mechanism -%}
    {%- do options.append("properties.sasl.mechanism = " ~ text_literal(mechanism)) -%}
  {%- endif -%}
  {%- if mechanism == "AWS_MSK_IAM" -%}
    {%- do options.append("aws.region = " ~ text_literal(env_var("PREFS_KAFKA_MSK_REGION", "") or env_var("AWS_REGION", "") or "eu-central-1")) -%}
    {%- do options.extend(aws_credentials(env_var("PREFS_KAFKA_MSK_ROLE_ARN", ""))) -%}
  {%- endif -%}
  {%- for option, name in {
    "properties.ssl.ca.location": "PREFS_KAFKA_SSL_CA_LOCATION",
    "properties.ssl.certificate.location": "PREFS_KAFKA_SSL_CERTIFICATE_LOCATION",
    "properties.ssl.key.location": "PREFS_KAFKA_SSL_KEY_LOCATION",
    "properties.sasl.username": "PREFS_KAFKA_SASL_USERNAME",
  }.items() if env_var(name, "") -%}
    {%- do options.append(option ~ " = " ~ text_literal(env_var(name))) -%}
  {%- endfor -%}
  {#- Only at execution: dbt keeps every value that was read while parsing in its partial-parse file. -#}
  {%- if execute -%}
    {%- for option, name in {
      "properties.ssl.ca.pem": "PREFS_KAFKA_SSL_CA_PEM",
      "properties.ssl.certificate.pem": "PREFS_KAFKA_SSL_CERTIFICATE_PEM",
      "properties.ssl.key.pem": "PREFS_KAFKA_SSL_KEY_PEM",
      "properties.ssl.key.password": "PREFS_KAFKA_SSL_KEY_PASSWORD",
      "properties.sasl.password": "PREFS_KAFKA_SASL_PASSWORD",
    }.items() if env_var(name, "") -%}
      {%- do options.append(option ~ " = " ~ credential(name)) -%}
    {%- endfor -%}
  {%- endif -%}
  {{ return(options | join(",\n  ")) }}
{%- endmacro %}

{# The same options that our own clients reject: librdkafka would silently ignore unsuitable ones. #}
{% macro refuse_kafka_contradictions(protocol, mechanism) -%}
  {%- if protocol.startswith("SASL") != (mechanism != "") -%}
    {{ exceptions.raise_compiler_error(
      "PREFS_KAFKA_SECURITY_PROTOCOL=" ~ protocol ~ " and PREFS_KAFKA_SASL_MECHANISM=" ~ mechanism
      ~ " contradict each other: a mechanism needs SASL_SSL or SASL_PLAINTEXT, and these need a mechanism"
    ) }}
  {%- endif -%}
  {%- if mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512") and not (env_var("PREFS_KAFKA_SASL_USERNAME", "") and env_var("PREFS_KAFKA_SASL_PASSWORD", "")) -%}
    {{ exceptions.raise_compiler_error(
      "PREFS_KAFKA_SASL_MECHANISM=" ~ mechanism ~ " needs PREFS_KAFKA_SASL_USERNAME and PREFS_KAFKA_SASL_PASSWORD: set both"
    ) }}
  {%- endif -%}
{%- endmacro %}

{#
  The two statements of a feed. `${generation}` and `${unread}` are replaced when they run: the first distinguishes a
  recreated topic from the earlier one, the second excludes rows that the raw table already holds.
#}
{% macro kafka_feed(topic, raw, format="json") -%}
{%- if format == "avro" and flags.WHICH in ("run", "build") -%}
  {{ exceptions.raise_compiler_error(
    "topic " ~ topic ~ " is Avro, which the embedded engine decodes and RisingWave does not, because raw messages are "
    ~ "bytes there: have its producers write JSON Schema and declare format: json_schema"
  ) }}
{%- endif -%}
{%- set sink = this.incorporate(path={"identifier": this.identifier ~ "_feed"}) -%}
{%- set lateness = env_var("PREFS_KAFKA_LATENESS_SECONDS", "") -%}
create source {{ this }} (
  data bytea,
  arrived_at timestamptz as proctime()
  {%- if lateness %},
  watermark for kafka_timestamp as kafka_timestamp - interval '{{ lateness | int }} seconds'
  {%- endif %}
)
include partition as source_partition
include offset as source_offset
include timestamp as kafka_timestamp
with (
  {{ kafka_options(topic) }}
)
format plain encode bytes;
create sink {{ sink }} into {{ raw }} (source, source_partition, source_offset, data, kafka_timestamp, arrived_at)
as select
  {{ text_literal("kafka:" ~ kafka_topic(topic) ~ "${generation}") }} as source,
  source_partition::int as source_partition,
  source_offset::bigint as source_offset,
  data,
  kafka_timestamp,
  arrived_at
from {{ this }}
where ${unread}
{%- endmacro %}

{# The value of `${generation}`: empty for a topic's first generation, `#2` for its second. #}
{% macro kafka_generation(topic) -%}
  {%- set rows = run_query(
    "select generation from " ~ target.schema ~ ".kafka_topics where kafka_topic = " ~ text_literal(kafka_topic(topic))
  ).rows -%}
  {{ return("#" ~ rows[0][0] if rows and rows[0][0] > 1 else "") }}
{%- endmacro %}

{% materialization kafka_feed, adapter='risingwave' %}
  {%- set relation = this.incorporate(type="source") -%}
  {%- set sink = this.incorporate(path={"identifier": this.identifier ~ "_feed"}, type="sink") -%}
  {%- set topic = config.require("topic") -%}
  {%- set raw = config.require("raw_table") -%}
  {%- set generation = kafka_generation(topic) -%}
  {%- set source = "kafka:" ~ kafka_topic(topic) ~ generation -%}
  {%- set there = risingwave__get_relation_without_caching(relation) -%}
  {%- set feeding = run_query(
    "select definition from rw_catalog.rw_sinks s join rw_catalog.rw_schemas n on n.id = s.schema_id where n.name = "
    ~ text_literal(sink.schema) ~ " and s.name = " ~ text_literal(sink.identifier)
  ).rows -%}
  {%- set deployed = run_query(
    "select checksum from " ~ target.schema ~ ".deployments where relation = '" ~ this.identifier ~ "'"
  ).rows -%}
  {%- set current = there and feeding and deployed and deployed[0][0] == definition_checksum()
    and text_literal(source) in feeding[0][0] -%}
  {{ run_hooks(pre_hooks) }}
  {%- if current and not should_full_refresh() -%}
    {% do store_raw_result(name="main", message="SKIP", code="skip", rows_affected="-1") %}
  {%- else -%}
    {%- set statements = (sql | replace("${generation}", generation)).split(";\n") -%}
    {%- set held = held_offsets(raw, source) -%}
    {%- set create_source = with_credentials(started_at(statements[0], raw, source, held, generation)) -%}
    {%- set create_sink = statements[1] | replace("${unread}", unread(held)) -%}
    {#- A leftover of a run that ended between creating the new source and renaming it. -#}
    {%- set shadow = this.incorporate(path={"identifier": this.identifier ~ "_next"}, type="source") -%}
    {% do run_query("drop source if exists " ~ shadow) %}
    {%- if there or feeding -%}
      {#-
        Created as a shadow of the old feed first: with a wrong topic or credential, the old feed continues to work.
      -#}
      {% do run_query(create_source | replace("create source " ~ this, "create source " ~ shadow)) %}
      {% do run_query("drop sink if exists " ~ sink) %}
      {#- What it has read is in the raw table, also in one that was swapped in and gets it over a sink, before it is read again. #}
      {% do run_query("flush") %}
      {% do run_query("drop source if exists " ~ relation) %}
      {% do run_query("alter source " ~ shadow ~ " rename to " ~ relation.identifier) %}
    {%- else -%}
      {% do run_query(create_source) %}
    {%- endif -%}
    {% do run_query(create_sink) %}
    {% do store_raw_result(name="main", message="CREATE_SOURCE from " ~ source, code="CREATE_SOURCE", rows_affected="-1") %}
  {%- endif -%}
  {{ run_hooks(post_hooks) }}
  {{ return({"relations": [relation]}) }}
{% endmaterialization %}

{# Partition → the newest offset of a source that the raw table holds or has held. #}
{% macro held_offsets(raw, source) -%}
  {%- set progress = api.Relation.create(database=target.dbname, schema=target.schema, identifier="ingest_progress") -%}
  {%- if risingwave__get_relation_without_caching(progress) -%}
    {%- set rows = run_query(
      "select source_partition, max(last_offset) from " ~ progress ~ " where source = " ~ text_literal(source) ~ " group by source_partition order by 1"
    ).rows -%}
  {%- else -%}
    {%- set rows = run_query(
      "select source_partition, max(source_offset) from " ~ target.schema ~ "." ~ raw ~ " where source = " ~ text_literal(source) ~ " group by source_partition order by 1"
    ).rows -%}
  {%- endif -%}
  {{ return(rows) }}
{%- endmacro %}

{#
  If raw rows expire, the first row of a key no longer prevents a second reading of it, so the row is excluded by its
  offset.
#}
{% macro unread(held) -%}
  {%- if not held -%}{{ return("true") }}{%- endif -%}
  {%- set arms = [] -%}
  {%- for row in held -%}{%- do arms.append("when " ~ text_literal(row[0]) ~ " then " ~ row[1]) -%}{%- endfor -%}
  {{ return("source_offset::bigint > case source_partition " ~ arms | join(" ") ~ " else -1 end") }}
{%- endmacro %}

{#
  The source's statement with its start. `earliest` is used as it is. `latest` applies only to the first feed of a
  topic: a recreated feed continues after the rows that the raw table has, and a recreated topic is read from its
  beginning.
#}
{% macro started_at(statement, raw, source, held, generation) -%}
  {%- set latest = "scan.startup.mode = 'latest'" -%}
  {%- if latest not in statement -%}{{ return(statement) }}{%- endif -%}
  {%- if held -%}
    {%- set oldest = run_query(
      "select (extract(epoch from min(kafka_timestamp)) * 1000)::bigint from " ~ target.schema ~ "." ~ raw ~ " where source = " ~ text_literal(source)
    ).rows[0][0] -%}
    {{ return(statement | replace(latest, "scan.startup.timestamp.millis = '" ~ (oldest or 0) ~ "'")) }}
  {%- endif -%}
  {{ return(statement | replace(latest, "scan.startup.mode = 'earliest'") if generation else statement) }}
{%- endmacro %}
