# Every rule of access, observability and the platform environment: a value that passes and values that are refused, against a mocked provider (offline).

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

run "actors_trust_the_account_by_default" {
  command = plan

  assert {
    condition     = alltrue([for document in data.aws_iam_policy_document.trust : one(one(document.statement).principals).identifiers == toset(["arn:aws:iam::123456789012:root"])])
    error_message = "an actor trusts somebody else than this account"
  }

  assert {
    condition     = length(aws_iam_instance_profile.actor) == 0
    error_message = "an instance profile is made unasked"
  }
}

run "trust_follows_the_variable" {
  command = plan

  variables {
    eks_oidc_provider_arn    = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"
    permissions_boundary_arn = "arn:aws:iam::123456789012:policy/boundary"
    trust = {
      exporter       = { service_accounts = ["prefs:exporter", "prefs:backfill"] }
      serving-reader = { ec2 = true, principals = ["210987654321", "arn:aws:iam::210987654321:role/api"], external_id = "ranking" }
    }
  }

  assert {
    condition     = toset([for condition in one(data.aws_iam_policy_document.trust["exporter"].statement).condition : condition.variable]) == toset(["oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE:sub", "oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE:aud"])
    error_message = "service accounts are not bound by subject and audience"
  }

  assert {
    condition     = length(data.aws_iam_policy_document.trust["serving-reader"].statement) == 2 && keys(aws_iam_instance_profile.actor) == ["serving-reader"]
    error_message = "EC2 and principals are not both trusted"
  }

  assert {
    condition     = alltrue([for role in aws_iam_role.actor : role.permissions_boundary == "arn:aws:iam::123456789012:policy/boundary"])
    error_message = "a role is without the boundary"
  }
}

run "accepts_alarm_topics" {
  command = plan

  variables {
    alarm_topic_arns = ["arn:aws:sns:eu-central-1:123456789012:prefs-alarms"]
    alarm_thresholds = { throttled_per_minute = 5, read_latency_p99_milliseconds = 12.5 }
  }

  assert {
    condition     = alltrue([for alarm in concat(values(aws_cloudwatch_metric_alarm.throttles), values(aws_cloudwatch_metric_alarm.read_latency), values(aws_cloudwatch_metric_alarm.system_errors), [aws_cloudwatch_metric_alarm.rejected_requests]) : alarm.alarm_actions == var.alarm_topic_arns && alarm.ok_actions == var.alarm_topic_arns])
    error_message = "an alarm notifies nobody"
  }

  assert {
    condition     = alltrue([for alarm in aws_cloudwatch_metric_alarm.throttles : alarm.threshold == 5]) && alltrue([for alarm in aws_cloudwatch_metric_alarm.read_latency : alarm.threshold == 12.5 && alarm.extended_statistic == "p99"])
    error_message = "the thresholds are not used"
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.rejected_requests.metric_name == "UserErrors" && aws_cloudwatch_metric_alarm.rejected_requests.threshold == 10
    error_message = "rejected writes are not watched"
  }
}

run "hands_settings_through" {
  command = plan

  variables {
    platform_environment = { PREFS_ENGINE_HOST = "risingwave.internal", PREFS_KAFKA_BOOTSTRAP = "a:9092,b:9092" }
  }

  assert {
    condition     = strcontains(output.env, "PREFS_ENGINE_HOST=risingwave.internal\n") && strcontains(output.env, "PREFS_KAFKA_BOOTSTRAP=a:9092,b:9092\n")
    error_message = "a setting is lost"
  }
}

# Each run below gives every variable in it a value that its rule must refuse; a value that passes fails the run.
# It plans the variables alone, ./tests/variables being a link to the module's: no resource has a part in the rules.
# trust looks at eks_oidc_provider_arn, so the two are never bad together.

run "refuses_bad_values_1" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust of unknown actor
    trust = { writer = { ec2 = true } }
    # permissions_boundary_arn that is a name
    permissions_boundary_arn = "boundary"
    # alarm_topic_arns that are names
    alarm_topic_arns = ["prefs-alarms"]
    # alarm_thresholds of 0
    alarm_thresholds = { rejected_per_minute = 0 }
    # engine that is unknown
    engine = "flink"
    # platform_environment with foreign name
    platform_environment = { PATH = "x" }
  }

  expect_failures = [var.trust, var.permissions_boundary_arn, var.alarm_topic_arns, var.alarm_thresholds, var.engine, var.platform_environment]
}

run "refuses_bad_values_2" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust of nobody
    trust = { exporter = {} }
    # alarm_topic_arns that are addresses
    alarm_topic_arns = ["someone@example.com"]
    # alarm_thresholds below 0
    alarm_thresholds = { read_latency_p99_milliseconds = -1 }
    # engine that is local without endpoint
    engine = "local"
    # platform_environment in small letters
    platform_environment = { prefs_engine_host = "x" }
  }

  expect_failures = [var.trust, var.alarm_topic_arns, var.alarm_thresholds, var.engine, var.platform_environment]
}

run "refuses_bad_values_3" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust of any account
    trust = { exporter = { principals = ["*"] } }
    # alarm_topic_arns more than 5
    alarm_topic_arns = [for number in range(6) : "arn:aws:sns:eu-central-1:123456789012:topic${number}"]
    # platform_environment with a password
    platform_environment = { PREFS_ENGINE_PASSWORD = "x" }
  }

  expect_failures = [var.trust, var.alarm_topic_arns, var.platform_environment]
}

run "refuses_bad_values_4" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust of any role
    trust = { exporter = { principals = ["arn:aws:iam::123456789012:role/*"] } }
    # platform_environment that contradicts
    platform_environment = { PREFS_TABLE_PREFIX = "other-" }
  }

  expect_failures = [var.trust, var.platform_environment]
}

run "refuses_bad_values_5" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust of short account
    trust = { exporter = { principals = ["12345678901"] } }
    # platform_environment with line break
    platform_environment = { PREFS_ENGINE_HOST = "a\nPREFS_ENGINE=local" }
  }

  expect_failures = [var.trust, var.platform_environment]
}

run "refuses_bad_values_6" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust with external id for ec2
    trust = { exporter = { ec2 = true, external_id = "x-1" } }
    # platform_environment with trailing blank
    platform_environment = { PREFS_ENGINE_HOST = "a " }
  }

  expect_failures = [var.trust, var.platform_environment]
}

run "refuses_bad_values_7" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust with short external id
    trust = { exporter = { principals = ["210987654321"], external_id = "x" } }
    # platform_environment with dollar
    platform_environment = { PREFS_ENGINE_HOST = "$HOME" }
  }

  expect_failures = [var.trust, var.platform_environment]
}

run "refuses_bad_values_8" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    eks_oidc_provider_arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"
    # trust of any service account
    trust = { exporter = { service_accounts = ["prefs:*"] } }
    # platform_environment empty
    platform_environment = { PREFS_ENGINE_HOST = "" }
  }

  expect_failures = [var.trust, var.platform_environment]
}

run "refuses_bad_values_9" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    eks_oidc_provider_arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"
    # trust of service account without namespace
    trust = { exporter = { service_accounts = ["exporter"] } }
  }

  expect_failures = [var.trust]
}

run "refuses_bad_values_10" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    eks_oidc_provider_arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"
    # trust of service account with blank
    trust = { exporter = { service_accounts = ["prefs:exporter "] } }
  }

  expect_failures = [var.trust]
}

run "refuses_bad_values_11" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # trust of service account without provider
    trust = { exporter = { service_accounts = ["prefs:exporter"] } }
  }

  expect_failures = [var.trust]
}

run "refuses_bad_eks_provider_1" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # eks_oidc_provider_arn that is an issuer
    eks_oidc_provider_arn = "https://oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED"
  }

  expect_failures = [var.eks_oidc_provider_arn]
}

run "refuses_bad_eks_provider_2" {
  command = plan

  module {
    source = "./tests/variables"
  }

  variables {
    # eks_oidc_provider_arn that is a role
    eks_oidc_provider_arn = "arn:aws:iam::123456789012:role/eks"
  }

  expect_failures = [var.eks_oidc_provider_arn]
}
