"""Bench, comparison, reports and pictures."""
