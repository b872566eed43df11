{{ dynamodb_sink(ref("$relation"), "$entity"$attributes) }}
