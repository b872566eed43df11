{{ first_deliveries(
  ref("user_events_parsed"),
  "user",
  "user_id",
  "event_time",
  ["event_id", "user_id", "item_id", "brand", "category", "price", "event_type", "session_id", "event_time"],
) }}
