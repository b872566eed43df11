{{ first_deliveries(
  ref("view_events_parsed"),
  "viewer",
  "viewer_id",
  "watched_at",
  ["event_id", "viewer_id", "content_id", "genre", "watch_duration_sec", "completion_pct", "watched_at"],
) }}
