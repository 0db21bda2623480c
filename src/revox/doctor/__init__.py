"""Is this checkpoint what it should be, and does revox do right by it? Checks and a report to share."""
