"""The embedded engine's follower, which keeps every view current at a cost proportional to the change."""
