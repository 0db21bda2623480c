"""The same sentences from two endpoints, folders or voices, and a verdict by a rule written beforehand."""
