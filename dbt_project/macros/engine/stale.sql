{#
  Refuse a project that `prefs generate` has not processed: the registry, and with it everything outside dbt, would
  silently differ from what runs. `prefs` compares files; dbt compares what it is about to run with the hashes in the
  generated macro `declared_hashes` (dagster_prefs/declarations/declared.py). Values that vary by environment are in
  none of the hashes.
#}
{% macro refuse_stale() -%}
  {%- if declared_hashes is not defined -%}
    {{ exceptions.raise_compiler_error("generated/declared.sql is missing: run `prefs generate`, and keep \"generated\" in macro-paths of dbt_project.yml") }}
  {%- endif -%}
  {%- set declared = declared_hashes() -%}
  {%- set stale, seen = [], [] -%}
  {%- for node in own_models() -%}
    {%- set file = node.original_file_path -%}
    {%- do seen.append(file) -%}
    {%- if declared.sql.get(file) != whitespace_free_md5(node.raw_code) -%}
      {%- do stale.append(file ~ (" (changed)" if file in declared.sql else " (new)")) -%}
    {%- endif -%}
    {%- set known = declared.yaml.get(node.name) -%}
    {%- set indexes = declared.indexes.get(node.name) -%}
    {%- if (known is none and node.patch_path)
      or (known and known != whitespace_free_md5(tojson(declared_by(node, declared.meta), sort_keys=true)))
      or (indexes and indexes != whitespace_free_md5(tojson(declared_indexes(node.config.get("indexes") or []), sort_keys=true)))
    -%}
      {%- do stale.append((node.patch_path or "://the YAML of " ~ node.name).split("://")[1] ~ " (changed)") -%}
    {%- endif -%}
  {%- endfor -%}
  {%- for file in declared.required if file not in seen -%}{%- do stale.append(file ~ " (gone)") -%}{%- endfor -%}
  {%- for name, known in declared.vars.items() if local_md5([var(name)] | string) != known -%}
    {%- do stale.append("the variable " ~ name ~ " (changed)") -%}
  {%- endfor -%}
  {%- set given = invocation_args_dict.get("vars") or {} -%}
  {#- A bigger project that has this one as a package may have variables of its own. #}
  {%- for name in (fromyaml(given) if given is string else given) if name not in declared.vars and project_name == declared.project -%}
    {%- do stale.append("the variable " ~ name ~ " (not declared)") -%}
  {%- endfor -%}
  {%- if stale -%}
    {{ exceptions.raise_compiler_error(
      "the project is not what registry.json was generated from: " ~ stale[:3] | join(", ")
      ~ (" and " ~ (stale | length - 3) ~ " more" if stale | length > 3 else "")
      ~ ": undo it, or run `prefs generate` and commit what it writes"
    ) }}
  {%- endif -%}
{%- endmacro %}

{# The models of this project, without those of a bigger project that has it as a package. #}
{% macro own_models() -%}
  {%- set found, project = [], declared_hashes().project -%}
  {%- for node in graph.nodes.values() if node.resource_type == "model" and node.package_name == project -%}
    {%- do found.append(node) -%}
  {%- endfor -%}
  {{ return(found) }}
{%- endmacro %}

{# Like dbt's own comparison of files, which treats files that differ only in blanks as unchanged. #}
{% macro whitespace_free_md5(text) -%}
  {{ return(local_md5(text.split() | join(" "))) }}
{%- endmacro %}

{% macro declared_by(node, names) -%}
  {%- set meta, columns = {}, [] -%}
  {%- for name in names if name in node.config.meta -%}{%- do meta.update({name: node.config.meta[name]}) -%}{%- endfor -%}
  {%- for column in node.columns.values() -%}
    {%- do columns.append([column.name, column.data_type, column.config.meta]) -%}
  {%- endfor -%}
  {{ return([meta, columns]) }}
{%- endmacro %}

{% macro declared_indexes(indexes) -%}
  {%- set found = [] -%}
  {%- for index in indexes -%}{%- do found.append([index.columns, index.get("unique", false)]) -%}{%- endfor -%}
  {{ return(found) }}
{%- endmacro %}
