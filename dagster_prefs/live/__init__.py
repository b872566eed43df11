"""The embedded engine's follower: it keeps every view current, at a cost that follows what changed."""
