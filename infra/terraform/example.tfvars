# Copy to prod.tfvars, change, and: terraform apply -var-file=prod.tfvars
environment = "prod"
region      = "eu-central-1"

tags = {
  team = "engagement-features"
}

eks_oidc_provider_arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"

trust = {
  sink-writer      = { service_accounts = ["risingwave:risingwave"] }
  exporter         = { service_accounts = ["prefs:exporter"] }
  serving-reader   = { service_accounts = ["recommendations:api"] }
  freshness-reader = { service_accounts = ["prefs:freshness"] }
  provisioner      = { service_accounts = ["prefs:dagster"] }
}

alarm_topic_arns = ["arn:aws:sns:eu-central-1:123456789012:prefs-alarms"]

platform_environment = {
  PREFS_ENGINE_HOST     = "risingwave.prefs.internal"
  PREFS_KAFKA_BOOTSTRAP = "kafka-1.prefs.internal:9092,kafka-2.prefs.internal:9092"
  # Windows of all viewers would else roll over in one second; docs/scale.md says how much spread a size needs.
  PREFS_EXPIRY_SPREAD_SECONDS = "3600"
}
