# Every rule of the table and the lake: a value that passes and values that are refused, against a mocked provider (offline).

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{\"Version\":\"2012-10-17\",\"Statement\":[]}" }
  }
}

variables {
  environment = "prod"
  region      = "eu-central-1"
}

run "table_follows_the_contract" {
  command = plan

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].hash_key == "viewer_id" && aws_dynamodb_table.profiles["viewer"].range_key == "domain_key"
    error_message = "the keys are not those of the contract"
  }

  assert {
    condition     = toset([for attribute in aws_dynamodb_table.profiles["viewer"].attribute : "${attribute.name} ${attribute.type}"]) == toset(["viewer_id N", "domain_key S"])
    error_message = "the key types are not those of the contract"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].billing_mode == "PAY_PER_REQUEST" && length(aws_appautoscaling_target.profiles) == 0
    error_message = "on demand is not the default"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].point_in_time_recovery[0].enabled && aws_dynamodb_table.profiles["viewer"].point_in_time_recovery[0].recovery_period_in_days == 35
    error_message = "point-in-time recovery is not on for 35 days"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].deletion_protection_enabled && !aws_s3_bucket.lake.force_destroy
    error_message = "deletion protection is not the default"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].server_side_encryption[0].enabled && length(aws_kms_key.platform) == 1 && aws_kms_key.platform[0].enable_key_rotation
    error_message = "a rotated customer key is not the default"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].tags["prefs:contract-version"] == tostring(local.contract.version)
    error_message = "the contract version is not on the table"
  }
}

run "ttl_follows_the_contract" {
  command = plan

  variables {
    registry_file = "./tests/registry_with_ttl.json"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["subject"].ttl[0].attribute_name == "expires_at" && aws_dynamodb_table.profiles["subject"].ttl[0].enabled
    error_message = "the TTL attribute of the contract is not set"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["subject"].name == "prod-profiles_v2" && aws_dynamodb_table.profiles["subject"].hash_key == "subject"
    error_message = "name and key do not come from the contract"
  }
}

run "each_entity_has_its_table" {
  command = plan

  variables {
    registry_file = "./tests/registry_with_three_tables.json"
    capacity      = { mode = "provisioned", read_min = 5, read_max = 50, write_min = 10, write_max = 100 }
  }

  assert {
    condition     = { for entity, table in aws_dynamodb_table.profiles : entity => "${table.name} ${table.hash_key}" } == { viewer = "prod-viewer_profiles viewer_id", shop_item = "prod-item_profiles item_id", enrolment = "prod-enrolment_profiles learner_id" }
    error_message = "the tables are not those of the contract"
  }

  assert {
    condition     = toset([for attribute in aws_dynamodb_table.profiles["shop_item"].attribute : "${attribute.name} ${attribute.type}"]) == toset(["item_id S", "domain_key S"])
    error_message = "a text key is not a text"
  }

  # The rest of a composite key is a part of the sort key, and an attribute without an index must not be declared.
  assert {
    condition     = toset([for attribute in aws_dynamodb_table.profiles["enrolment"].attribute : "${attribute.name} ${attribute.type}"]) == toset(["learner_id S", "domain_key S"]) && aws_dynamodb_table.profiles["enrolment"].range_key == "domain_key"
    error_message = "a composite key is not its first column and the domain"
  }

  assert {
    condition     = output.table_names == { viewer = "prod-viewer_profiles", shop_item = "prod-item_profiles", enrolment = "prod-enrolment_profiles" }
    error_message = "an entity is missing among the outputs"
  }

  assert {
    condition     = length(aws_dynamodb_table.profiles["viewer"].ttl) == 0 && aws_dynamodb_table.profiles["shop_item"].ttl[0].attribute_name == "expires_at"
    error_message = "the TTL of one table is that of another"
  }

  assert {
    condition     = toset(keys(aws_appautoscaling_policy.profiles)) == toset(["viewer/read", "viewer/write", "shop_item/read", "shop_item/write", "enrolment/read", "enrolment/write"])
    error_message = "a table is not scaled"
  }

  assert {
    condition     = { for alarm in concat(values(aws_cloudwatch_metric_alarm.throttles), values(aws_cloudwatch_metric_alarm.read_latency)) : alarm.alarm_name => alarm.dimensions.TableName } == merge([for entity, table in { viewer = "prod-viewer_profiles", shop_item = "prod-item_profiles", enrolment = "prod-enrolment_profiles" } : { for name in ["read-throttles", "write-throttles", "read-latency-getitem", "read-latency-batchgetitem"] : "prod-prefs-${name}-${entity}" => table }]...)
    error_message = "a table is not watched"
  }

  assert {
    condition     = alltrue([for policy in [data.aws_iam_policy_document.sink_writer, data.aws_iam_policy_document.serving_reader, data.aws_iam_policy_document.freshness_reader, data.aws_iam_policy_document.provisioner, data.aws_iam_policy_document.eraser] : toset(policy.statement[0].resources) == toset(values(local.table_arns))])
    error_message = "an actor may use one of the tables only"
  }
}

run "accepts_one_day_of_recovery" {
  command = plan

  variables {
    point_in_time_recovery_days = 1
  }
}

run "protection_can_be_lifted" {
  command = plan

  variables {
    deletion_protection = false
  }

  assert {
    condition     = !aws_dynamodb_table.profiles["viewer"].deletion_protection_enabled && aws_s3_bucket.lake.force_destroy
    error_message = "protection of table and lake is not lifted together"
  }
}

run "accepts_an_existing_key" {
  command = plan

  variables {
    encryption_key = "arn:aws:kms:eu-central-1:123456789012:key/1885ee54-b245-4c41-92d4-7c12d17a017d"
  }

  assert {
    condition     = length(aws_kms_key.platform) == 0 && aws_dynamodb_table.profiles["viewer"].server_side_encryption[0].kms_key_arn == var.encryption_key
    error_message = "the table does not use the given key"
  }

  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.lake.rule).apply_server_side_encryption_by_default[0].kms_master_key_id == var.encryption_key
    error_message = "the lake does not use the given key"
  }
}

run "accepts_keys_managed_by_aws" {
  command = plan

  variables {
    encryption_key = "aws"
  }

  assert {
    condition     = length(aws_kms_key.platform) == 0 && aws_dynamodb_table.profiles["viewer"].server_side_encryption[0].enabled
    error_message = "the table is not encrypted with a KMS key"
  }

  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.lake.rule).apply_server_side_encryption_by_default[0].sse_algorithm == "AES256"
    error_message = "the lake is not encrypted"
  }

  assert {
    condition     = alltrue([for document in [data.aws_iam_policy_document.sink_writer, data.aws_iam_policy_document.exporter] : !anytrue([for statement in document.statement : anytrue([for action in statement.actions : startswith(action, "kms:")])])])
    error_message = "a policy names a key that there is not"
  }
}

run "lake_is_closed" {
  command = plan

  variables {
    lake_noncurrent_days   = 7
    lake_access_log_bucket = "acme-logs"
  }

  assert {
    condition     = aws_s3_bucket_public_access_block.lake.block_public_acls && aws_s3_bucket_public_access_block.lake.block_public_policy && aws_s3_bucket_public_access_block.lake.ignore_public_acls && aws_s3_bucket_public_access_block.lake.restrict_public_buckets
    error_message = "public access is not blocked"
  }

  assert {
    condition     = length(aws_s3_bucket_policy.lake) == 1
    error_message = "the lake answers without TLS"
  }
  assert {
    condition     = aws_s3_bucket_versioning.lake.versioning_configuration[0].status == "Enabled"
    error_message = "versioning is off"
  }

  assert {
    condition     = [for rule in aws_s3_bucket_lifecycle_configuration.lake.rule : rule.noncurrent_version_expiration[0].noncurrent_days if rule.id == "old-versions"] == [7]
    error_message = "old versions are not removed after the days given"
  }

  assert {
    condition     = alltrue([for rule in aws_s3_bucket_lifecycle_configuration.lake.rule : length(rule.transition) == 0 && alltrue([for expiration in rule.expiration : expiration.date == null && expiration.expired_object_delete_marker])])
    error_message = "a rule removes current objects by age"
  }

  assert {
    condition     = aws_s3_bucket_logging.lake[0].target_bucket == "acme-logs"
    error_message = "access is not logged"
  }
}

# Each run below gives every variable in it a value that its rule must refuse; a value that passes fails the run.

run "refuses_bad_values_1" {
  command = plan

  variables {
    # capacity refuses contract with unknown key type
    registry_file = "./tests/registry_with_bad_key.json"
  }

  expect_failures = [aws_dynamodb_table.profiles["subject"]]
}

run "accepts_provisioned_capacity" {
  command = plan

  variables {
    capacity = { mode = "provisioned", read_min = 5, read_max = 100, write_min = 10, write_max = 1000, target_utilisation = 60 }
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].billing_mode == "PROVISIONED" && aws_dynamodb_table.profiles["viewer"].read_capacity == 5 && aws_dynamodb_table.profiles["viewer"].write_capacity == 10
    error_message = "the table does not start at the minimum"
  }

  assert {
    condition     = aws_appautoscaling_target.profiles["viewer/write"].max_capacity == 1000 && aws_appautoscaling_target.profiles["viewer/read"].min_capacity == 5
    error_message = "the range does not scale"
  }

  assert {
    condition     = alltrue([for policy in aws_appautoscaling_policy.profiles : policy.target_tracking_scaling_policy_configuration[0].target_value == 60])
    error_message = "the target utilisation is not used"
  }
}

run "accepts_on_demand_maxima" {
  command = plan

  variables {
    capacity = { read_max = 1000, write_max = 2000 }
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].on_demand_throughput[0].max_read_request_units == 1000 && aws_dynamodb_table.profiles["viewer"].on_demand_throughput[0].max_write_request_units == 2000
    error_message = "the maxima do not cap the table"
  }
}

run "refuses_capacity_of_unknown_mode" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    capacity = { mode = "ondemand" }
    # point_in_time_recovery_days of 0
    point_in_time_recovery_days = 0
    # encryption_key that is an alias
    encryption_key = "alias/prefs"
    # lake_noncurrent_days of 0
    lake_noncurrent_days = 0
    # lake_access_log_bucket as uri
    lake_access_log_bucket = "s3://acme-logs"
  }

  expect_failures = [var.capacity, var.point_in_time_recovery_days, var.encryption_key, var.lake_noncurrent_days, var.lake_access_log_bucket]
}

run "refuses_bad_values_2" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # capacity without all limits
    capacity = { mode = "provisioned", read_min = 1, read_max = 2, write_min = 1 }
    # point_in_time_recovery_days of 36
    point_in_time_recovery_days = 36
    # encryption_key that is a word
    encryption_key = "customer"
    # lake_noncurrent_days of 366
    lake_noncurrent_days = 366
    # lake_access_log_bucket in capitals
    lake_access_log_bucket = "Logs"
  }

  expect_failures = [var.capacity, var.point_in_time_recovery_days, var.encryption_key, var.lake_noncurrent_days, var.lake_access_log_bucket]
}

run "refuses_bad_values_3" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # capacity with minimum on demand
    capacity = { read_min = 5 }
    # point_in_time_recovery_days of a fraction
    point_in_time_recovery_days = 1.5
    # encryption_key of another region
    encryption_key = "arn:aws:kms:eu-west-1:123456789012:key/1885ee54-b245-4c41-92d4-7c12d17a017d"
    # lake_noncurrent_days of a fraction
    lake_noncurrent_days = 7.5
  }

  expect_failures = [var.capacity, var.point_in_time_recovery_days, var.encryption_key, var.lake_noncurrent_days]
}

run "refuses_bad_values_4" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # capacity of zero
    capacity = { mode = "provisioned", read_min = 0, read_max = 2, write_min = 1, write_max = 2 }
    # encryption_key empty
    encryption_key = ""
  }

  expect_failures = [var.capacity, var.encryption_key]
}

run "refuses_bad_values_5" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # capacity that is broken
    capacity = { read_max = 1.5 }
  }

  expect_failures = [var.capacity]
}

run "refuses_bad_values_6" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # capacity with minimum above maximum
    capacity = { mode = "provisioned", read_min = 1, read_max = 2, write_min = 3, write_max = 2 }
  }

  expect_failures = [var.capacity]
}

run "refuses_bad_values_7" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # capacity with utilisation of 95
    capacity = { target_utilisation = 95 }
  }

  expect_failures = [var.capacity]
}

run "refuses_bad_values_8" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # capacity with utilisation of 10
    capacity = { target_utilisation = 10 }
  }

  expect_failures = [var.capacity]
}
