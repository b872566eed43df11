locals {
  environment = merge(
    var.platform_environment,
    {
      AWS_REGION              = var.region
      PREFS_ENGINE            = var.engine
      PREFS_PROVISIONING      = "verify"
      PREFS_TABLE_PREFIX      = local.prefix
      PREFS_ICEBERG_CATALOG   = "glue"
      PREFS_ICEBERG_WAREHOUSE = local.warehouse
      PREFS_ICEBERG_NAMESPACE = aws_glue_catalog_database.training.name
    },
    # Named by the workspace and by nothing else, the environment has the names that PREFS_ENVIRONMENT gives.
    var.environment == null && var.prefix == null && var.iceberg_namespace == null ? { PREFS_ENVIRONMENT = replace(local.name, "-", "_") } : {},
    var.endpoint_url == null ? {} : { AWS_ENDPOINT_URL = var.endpoint_url },
  )
}

output "env" {
  description = "The environment that the platform reads, one NAME=value a line: terraform output -raw env > .env"
  value       = join("", [for name, value in local.environment : "${name}=${value}\n"])
}

output "table_names" {
  description = "Name of each entity's DynamoDB table, by entity."
  value       = { for entity, table in aws_dynamodb_table.profiles : entity => table.name }
}

output "table_arns" {
  description = "ARN of each entity's DynamoDB table, by entity."
  value       = { for entity, table in aws_dynamodb_table.profiles : entity => table.arn }
}

output "lake_bucket" {
  description = "Name of the lake's bucket."
  value       = aws_s3_bucket.lake.id
}

output "iceberg_warehouse" {
  description = "URI of the Iceberg warehouse."
  value       = local.warehouse
}

output "iceberg_namespace" {
  description = "Glue database, the Iceberg namespace of the training tables."
  value       = aws_glue_catalog_database.training.name
}

output "encryption_key_arn" {
  description = "ARN of the customer key; null where AWS manages the keys."
  value       = local.key_arn
}

output "role_arns" {
  description = "ARN of each actor's role, by actor."
  value       = { for actor, role in aws_iam_role.actor : actor => role.arn }
}

output "policy_arns" {
  description = "ARN of each actor's policy, by actor, to attach to a role that plays several actors."
  value       = { for actor, policy in aws_iam_policy.actor : actor => policy.arn }
}

output "instance_profiles" {
  description = "Name of the instance profile of each actor that EC2 may take."
  value       = { for actor, profile in aws_iam_instance_profile.actor : actor => profile.name }
}

output "alarm_arns" {
  description = "ARNs of the CloudWatch alarms."
  value       = local.alarm_arns
}

output "dashboard_name" {
  description = "Name of the CloudWatch dashboard."
  value       = aws_cloudwatch_dashboard.platform.dashboard_name
}
