locals {
  # What the platform and its clients call.
  read_operations  = ["GetItem", "BatchGetItem"]
  write_operations = ["BatchWriteItem", "PutItem", "DeleteItem"]
  operations       = concat(local.read_operations, local.write_operations, ["Scan"])

  # What each alarm means and what to do about it: docs/operations.md.
  throttles = {
    read-throttles  = { metric = "ReadThrottleEvents", what = "Reads", text = "throttled: profiles come late or not at all." }
    write-throttles = { metric = "WriteThrottleEvents", what = "Writes", text = "throttled: the sinks fall behind, profiles grow stale." }
  }

  # An alarm looks at one table, and ten metrics at most.
  table_throttles = { for pair in setproduct(keys(local.tables), keys(local.throttles)) :
  join("/", pair) => merge(local.throttles[pair[1]], { entity = pair[0], alarm = pair[1] }) }
  table_reads = { for pair in setproduct(keys(local.tables), local.read_operations) :
  join("/", pair) => { entity = pair[0], operation = pair[1] } }
}

resource "aws_cloudwatch_metric_alarm" "throttles" {
  for_each = local.table_throttles

  alarm_name          = "${local.prefix}prefs-${each.value.alarm}-${each.value.entity}"
  alarm_description   = "${each.value.what} of ${local.table_names[each.value.entity]} are ${each.value.text}"
  namespace           = "AWS/DynamoDB"
  metric_name         = each.value.metric
  dimensions          = { TableName = aws_dynamodb_table.profiles[each.value.entity].name }
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
  for_each = local.table_names

  alarm_name          = "${local.prefix}prefs-system-errors-${each.key}"
  alarm_description   = "DynamoDB answers requests to ${each.value} with server errors."
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
        dimensions  = { TableName = aws_dynamodb_table.profiles[each.key].name, Operation = metric_query.value }
        stat        = "Sum"
        period      = 60
      }
    }
  }
}

resource "aws_cloudwatch_metric_alarm" "read_latency" {
  for_each = local.table_reads

  alarm_name          = "${local.prefix}prefs-read-latency-${lower(each.value.operation)}-${each.value.entity}"
  alarm_description   = "The slowest 1 % of ${each.value.operation} on ${local.table_names[each.value.entity]} exceed the threshold inside DynamoDB."
  namespace           = "AWS/DynamoDB"
  metric_name         = "SuccessfulRequestLatency"
  dimensions          = { TableName = aws_dynamodb_table.profiles[each.value.entity].name, Operation = each.value.operation }
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
  alarm_description   = "DynamoDB rejects requests of this account as invalid; a sink whose batch is rejected stands still for everybody."
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
    [for alarm in aws_cloudwatch_metric_alarm.system_errors : alarm.arn],
    [aws_cloudwatch_metric_alarm.rejected_requests.arn],
    [for alarm in aws_cloudwatch_metric_alarm.read_latency : alarm.arn],
  )

  charts = [
    {
      title = "Requests throttled"
      metrics = [for pair in setproduct(values(local.table_names), ["ReadThrottleEvents", "WriteThrottleEvents"]) :
      ["AWS/DynamoDB", pair[1], "TableName", pair[0], { stat = "Sum" }]]
    },
    {
      title = "Capacity consumed"
      metrics = [for pair in setproduct(values(local.table_names), ["ConsumedReadCapacityUnits", "ConsumedWriteCapacityUnits"]) :
      ["AWS/DynamoDB", pair[1], "TableName", pair[0], { stat = "Sum" }]]
    },
    {
      title = "Read latency, ms"
      metrics = [for part in setproduct(values(local.table_names), local.read_operations, ["p50", "p99"]) :
      ["AWS/DynamoDB", "SuccessfulRequestLatency", "TableName", part[0], "Operation", part[1], { stat = part[2], label = "${part[0]} ${part[1]} ${part[2]}" }]]
    },
    {
      title = "Write latency, ms"
      metrics = [for part in setproduct(values(local.table_names), local.write_operations, ["p50", "p99"]) :
      ["AWS/DynamoDB", "SuccessfulRequestLatency", "TableName", part[0], "Operation", part[1], { stat = part[2], label = "${part[0]} ${part[1]} ${part[2]}" }]]
    },
    {
      title = "Server errors and rejected requests"
      metrics = concat(
        [for pair in setproduct(values(local.table_names), local.operations) : ["AWS/DynamoDB", "SystemErrors", "TableName", pair[0], "Operation", pair[1], { stat = "Sum" }]],
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
