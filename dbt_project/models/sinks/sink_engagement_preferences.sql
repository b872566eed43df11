{{ dynamodb_sink(ref("viewer_preferences_rolling")) }}
