locals {
  provisioned = var.capacity.mode == "provisioned"
  key_types   = { for entity, table in local.tables : entity => { for key in [table.partition_key, table.sort_key] : key.name => key.type } }
}

# One table for each entity of the contract.
resource "aws_dynamodb_table" "profiles" {
  for_each = local.tables

  name         = local.table_names[each.key]
  billing_mode = local.provisioned ? "PROVISIONED" : "PAY_PER_REQUEST"
  hash_key     = each.value.partition_key.name
  range_key    = each.value.sort_key.name

  read_capacity  = local.provisioned ? var.capacity.read_min : null
  write_capacity = local.provisioned ? var.capacity.write_min : null

  deletion_protection_enabled = var.deletion_protection

  dynamic "attribute" {
    for_each = local.key_types[each.key]
    content {
      name = attribute.key
      type = attribute.value
    }
  }

  dynamic "on_demand_throughput" {
    for_each = !local.provisioned && (var.capacity.read_max != null || var.capacity.write_max != null) ? [var.capacity] : []
    content {
      max_read_request_units  = on_demand_throughput.value.read_max
      max_write_request_units = on_demand_throughput.value.write_max
    }
  }

  dynamic "ttl" {
    for_each = each.value.ttl_attribute == null ? [] : [each.value.ttl_attribute]
    content {
      attribute_name = ttl.value
      enabled        = true
    }
  }

  point_in_time_recovery {
    enabled                 = true
    recovery_period_in_days = var.point_in_time_recovery_days
  }

  # Without a customer key this means the key aws/dynamodb, never the unaudited one that DynamoDB owns.
  server_side_encryption {
    enabled     = true
    kms_key_arn = local.key_arn
  }

  # The platform's verification refuses a contract newer than the one the table was last applied for.
  tags = { "prefs:contract-version" = tostring(local.contract.version) }

  lifecycle {
    # Auto-scaling moves these all day; without this each plan would set them back.
    ignore_changes = [read_capacity, write_capacity]

    precondition {
      condition     = alltrue([for type in values(local.key_types[each.key]) : contains(["N", "S", "B"], type)])
      error_message = "the contract gives a key of ${each.value.name} a type other than N, S or B, which DynamoDB does not know: correct the contract."
    }
  }
}

locals {
  scaled = local.provisioned ? {
    read  = { min = var.capacity.read_min, max = var.capacity.read_max, dimension = "dynamodb:table:ReadCapacityUnits", metric = "DynamoDBReadCapacityUtilization" }
    write = { min = var.capacity.write_min, max = var.capacity.write_max, dimension = "dynamodb:table:WriteCapacityUnits", metric = "DynamoDBWriteCapacityUtilization" }
  } : {}
  scaled_tables = { for pair in setproduct(keys(local.tables), keys(local.scaled)) :
  join("/", pair) => merge(local.scaled[pair[1]], { entity = pair[0], kind = pair[1] }) }
}

resource "aws_appautoscaling_target" "profiles" {
  for_each = local.scaled_tables

  service_namespace  = "dynamodb"
  resource_id        = "table/${aws_dynamodb_table.profiles[each.value.entity].name}"
  scalable_dimension = each.value.dimension
  min_capacity       = each.value.min
  max_capacity       = each.value.max
}

resource "aws_appautoscaling_policy" "profiles" {
  for_each = local.scaled_tables

  name               = "${local.table_names[each.value.entity]}-${each.value.kind}"
  policy_type        = "TargetTrackingScaling"
  service_namespace  = aws_appautoscaling_target.profiles[each.key].service_namespace
  resource_id        = aws_appautoscaling_target.profiles[each.key].resource_id
  scalable_dimension = aws_appautoscaling_target.profiles[each.key].scalable_dimension

  target_tracking_scaling_policy_configuration {
    target_value = var.capacity.target_utilisation

    predefined_metric_specification {
      predefined_metric_type = each.value.metric
    }
  }
}

# A deployment from before tables had entities keeps the table of the shipped example's viewers, and its scaling.
moved {
  from = aws_dynamodb_table.profiles
  to   = aws_dynamodb_table.profiles["viewer"]
}

moved {
  from = aws_appautoscaling_target.profiles["read"]
  to   = aws_appautoscaling_target.profiles["viewer/read"]
}

moved {
  from = aws_appautoscaling_target.profiles["write"]
  to   = aws_appautoscaling_target.profiles["viewer/write"]
}

moved {
  from = aws_appautoscaling_policy.profiles["read"]
  to   = aws_appautoscaling_policy.profiles["viewer/read"]
}

moved {
  from = aws_appautoscaling_policy.profiles["write"]
  to   = aws_appautoscaling_policy.profiles["viewer/write"]
}
