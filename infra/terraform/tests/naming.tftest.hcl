# Every rule of naming and placement: a value that passes and values that are refused, against a mocked provider (offline).

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

run "names_follow_the_environment" {
  command = plan

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].name == "prod-viewer_profiles"
    error_message = "the table is not <prefix><contract name>"
  }

  assert {
    condition     = aws_s3_bucket.lake.bucket == "prod-prefs-lake-123456789012-eu-central-1"
    error_message = "the bucket does not carry prefix, account and region"
  }

  assert {
    condition     = aws_glue_catalog_database.training.name == "prod_training"
    error_message = "the namespace does not follow the prefix"
  }

  assert {
    condition     = alltrue([for actor, role in aws_iam_role.actor : role.name == "prod-prefs-${actor}"])
    error_message = "a role does not carry the prefix"
  }

  assert {
    condition     = length(aws_iam_role.actor) == 6
    error_message = "there is not one role per actor"
  }

  assert {
    condition = output.env == <<-EOT
    AWS_REGION=eu-central-1
    PREFS_ENGINE=risingwave
    PREFS_ICEBERG_CATALOG=glue
    PREFS_ICEBERG_NAMESPACE=prod_training
    PREFS_ICEBERG_WAREHOUSE=s3://prod-prefs-lake-123456789012-eu-central-1/warehouse
    PREFS_PROVISIONING=verify
    PREFS_TABLE_PREFIX=prod-
    EOT

    error_message = "env is not the environment that the platform reads"
  }
}

run "environments_do_not_meet" {
  command = plan

  variables {
    environment = "staging"
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].name == "staging-viewer_profiles" && aws_cloudwatch_dashboard.platform.dashboard_name == "staging-prefs"
    error_message = "a second environment shares a name with the first"
  }
}

run "empty_prefix_gives_bare_names" {
  command = plan

  variables {
    prefix = ""
  }

  assert {
    condition     = aws_dynamodb_table.profiles["viewer"].name == "viewer_profiles" && aws_glue_catalog_database.training.name == "training"
    error_message = "an empty prefix does not give the bare names"
  }
}

run "accepts_own_names" {
  command = plan

  variables {
    environment       = "a"
    prefix            = "eu1-blue-"
    region            = "us-gov-west-1"
    tags              = { team = "ranking", "cost:center" = "12 34" }
    lake_bucket_name  = "acme-lake"
    iceberg_namespace = "tiles_v2"
  }

  assert {
    condition     = aws_s3_bucket.lake.bucket == "acme-lake" && output.iceberg_warehouse == "s3://acme-lake/warehouse"
    error_message = "the bucket name is not used"
  }

  assert {
    condition     = output.iceberg_namespace == "tiles_v2"
    error_message = "the namespace is not used"
  }

  assert {
    condition     = local.tags["team"] == "ranking" && local.tags["prefs:environment"] == "a"
    error_message = "the tags are not kept"
  }
}

run "accepts_endpoint_url" {
  command = plan

  variables {
    endpoint_url = "http://127.0.0.1:54330"
    engine       = "local"
  }

  assert {
    condition     = length(aws_s3_bucket_policy.lake) == 0
    error_message = "a server without TLS is asked for TLS"
  }
  assert {
    condition     = strcontains(output.env, "AWS_ENDPOINT_URL=http://127.0.0.1:54330\n") && strcontains(output.env, "PREFS_ENGINE=local\n")
    error_message = "env does not lead to the local AWS server"
  }
}

# Each run below gives every variable in it a value that its rule must refuse; a value that passes fails the run.
# It plans the variables alone, ./tests/variables being a link to the module's: no resource has a part in the rules.

run "refuses_bad_values_1" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment empty
    environment = ""
    # region empty
    region = ""
    # prefix without hyphen at end
    prefix = "prod"
    # tags reserved by aws
    tags = { "AWS:team" = "x" }
    # lake_bucket_name too short
    lake_bucket_name = "ab"
    # iceberg_namespace with hyphen
    iceberg_namespace = "tiles-v2"
    # endpoint_url without scheme
    endpoint_url = "127.0.0.1:54330"
    # registry_file that is missing
    registry_file = "./no/such/registry.json"
  }

  expect_failures = [var.environment, var.region, var.prefix, var.tags, var.lake_bucket_name, var.iceberg_namespace, var.endpoint_url, var.registry_file]
}

run "refuses_bad_values_2" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment with trailing blank
    environment = "prod "
    # region with trailing blank
    region = "eu-central-1 "
    # prefix with blank
    prefix = "prod -"
    # tags reserved here
    tags = { "prefs:environment" = "x" }
    # lake_bucket_name with dot
    lake_bucket_name = "acme.lake"
    # iceberg_namespace in capitals
    iceberg_namespace = "Tiles"
    # endpoint_url with path
    endpoint_url = "http://127.0.0.1:54330/x"
  }

  expect_failures = [var.environment, var.region, var.prefix, var.tags, var.lake_bucket_name, var.iceberg_namespace, var.endpoint_url]
}

run "refuses_bad_values_3" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment with leading blank
    environment = " prod"
    # region that is a zone
    region = "eu-central-1a"
    # prefix with trailing blank
    prefix = "prod- "
    # tags with bad key
    tags = { "team name" = "x" }
    # lake_bucket_name in capitals
    lake_bucket_name = "Lake"
    # iceberg_namespace with leading digit
    iceberg_namespace = "2tiles"
    # endpoint_url with blank
    endpoint_url = "http://127.0.0.1:54330 "
  }

  expect_failures = [var.environment, var.region, var.prefix, var.tags, var.lake_bucket_name, var.iceberg_namespace, var.endpoint_url]
}

run "refuses_bad_values_4" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment in capitals
    environment = "Prod"
    # region in words
    region = "Frankfurt"
    # prefix with dot
    prefix = "prod.-"
    # tags with blank at end
    tags = { team = "x " }
    # lake_bucket_name as uri
    lake_bucket_name = "s3://acme-lake"
    # iceberg_namespace empty
    iceberg_namespace = ""
    # endpoint_url empty
    endpoint_url = ""
  }

  expect_failures = [var.environment, var.region, var.prefix, var.tags, var.lake_bucket_name, var.iceberg_namespace, var.endpoint_url]
}

run "refuses_bad_values_5" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment with trailing hyphen
    environment = "prod-"
    # prefix in capitals
    prefix = "PROD-"
    # tags with line break
    tags = { team = "x\ny" }
    # lake_bucket_name with hyphen at end
    lake_bucket_name = "acme-"
  }

  expect_failures = [var.environment, var.prefix, var.tags, var.lake_bucket_name]
}

run "refuses_bad_values_6" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment with leading digit
    environment = "1prod"
    # prefix of a hyphen
    prefix = "-"
    # tags more than 40
    tags = { for number in range(41) : "tag${number}" => "x" }
  }

  expect_failures = [var.environment, var.prefix, var.tags]
}

run "refuses_bad_values_7" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment of 21 characters
    environment = "abcdefghijklmnopqrstu"
    # prefix of 25 characters
    prefix = "abcdefghijklmnopqrstuvwx-"
  }

  expect_failures = [var.environment, var.prefix]
}

run "refuses_bad_values_8" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment with underscore
    environment = "pre_prod"
  }

  expect_failures = [var.environment]
}

run "refuses_bad_values_9" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # environment missing, in the default workspace
    environment = null
  }

  expect_failures = [var.environment]
}
