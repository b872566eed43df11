$config{{ first_deliveries(
  ref("$parsed"),
  entity="$entity",
  identity="$identity",
  moment="$time",
  columns=[
$columns
  ],
) }}
