locals {
  create_key = var.encryption_key == "create"
  key_arn    = local.create_key ? aws_kms_key.platform[0].arn : (var.encryption_key == "aws" ? null : var.encryption_key)
  # Whether there is a key must be known in the plan, also while its ARN is not.
  has_key = var.encryption_key != "aws"
}

data "aws_iam_policy_document" "key" {
  #checkov:skip=CKV_AWS_109:this is the policy of the key itself, and * in it means this key
  #checkov:skip=CKV_AWS_111:this is the policy of the key itself, and * in it means this key
  #checkov:skip=CKV_AWS_356:this is the policy of the key itself, and * in it means this key
  statement {
    sid       = "AccountPoliciesDecide"
    actions   = ["kms:*"]
    resources = ["*"]

    principals {
      type        = "AWS"
      identifiers = ["arn:${local.partition}:iam::${local.account_id}:root"]
    }
  }
}

resource "aws_kms_key" "platform" {
  count = local.create_key ? 1 : 0

  description             = "Table and lake of dagster-prefs, environment ${local.name}."
  enable_key_rotation     = true
  deletion_window_in_days = 30
  policy                  = data.aws_iam_policy_document.key.json
}

resource "aws_kms_alias" "platform" {
  count = local.create_key ? 1 : 0

  name          = "alias/${local.prefix}prefs"
  target_key_id = aws_kms_key.platform[0].key_id
}
