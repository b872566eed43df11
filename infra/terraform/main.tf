data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

locals {
  contract = jsondecode(file(coalesce(var.registry_file, "${path.module}/../../dbt_project/registry.json"))).contract
  # By entity.
  tables = local.contract.tables

  # The workspace of PREFS_ENVIRONMENT=dev_anna is dev_anna: no name of AWS's that begins with it may hold an underscore.
  name       = var.environment == null ? replace(terraform.workspace, "_", "-") : var.environment
  prefix     = var.prefix == null ? "${local.name}-" : var.prefix
  account_id = data.aws_caller_identity.current.account_id
  partition  = data.aws_partition.current.partition

  # Names are put together here, not read from resources, so that every policy is complete in the plan.
  table_names = { for entity, table in local.tables : entity => "${local.prefix}${table.name}" }
  table_arns  = { for entity, name in local.table_names : entity => "arn:${local.partition}:dynamodb:${var.region}:${local.account_id}:table/${name}" }
  bucket_name = coalesce(var.lake_bucket_name, "${local.prefix}prefs-lake-${local.account_id}-${var.region}")
  bucket_arn  = "arn:${local.partition}:s3:::${local.bucket_name}"
  # Glue allows no hyphen in a database that Iceberg clients and Athena are to read without quoting.
  namespace      = coalesce(var.iceberg_namespace, "${replace(local.prefix, "-", "_")}training")
  warehouse_path = "warehouse"
  warehouse      = "s3://${local.bucket_name}/${local.warehouse_path}"

  tags = merge(var.tags, {
    "prefs:environment" = local.name
    "prefs:managed-by"  = "terraform"
  })
}
