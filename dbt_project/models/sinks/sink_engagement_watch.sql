{{ dynamodb_sink(ref("viewer_engagement_rolling")) }}
