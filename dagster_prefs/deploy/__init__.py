"""From what is declared to what runs: the plan, and its application."""
