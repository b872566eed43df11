{{ dynamodb_sink(ref("$relation"), "$entity"$columns) }}
