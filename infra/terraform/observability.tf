locals {
  # What the platform and its clients call.
  read_operations  = ["GetItem", "BatchGetItem"]
  write_operations = ["BatchWriteItem", "PutItem", "DeleteItem"]
  operations       = concat(local.read_operations, local.write_operations, ["Scan"])

  # What each alarm means and what to do about it: docs/operations.md.
  throttles = {
    read-throttles  = { metric = "ReadThrottleEvents", text = "Reads of ${local.table_name} are throttled: profiles come late or not at all." }
    write-throttles = { metric = "WriteThrottleEvents", text = "Writes of ${local.table_name} are throttled: the sinks fall behind, profiles grow stale." }
  }
}

resource "aws_cloudwatch_metric_alarm" "throttles" {
  for_each = local.throttles

  alarm_name          = "${local.prefix}prefs-${each.key}"
  alarm_description   = each.value.text
  namespace           = "AWS/DynamoDB"
  metric_name         = each.value.metric
  dimensions          = { TableName = aws_dynamodb_table.profiles.name }
  statistic           = "Sum"
  period              = 60
  evaluation_periods  = 5
  datapoints_to_alarm = 3
  comparison_operator = "GreaterThanOrEqualToThreshold"
  threshold           = var.alarm_thresholds.throttled_per_minute
  treat_missing_data  = "notBreaching"
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
}

# SystemErrors exists per operation only, so the alarm adds them up.
resource "aws_cloudwatch_metric_alarm" "system_errors" {
  alarm_name          = "${local.prefix}prefs-system-errors"
  alarm_description   = "DynamoDB answers requests to ${local.table_name} with server errors."
  evaluation_periods  = 1
  comparison_operator = "GreaterThanOrEqualToThreshold"
  threshold           = var.alarm_thresholds.system_errors_per_minute
  treat_missing_data  = "notBreaching"
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns

  metric_query {
    id          = "total"
    label       = "System errors"
    expression  = "SUM(METRICS())"
    return_data = true
  }

  dynamic "metric_query" {
    for_each = local.operations
    content {
      id          = lower(metric_query.value)
      return_data = false

      metric {
        namespace   = "AWS/DynamoDB"
        metric_name = "SystemErrors"
        dimensions  = { TableName = aws_dynamodb_table.profiles.name, Operation = metric_query.value }
        stat        = "Sum"
        period      = 60
      }
    }
  }
}

resource "aws_cloudwatch_metric_alarm" "read_latency" {
  for_each = toset(local.read_operations)

  alarm_name          = "${local.prefix}prefs-read-latency-${lower(each.key)}"
  alarm_description   = "The slowest 1 % of ${each.key} on ${local.table_name} exceed the threshold inside DynamoDB."
  namespace           = "AWS/DynamoDB"
  metric_name         = "SuccessfulRequestLatency"
  dimensions          = { TableName = aws_dynamodb_table.profiles.name, Operation = each.key }
  extended_statistic  = "p99"
  period              = 60
  evaluation_periods  = 5
  datapoints_to_alarm = 3
  comparison_operator = "GreaterThanThreshold"
  threshold           = var.alarm_thresholds.read_latency_p99_milliseconds
  treat_missing_data  = "notBreaching"
  # A percentile of a handful of requests says nothing.
  evaluate_low_sample_count_percentiles = "ignore"
  alarm_actions                         = var.alarm_topic_arns
  ok_actions                            = var.alarm_topic_arns
}

# One item with a NULL key makes DynamoDB reject a sink's batch for ever. The metric has no table
# dimension: it counts every rejected request of this account in this region.
resource "aws_cloudwatch_metric_alarm" "rejected_requests" {
  alarm_name          = "${local.prefix}prefs-rejected-writes"
  alarm_description   = "DynamoDB rejects requests of this account as invalid; a sink whose batch is rejected stands still for every viewer."
  namespace           = "AWS/DynamoDB"
  metric_name         = "UserErrors"
  statistic           = "Sum"
  period              = 60
  evaluation_periods  = 5
  datapoints_to_alarm = 3
  comparison_operator = "GreaterThanOrEqualToThreshold"
  threshold           = var.alarm_thresholds.rejected_per_minute
  treat_missing_data  = "notBreaching"
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
}

locals {
  alarm_arns = concat(
    [for alarm in aws_cloudwatch_metric_alarm.throttles : alarm.arn],
    [aws_cloudwatch_metric_alarm.system_errors.arn, aws_cloudwatch_metric_alarm.rejected_requests.arn],
    [for alarm in aws_cloudwatch_metric_alarm.read_latency : alarm.arn],
  )

  charts = [
    {
      title = "Requests throttled"
      metrics = [for metric in ["ReadThrottleEvents", "WriteThrottleEvents"] :
      ["AWS/DynamoDB", metric, "TableName", local.table_name, { stat = "Sum" }]]
    },
    {
      title = "Capacity consumed"
      metrics = [for metric in ["ConsumedReadCapacityUnits", "ConsumedWriteCapacityUnits"] :
      ["AWS/DynamoDB", metric, "TableName", local.table_name, { stat = "Sum" }]]
    },
    {
      title = "Read latency, ms"
      metrics = [for pair in setproduct(local.read_operations, ["p50", "p99"]) :
      ["AWS/DynamoDB", "SuccessfulRequestLatency", "TableName", local.table_name, "Operation", pair[0], { stat = pair[1], label = "${pair[0]} ${pair[1]}" }]]
    },
    {
      title = "Write latency, ms"
      metrics = [for pair in setproduct(local.write_operations, ["p50", "p99"]) :
      ["AWS/DynamoDB", "SuccessfulRequestLatency", "TableName", local.table_name, "Operation", pair[0], { stat = pair[1], label = "${pair[0]} ${pair[1]}" }]]
    },
    {
      title = "Server errors and rejected requests"
      metrics = concat(
        [for operation in local.operations : ["AWS/DynamoDB", "SystemErrors", "TableName", local.table_name, "Operation", operation, { stat = "Sum" }]],
        [["AWS/DynamoDB", "UserErrors", { stat = "Sum", label = "rejected, whole account" }]],
      )
    },
    {
      title = "Lake size, bytes"
      metrics = [
        ["AWS/S3", "BucketSizeBytes", "BucketName", local.bucket_name, "StorageType", "StandardStorage", { stat = "Average", period = 86400 }],
      ]
    },
  ]
}

resource "aws_cloudwatch_dashboard" "platform" {
  dashboard_name = "${local.prefix}prefs"

  dashboard_body = jsonencode({
    widgets = concat(
      [{
        type       = "alarm", x = 0, y = 0, width = 24, height = 3
        properties = { title = "Alarms", alarms = local.alarm_arns }
      }],
      [for index, chart in local.charts : {
        type       = "metric", x = (index % 2) * 12, y = 3 + floor(index / 2) * 6, width = 12, height = 6
        properties = { title = chart.title, region = var.region, period = 60, view = "timeSeries", metrics = chart.metrics }
      }],
    )
  })
}
