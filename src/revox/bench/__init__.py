"""How fast and how sound speech endpoints are: requests, checks of every file, thresholds, a report."""
