${config}{{ last_deliveries(
  ref("$parsed"),
  identity="$identity",
  columns=[
$columns
  ],
) }}
