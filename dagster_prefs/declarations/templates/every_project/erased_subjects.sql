{{ config(materialized="table_with_connector") }}
{{ kept_table(["subject_kind", "subject_id"]) }}
