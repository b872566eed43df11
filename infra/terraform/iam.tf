locals {
  actors = {
    sink-writer      = "Writes profile items: the RisingWave sinks, the publisher, repairs."
    exporter         = "Writes training tiles to Iceberg: data files, metadata, Glue tables."
    serving-reader   = "Reads profile items by key: the services."
    freshness-reader = "Compares samples of the items with the views, and reads the snapshots' metadata."
    provisioner      = "Compares the tables with the contract; it cannot change them."
    eraser           = "Finds and deletes the items of one key, for a person who runs an erasure."
  }

  actor_policies = {
    sink-writer      = data.aws_iam_policy_document.sink_writer.json
    exporter         = data.aws_iam_policy_document.exporter.json
    serving-reader   = data.aws_iam_policy_document.serving_reader.json
    freshness-reader = data.aws_iam_policy_document.freshness_reader.json
    provisioner      = data.aws_iam_policy_document.provisioner.json
    eraser           = data.aws_iam_policy_document.eraser.json
  }

  account_trust = { service_accounts = [], ec2 = false, principals = [local.account_id], external_id = null }
  trust         = { for actor in keys(local.actors) : actor => lookup(var.trust, actor, local.account_trust) }

  oidc_issuer = var.eks_oidc_provider_arn == null ? "" : split("oidc-provider/", var.eks_oidc_provider_arn)[1]

  catalog_arns = [
    "arn:${local.partition}:glue:${var.region}:${local.account_id}:catalog",
    "arn:${local.partition}:glue:${var.region}:${local.account_id}:database/${local.namespace}",
    "arn:${local.partition}:glue:${var.region}:${local.account_id}:table/${local.namespace}/*",
  ]

  # DynamoDB and S3 use the key in the caller's name; used directly, outside of them, it stays shut.
  dynamodb_service = "dynamodb.${var.region}.amazonaws.com"
  s3_service       = "s3.${var.region}.amazonaws.com"
}

# --- trust ------------------------------------------------------------------------------------

data "aws_iam_policy_document" "trust" {
  for_each = local.trust

  dynamic "statement" {
    for_each = length(each.value.service_accounts) > 0 ? [each.value] : []
    content {
      sid     = "ServiceAccounts"
      actions = ["sts:AssumeRoleWithWebIdentity"]

      principals {
        type        = "Federated"
        identifiers = [var.eks_oidc_provider_arn]
      }

      condition {
        test     = "StringEquals"
        variable = "${local.oidc_issuer}:sub"
        values   = [for name in statement.value.service_accounts : "system:serviceaccount:${name}"]
      }

      condition {
        test     = "StringEquals"
        variable = "${local.oidc_issuer}:aud"
        values   = ["sts.amazonaws.com"]
      }
    }
  }

  dynamic "statement" {
    for_each = each.value.ec2 ? [each.value] : []
    content {
      sid     = "Instances"
      actions = ["sts:AssumeRole"]

      principals {
        type        = "Service"
        identifiers = ["ec2.amazonaws.com"]
      }
    }
  }

  dynamic "statement" {
    for_each = length(each.value.principals) > 0 ? [each.value] : []
    content {
      sid     = "Principals"
      actions = ["sts:AssumeRole"]

      principals {
        type        = "AWS"
        identifiers = [for name in statement.value.principals : startswith(name, "arn:") ? name : "arn:${local.partition}:iam::${name}:root"]
      }

      dynamic "condition" {
        for_each = statement.value.external_id == null ? [] : [statement.value.external_id]
        content {
          test     = "StringEquals"
          variable = "sts:ExternalId"
          values   = [condition.value]
        }
      }
    }
  }
}

resource "aws_iam_role" "actor" {
  for_each = local.actors

  name                 = "${local.prefix}prefs-${each.key}"
  description          = each.value
  assume_role_policy   = data.aws_iam_policy_document.trust[each.key].json
  permissions_boundary = var.permissions_boundary_arn
}

# Policies stand on their own, so that a process that plays several actors can attach several to one role.
resource "aws_iam_policy" "actor" {
  for_each = local.actors

  name        = "${local.prefix}prefs-${each.key}"
  description = each.value
  policy      = local.actor_policies[each.key]
}

resource "aws_iam_role_policy_attachment" "actor" {
  for_each = local.actors

  role       = aws_iam_role.actor[each.key].name
  policy_arn = aws_iam_policy.actor[each.key].arn
}

resource "aws_iam_instance_profile" "actor" {
  for_each = { for actor, trust in local.trust : actor => trust if trust.ec2 }

  name = aws_iam_role.actor[each.key].name
  role = aws_iam_role.actor[each.key].name
}

# --- permissions ------------------------------------------------------------------------------

data "aws_iam_policy_document" "sink_writer" {
  statement {
    sid = "WriteItems"
    # Sinks describe the table first, the publisher verifies it, and a repair writes single items under a
    # condition; none of them needs to read an item with this policy.
    actions = [
      "dynamodb:BatchWriteItem",
      "dynamodb:DeleteItem",
      "dynamodb:DescribeContinuousBackups",
      "dynamodb:DescribeTable",
      "dynamodb:DescribeTimeToLive",
      "dynamodb:ListTagsOfResource",
      "dynamodb:PutItem",
    ]
    resources = values(local.table_arns)
  }

  dynamic "statement" {
    for_each = local.has_key ? [local.key_arn] : []
    content {
      sid       = "UseKeyThroughDynamoDB"
      actions   = ["kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey", "kms:ReEncryptFrom", "kms:ReEncryptTo"]
      resources = [statement.value]

      condition {
        test     = "StringEquals"
        variable = "kms:ViaService"
        values   = [local.dynamodb_service]
      }
    }
  }
}

data "aws_iam_policy_document" "serving_reader" {
  statement {
    sid       = "ReadItemsByKey"
    actions   = ["dynamodb:BatchGetItem", "dynamodb:GetItem"]
    resources = values(local.table_arns)
  }

  dynamic "statement" {
    for_each = local.has_key ? [local.key_arn] : []
    content {
      sid       = "UseKeyThroughDynamoDB"
      actions   = ["kms:Decrypt", "kms:DescribeKey"]
      resources = [statement.value]

      condition {
        test     = "StringEquals"
        variable = "kms:ViaService"
        values   = [local.dynamodb_service]
      }
    }
  }
}

data "aws_iam_policy_document" "freshness_reader" {
  statement {
    sid = "SampleItems"
    actions = [
      "dynamodb:BatchGetItem",
      "dynamodb:DescribeContinuousBackups",
      "dynamodb:DescribeTable",
      "dynamodb:DescribeTimeToLive",
      "dynamodb:ListTagsOfResource",
    ]
    resources = values(local.table_arns)
  }

  # A page of keys shows items that no row of a view has; a scan for anything but keys stays shut.
  dynamic "statement" {
    for_each = local.tables
    content {
      sid       = "ListKeys${replace(title(replace(statement.key, "_", " ")), " ", "")}"
      actions   = ["dynamodb:Scan"]
      resources = [local.table_arns[statement.key]]

      condition {
        test     = "ForAllValues:StringEquals"
        variable = "dynamodb:Attributes"
        values   = [statement.value.partition_key.name, statement.value.sort_key.name]
      }

      # ForAllValues alone would also hold for a scan that names no attributes and so returns all.
      condition {
        test     = "Null"
        variable = "dynamodb:Attributes"
        values   = ["false"]
      }

      condition {
        test     = "StringEqualsIfExists"
        variable = "dynamodb:Select"
        values   = ["SPECIFIC_ATTRIBUTES"]
      }
    }
  }

  statement {
    sid = "FindCatalog"
    # Opening the catalog lists its databases, which Glue only allows over all of them.
    actions = ["glue:GetDatabases"]
    resources = [
      "arn:${local.partition}:glue:${var.region}:${local.account_id}:catalog",
      "arn:${local.partition}:glue:${var.region}:${local.account_id}:database/*",
    ]
  }

  statement {
    sid       = "ReadCatalog"
    actions   = ["glue:GetDatabase", "glue:GetTable", "glue:GetTables"]
    resources = local.catalog_arns
  }

  statement {
    sid       = "ReadSnapshotMetadata"
    actions   = ["s3:GetObject"]
    resources = ["${local.bucket_arn}/${local.warehouse_path}/*/metadata/*"]
  }

  dynamic "statement" {
    for_each = local.has_key ? [local.key_arn] : []
    content {
      sid       = "UseKeyThroughServices"
      actions   = ["kms:Decrypt", "kms:DescribeKey"]
      resources = [statement.value]

      condition {
        test     = "StringEquals"
        variable = "kms:ViaService"
        values   = [local.dynamodb_service, local.s3_service]
      }
    }
  }
}

data "aws_iam_policy_document" "exporter" {
  statement {
    sid       = "ReadAndWriteWarehouse"
    actions   = ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:ListMultipartUploadParts", "s3:PutObject"]
    resources = ["${local.bucket_arn}/${local.warehouse_path}/*"]
  }

  statement {
    sid       = "ListWarehouse"
    actions   = ["s3:ListBucket"]
    resources = [local.bucket_arn]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = [local.warehouse_path, "${local.warehouse_path}/*"]
    }
  }

  statement {
    sid       = "FindBucket"
    actions   = ["s3:GetBucketLocation"]
    resources = [local.bucket_arn]
  }

  statement {
    sid = "FindCatalog"
    # Opening the catalog lists its databases, which Glue only allows over all of them.
    actions = ["glue:GetDatabases"]
    resources = [
      "arn:${local.partition}:glue:${var.region}:${local.account_id}:catalog",
      "arn:${local.partition}:glue:${var.region}:${local.account_id}:database/*",
    ]
  }

  statement {
    sid = "CommitTables"
    # No DeleteTable: a training table is only ever removed by a person.
    actions   = ["glue:CreateTable", "glue:GetDatabase", "glue:GetTable", "glue:GetTables", "glue:UpdateTable"]
    resources = local.catalog_arns
  }

  dynamic "statement" {
    for_each = local.has_key ? [local.key_arn] : []
    content {
      sid       = "UseKeyThroughS3"
      actions   = ["kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKey"]
      resources = [statement.value]

      condition {
        test     = "StringEquals"
        variable = "kms:ViaService"
        values   = [local.s3_service]
      }
    }
  }
}

data "aws_iam_policy_document" "provisioner" {
  statement {
    sid = "VerifyTable"
    actions = [
      "dynamodb:DescribeContinuousBackups",
      "dynamodb:DescribeTable",
      "dynamodb:DescribeTimeToLive",
      "dynamodb:ListTagsOfResource",
    ]
    resources = values(local.table_arns)
  }
}

# The training tables are rewritten with the exporter's policy, which an erasure needs beside this one.
data "aws_iam_policy_document" "eraser" {
  statement {
    sid = "DeleteItemsOfKey"
    # A query finds items of every domain, those of former contracts too.
    actions = [
      "dynamodb:DeleteItem",
      "dynamodb:DescribeContinuousBackups",
      "dynamodb:DescribeTable",
      "dynamodb:DescribeTimeToLive",
      "dynamodb:ListTagsOfResource",
      "dynamodb:Query",
    ]
    resources = values(local.table_arns)
  }

  dynamic "statement" {
    for_each = local.has_key ? [local.key_arn] : []
    content {
      sid       = "UseKeyThroughDynamoDB"
      actions   = ["kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey", "kms:ReEncryptFrom", "kms:ReEncryptTo"]
      resources = [statement.value]

      condition {
        test     = "StringEquals"
        variable = "kms:ViaService"
        values   = [local.dynamodb_service]
      }
    }
  }
}
