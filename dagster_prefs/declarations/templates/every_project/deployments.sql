{{ config(materialized="table_with_connector", pre_hook="", post_hook="") }}
{{ deployments_ddl() }}
