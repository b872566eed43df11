{{ dynamodb_sink(ref("content_interactions_rolling")) }}
