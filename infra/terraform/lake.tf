resource "aws_s3_bucket" "lake" {
  #checkov:skip=CKV_AWS_144:training data is derived and is exported again from the engine; a copy in another region is the user's choice
  #checkov:skip=CKV2_AWS_62:nothing listens for new objects, readers follow Iceberg snapshots
  bucket = local.bucket_name
  # A lake with objects is only ever emptied by somebody who has switched the protection off before.
  force_destroy = !var.deletion_protection
}

resource "aws_s3_bucket_versioning" "lake" {
  bucket = aws_s3_bucket.lake.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "lake" {
  bucket = aws_s3_bucket.lake.id

  rule {
    bucket_key_enabled = local.key_arn != null

    apply_server_side_encryption_by_default {
      sse_algorithm     = local.key_arn == null ? "AES256" : "aws:kms"
      kms_master_key_id = local.key_arn
    }
  }
}

resource "aws_s3_bucket_public_access_block" "lake" {
  bucket = aws_s3_bucket.lake.id

  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "lake" {
  bucket = aws_s3_bucket.lake.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "lake" {
  bucket = aws_s3_bucket.lake.id

  # Only what Iceberg has already let go is aged out: a rule on current objects would delete by age
  # metadata and data files that the newest snapshot still points to.
  rule {
    id     = "old-versions"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.lake_noncurrent_days
    }

    expiration {
      expired_object_delete_marker = true
    }
  }

  rule {
    id     = "unfinished-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }

  depends_on = [aws_s3_bucket_versioning.lake]
}

resource "aws_s3_bucket_logging" "lake" {
  count = var.lake_access_log_bucket == null ? 0 : 1

  bucket        = aws_s3_bucket.lake.id
  target_bucket = var.lake_access_log_bucket
  target_prefix = "${local.bucket_name}/"
}

data "aws_iam_policy_document" "lake" {
  statement {
    sid       = "DenyPlainHttp"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [local.bucket_arn, "${local.bucket_arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }

  statement {
    sid       = "DenyOldTls"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [local.bucket_arn, "${local.bucket_arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "NumericLessThan"
      variable = "s3:TlsVersion"
      values   = ["1.2"]
    }
  }
}

resource "aws_s3_bucket_policy" "lake" {
  # A local AWS server without TLS could serve nobody under this policy.
  count = startswith(coalesce(var.endpoint_url, "https://"), "https://") ? 1 : 0

  bucket = aws_s3_bucket.lake.id
  policy = data.aws_iam_policy_document.lake.json

  depends_on = [aws_s3_bucket_public_access_block.lake]
}

resource "aws_glue_catalog_database" "training" {
  name         = local.namespace
  description  = "Iceberg tables of the training tiles, environment ${local.name}."
  location_uri = "${local.warehouse}/${local.namespace}.db"
  # By this the platform knows that the namespace is its own, when it drops an environment.
  parameters = { "prefs.platform" = "prefs" }
}
