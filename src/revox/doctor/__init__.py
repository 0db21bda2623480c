"""Is this checkpoint what it should be, and does revox handle it correctly? Checks, and a report to share."""
