terraform {
  # 1.9 is the first version in which a validation may look at another variable.
  required_version = ">= 1.9, < 2.0"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region = var.region

  # A local AWS server answers every service on one address, knows no virtual-host buckets and no
  # instance metadata; on AWS itself each of these stays at the provider's default.
  s3_use_path_style       = var.endpoint_url != null
  skip_metadata_api_check = var.endpoint_url != null ? "true" : null

  dynamic "endpoints" {
    for_each = var.endpoint_url == null ? [] : [var.endpoint_url]
    content {
      applicationautoscaling = endpoints.value
      cloudwatch             = endpoints.value
      dynamodb               = endpoints.value
      glue                   = endpoints.value
      iam                    = endpoints.value
      kms                    = endpoints.value
      s3                     = endpoints.value
      sts                    = endpoints.value
    }
  }

  default_tags {
    tags = local.tags
  }
}
