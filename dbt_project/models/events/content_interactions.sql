{{ first_deliveries(
  ref("content_interactions_parsed"),
  "viewer",
  "viewer_id",
  "event_ts",
  ["event_id", "viewer_id", "event_type", "event_ts"],
) }}
