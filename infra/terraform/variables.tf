# --- where and under which name ---------------------------------------------------------------

variable "environment" {
  description = "Name of this environment, e.g. prod or staging: 1 to 20 of a-z, 0-9 and -, beginning with a letter. Tags every resource and, unless prefix is set, begins every name. null means the workspace, which has the name of PREFS_ENVIRONMENT, with - for _."
  type        = string
  default     = null

  validation {
    condition     = var.environment != null || terraform.workspace != "default"
    error_message = "environment is not set, and the workspace is the default one: write e.g. environment = \"prod\", or select the workspace of PREFS_ENVIRONMENT."
  }

  validation {
    condition     = can(regex("^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$", var.environment == null ? replace(terraform.workspace, "_", "-") : var.environment))
    error_message = "environment \"${var.environment == null ? terraform.workspace : var.environment}\" must be 1 to 20 of a-z, 0-9 and -, begin with a letter, not end with - and hold no space: write e.g. environment = \"prod\"."
  }
}

variable "region" {
  description = "AWS region of every resource, e.g. eu-central-1."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]{1,2}$", var.region))
    error_message = "region \"${var.region}\" is not the code of an AWS region: write e.g. region = \"eu-central-1\" (no availability zone, no space)."
  }
}

variable "prefix" {
  description = "Prefix of every name (table, bucket, roles, alarms), so that several environments share an account; null means \"<environment>-\", \"\" the bare names. The platform reads it as PREFS_TABLE_PREFIX."
  type        = string
  default     = null

  validation {
    condition     = var.prefix == null ? true : can(regex("^([a-z0-9][a-z0-9-]{0,22}-)?$", var.prefix))
    error_message = "prefix \"${var.prefix == null ? "" : var.prefix}\" must be empty, or 2 to 24 of a-z, 0-9 and - that end with - (a bucket allows no others): write e.g. prefix = \"prod-\"."
  }
}

variable "tags" {
  description = "Tags of every resource, in addition to prefs:environment and prefs:managed-by."
  type        = map(string)
  default     = {}
  nullable    = false

  validation {
    condition     = alltrue([for key in keys(var.tags) : can(regex("^[A-Za-z0-9_.:/=+@-]{1,128}$", key)) && !startswith(lower(key), "aws:") && !startswith(key, "prefs:")])
    error_message = "a key of tags must be 1 to 128 of A-Z, a-z, 0-9 and _.:/=+@- and begin neither with aws: nor with prefs:, which are reserved: rename it."
  }

  validation {
    condition     = alltrue([for value in values(var.tags) : can(regex("^[A-Za-z0-9 _.:/=+@-]{0,256}$", value)) && trimspace(value) == value])
    error_message = "a value of tags must be at most 256 of A-Z, a-z, 0-9, blank and _.:/=+@- without a blank at either end: shorten or trim it."
  }

  validation {
    condition     = length(var.tags) <= 40
    error_message = "tags holds ${length(var.tags)} entries; AWS allows 50 on a resource and this configuration needs some itself: keep at most 40."
  }
}

variable "endpoint_url" {
  description = "Address of a local AWS server for trials and tests, http://127.0.0.1:<port>; null means AWS."
  type        = string
  default     = null

  validation {
    condition     = var.endpoint_url == null ? true : can(regex("^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?$", var.endpoint_url))
    error_message = "endpoint_url \"${var.endpoint_url == null ? "" : var.endpoint_url}\" must be http(s)://host:port without a path: write e.g. http://127.0.0.1:54330, or leave it out for AWS."
  }
}

variable "registry_file" {
  description = "Path of the project's registry, which holds the serving contract; null means the one checked in, dbt_project/registry.json."
  type        = string
  default     = null

  validation {
    condition     = var.registry_file == null ? true : fileexists(var.registry_file)
    error_message = "registry_file \"${var.registry_file == null ? "" : var.registry_file}\" does not exist: leave it out for the checked-in registry, or run `prefs generate` in the project first."
  }
}

# --- the online store -------------------------------------------------------------------------

variable "capacity" {
  description = "Capacity of the table: mode \"on-demand\" (the maxima, request units per second, cap cost where set), or \"provisioned\" with auto-scaling between minimum and maximum capacity units at the target utilisation in percent."
  type = object({
    mode               = optional(string, "on-demand")
    read_min           = optional(number)
    read_max           = optional(number)
    write_min          = optional(number)
    write_max          = optional(number)
    target_utilisation = optional(number, 70)
  })
  default  = {}
  nullable = false

  validation {
    condition     = contains(["on-demand", "provisioned"], var.capacity.mode)
    error_message = "capacity.mode \"${var.capacity.mode}\" must be on-demand or provisioned."
  }

  validation {
    condition     = var.capacity.mode != "provisioned" || alltrue([for value in [var.capacity.read_min, var.capacity.read_max, var.capacity.write_min, var.capacity.write_max] : value != null])
    error_message = "capacity.mode provisioned needs read_min, read_max, write_min and write_max, in capacity units: set all four."
  }

  validation {
    condition     = var.capacity.mode != "on-demand" || (var.capacity.read_min == null && var.capacity.write_min == null)
    error_message = "capacity.read_min and write_min mean nothing on demand: remove them, or set mode = \"provisioned\"."
  }

  validation {
    condition     = alltrue([for value in [var.capacity.read_min, var.capacity.read_max, var.capacity.write_min, var.capacity.write_max] : value == null ? true : value >= 1 && floor(value) == value])
    error_message = "capacity.read_min, read_max, write_min and write_max are whole numbers from 1."
  }

  validation {
    condition = alltrue([for range in [[var.capacity.read_min, var.capacity.read_max], [var.capacity.write_min, var.capacity.write_max]] :
    anytrue([for value in range : value == null]) ? true : range[0] <= range[1]])
    error_message = "capacity: a minimum is above its maximum; write read_min <= read_max and write_min <= write_max."
  }

  validation {
    condition     = var.capacity.target_utilisation >= 20 && var.capacity.target_utilisation <= 90
    error_message = "capacity.target_utilisation ${var.capacity.target_utilisation} must be between 20 and 90 percent, the range DynamoDB's auto-scaling accepts."
  }
}

variable "point_in_time_recovery_days" {
  description = "Days back to which the table can be restored to any second, 1 to 35."
  type        = number
  default     = 35
  nullable    = false

  validation {
    condition     = var.point_in_time_recovery_days >= 1 && var.point_in_time_recovery_days <= 35 && floor(var.point_in_time_recovery_days) == var.point_in_time_recovery_days
    error_message = "point_in_time_recovery_days ${var.point_in_time_recovery_days} must be a whole number of days from 1 to 35."
  }
}

variable "deletion_protection" {
  description = "Whether the table refuses to be deleted and a lake that holds objects refuses to be destroyed. To remove an environment, apply false first."
  type        = bool
  default     = true
  nullable    = false
}

variable "encryption_key" {
  description = "Key of the table and the lake: \"create\" makes a customer key with yearly rotation, an ARN names an existing one, \"aws\" leaves it to the keys that AWS manages for DynamoDB and S3."
  type        = string
  default     = "create"
  nullable    = false

  validation {
    condition     = contains(["create", "aws"], var.encryption_key) || can(regex("^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$", var.encryption_key))
    error_message = "encryption_key \"${var.encryption_key}\" must be create, aws, or the ARN of a KMS key (arn:aws:kms:<region>:<account>:key/<id>; an alias is not enough for a policy)."
  }

  validation {
    condition     = startswith(var.encryption_key, "arn:") ? try(split(":", var.encryption_key)[3] == var.region, true) : true
    error_message = "encryption_key is not in region ${var.region}: DynamoDB and S3 only use a key of their own region, so name a key of ${var.region}."
  }
}

# --- the lake ---------------------------------------------------------------------------------

variable "lake_bucket_name" {
  description = "Name of the lake's bucket, unique in all of AWS; null means <prefix>prefs-lake-<account>-<region>."
  type        = string
  default     = null

  validation {
    condition     = var.lake_bucket_name == null ? true : can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.lake_bucket_name))
    error_message = "lake_bucket_name \"${var.lake_bucket_name == null ? "" : var.lake_bucket_name}\" must be 3 to 63 of a-z, 0-9 and - and begin and end with a letter or digit (a dot would break TLS)."
  }
}

variable "lake_noncurrent_days" {
  description = "Days that a replaced or deleted object of the lake can still be recovered. Also the longest that data of an erased subject stays in old versions."
  type        = number
  default     = 30
  nullable    = false

  validation {
    condition     = var.lake_noncurrent_days >= 1 && var.lake_noncurrent_days <= 365 && floor(var.lake_noncurrent_days) == var.lake_noncurrent_days
    error_message = "lake_noncurrent_days ${var.lake_noncurrent_days} must be a whole number of days from 1 to 365."
  }
}

variable "lake_access_log_bucket" {
  description = "Existing bucket that receives the lake's access log, under <lake bucket>/; null means none."
  type        = string
  default     = null

  validation {
    condition     = var.lake_access_log_bucket == null ? true : can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.lake_access_log_bucket))
    error_message = "lake_access_log_bucket \"${var.lake_access_log_bucket == null ? "" : var.lake_access_log_bucket}\" is not the name of a bucket: 3 to 63 of a-z, 0-9, . and -, without s3://."
  }
}

variable "iceberg_namespace" {
  description = "Glue database, the Iceberg namespace of the training tables; null means <prefix>training with _ for -."
  type        = string
  default     = null

  validation {
    condition     = var.iceberg_namespace == null ? true : can(regex("^[a-z][a-z0-9_]{0,127}$", var.iceberg_namespace))
    error_message = "iceberg_namespace \"${var.iceberg_namespace == null ? "" : var.iceberg_namespace}\" must be 1 to 128 of a-z, 0-9 and _ and begin with a letter, as Glue and Athena require."
  }
}

# --- who may do what --------------------------------------------------------------------------

variable "trust" {
  description = <<-EOT
    The principals that may assume each actor's role (sink-writer, exporter, serving-reader, freshness-reader,
    provisioner, eraser):
    service_accounts "namespace:name" of the EKS cluster (IRSA; needs eks_oidc_provider_arn), ec2 instances
    (an instance profile is made), principals (12-digit account ids, or ARNs of accounts, roles or users), with
    external_id demanded of the principals where it is set. An actor that is left out trusts this account: its
    identity policies then decide who may assume the role.
  EOT
  type = map(object({
    service_accounts = optional(list(string), [])
    ec2              = optional(bool, false)
    principals       = optional(list(string), [])
    external_id      = optional(string)
  }))
  default  = {}
  nullable = false

  validation {
    condition     = length(setsubtract(keys(var.trust), ["sink-writer", "exporter", "serving-reader", "freshness-reader", "provisioner", "eraser"])) == 0
    error_message = "trust names an unknown actor (${join(", ", setsubtract(keys(var.trust), ["sink-writer", "exporter", "serving-reader", "freshness-reader", "provisioner", "eraser"]))}): the actors are sink-writer, exporter, serving-reader, freshness-reader, provisioner and eraser."
  }

  validation {
    condition     = alltrue([for actor in values(var.trust) : length(actor.service_accounts) + length(actor.principals) > 0 || actor.ec2])
    error_message = "trust: an actor is listed with nobody to trust; give it service_accounts, ec2 or principals, or remove the entry to trust this account."
  }

  validation {
    condition     = alltrue(flatten([for actor in values(var.trust) : [for name in actor.service_accounts : can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?:[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", name))]]))
    error_message = "trust.service_accounts must be \"namespace:name\" in full, without a wildcard: write e.g. \"prefs:exporter\"."
  }

  validation {
    condition     = alltrue(flatten([for actor in values(var.trust) : [for name in actor.principals : can(regex("^([0-9]{12}|arn:aws[a-z-]*:iam::[0-9]{12}:(root|(role|user)/[A-Za-z0-9+=,.@_/-]+))$", name))]]))
    error_message = "trust.principals must be 12-digit account ids or ARNs of an account (…:root), a role or a user, without a wildcard: write e.g. \"arn:aws:iam::123456789012:role/dagster\"."
  }

  validation {
    condition     = alltrue([for actor in values(var.trust) : actor.external_id == null ? true : length(actor.principals) > 0 && length(actor.external_id) <= 1224 && can(regex("^[A-Za-z0-9+=,.@:/_-]{2,}$", actor.external_id))])
    error_message = "trust.external_id must be 2 to 1224 of A-Z, a-z, 0-9 and +=,.@:/_-, and only principals can present one: add principals, or remove it."
  }

  validation {
    condition     = var.eks_oidc_provider_arn != null || alltrue([for actor in values(var.trust) : length(actor.service_accounts) == 0])
    error_message = "trust.service_accounts needs eks_oidc_provider_arn, the IAM OIDC provider of the cluster: set it, or trust ec2 or principals."
  }
}

variable "eks_oidc_provider_arn" {
  description = "ARN of the IAM OIDC provider of the EKS cluster whose service accounts trust names; null without EKS."
  type        = string
  default     = null

  validation {
    condition     = var.eks_oidc_provider_arn == null ? true : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:oidc-provider/[a-z0-9./-]+/id/[A-Za-z0-9]+$", var.eks_oidc_provider_arn))
    error_message = "eks_oidc_provider_arn \"${var.eks_oidc_provider_arn == null ? "" : var.eks_oidc_provider_arn}\" must be arn:aws:iam::<account>:oidc-provider/<issuer>/id/<id>, as `aws iam list-open-id-connect-providers` prints it."
  }
}

variable "permissions_boundary_arn" {
  description = "ARN of the permissions boundary of every role created here, if the organisation requires one; null for none."
  type        = string
  default     = null

  validation {
    condition     = var.permissions_boundary_arn == null ? true : can(regex("^arn:aws[a-z-]*:iam::([0-9]{12}|aws):policy/[A-Za-z0-9+=,.@_/-]+$", var.permissions_boundary_arn))
    error_message = "permissions_boundary_arn \"${var.permissions_boundary_arn == null ? "" : var.permissions_boundary_arn}\" must be the ARN of an IAM policy, arn:aws:iam::<account>:policy/<name>."
  }
}

# --- observability ----------------------------------------------------------------------------

variable "alarm_topic_arns" {
  description = "SNS topics that are notified when an alarm starts and ends; empty means alarms show only in CloudWatch."
  type        = set(string)
  default     = []
  nullable    = false

  validation {
    condition     = length(var.alarm_topic_arns) <= 5 && alltrue([for arn in var.alarm_topic_arns : can(regex("^arn:aws[a-z-]*:sns:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]{1,256}$", arn))])
    error_message = "alarm_topic_arns must be at most 5 ARNs of SNS topics, arn:aws:sns:<region>:<account>:<name>, which is as many as an alarm can notify."
  }
}

variable "alarm_thresholds" {
  description = "Thresholds of the alarms: requests throttled, answered with a server error, or rejected per minute, and the 99th percentile of read latency in milliseconds; each for three of five minutes, server errors at once."
  type = object({
    throttled_per_minute          = optional(number, 10)
    system_errors_per_minute      = optional(number, 1)
    rejected_per_minute           = optional(number, 10)
    read_latency_p99_milliseconds = optional(number, 25)
  })
  default  = {}
  nullable = false

  validation {
    condition     = alltrue([for value in values(var.alarm_thresholds) : value >= 1])
    error_message = "alarm_thresholds must each be at least 1: an alarm at 0 would never be over."
  }
}

# --- what the platform reads ------------------------------------------------------------------

variable "engine" {
  description = "Streaming engine of the environment, PREFS_ENGINE: risingwave, or local for a trial against endpoint_url."
  type        = string
  default     = "risingwave"
  nullable    = false

  validation {
    condition     = contains(["risingwave", "local"], var.engine)
    error_message = "engine \"${var.engine}\" must be risingwave or local."
  }

  validation {
    condition     = var.engine != "local" || var.endpoint_url != null
    error_message = "engine local writes to a local AWS server: set endpoint_url to it, or engine = \"risingwave\"."
  }
}

variable "platform_environment" {
  description = "Further PREFS_* settings for the env output, e.g. PREFS_ENGINE_HOST or PREFS_KAFKA_BOOTSTRAP. Never a password: outputs are kept in the state."
  type        = map(string)
  default     = {}
  nullable    = false

  validation {
    condition     = alltrue([for name in keys(var.platform_environment) : can(regex("^PREFS_[A-Z0-9_]+$", name))])
    error_message = "platform_environment may only hold PREFS_* settings in capitals, as .env.example lists them: rename or remove the others."
  }

  validation {
    condition     = alltrue([for name in keys(var.platform_environment) : !can(regex("PASSWORD|SECRET|TOKEN", name))])
    error_message = "platform_environment must hold no secret, because the state keeps it in clear text: give it to the process from your secret store instead."
  }

  validation {
    condition     = length(setintersection(keys(var.platform_environment), ["PREFS_ENGINE", "PREFS_PROVISIONING", "PREFS_TABLE_PREFIX", "PREFS_ICEBERG_CATALOG", "PREFS_ICEBERG_WAREHOUSE", "PREFS_ICEBERG_NAMESPACE"])) == 0
    error_message = "platform_environment contradicts what this configuration decides (PREFS_ENGINE, PREFS_PROVISIONING, PREFS_TABLE_PREFIX, PREFS_ICEBERG_*): use the variables engine, prefix, lake_bucket_name and iceberg_namespace."
  }

  validation {
    condition     = alltrue([for value in values(var.platform_environment) : can(regex("^[A-Za-z0-9_.,:/@%+=-]+$", value))])
    error_message = "a value of platform_environment must be one or more of A-Z, a-z, 0-9 and _.,:/@%+=- (no blank, quote, $ or line break), so that every reader of .env agrees on it."
  }
}
