"""A script with several voices, or a chapter with one, becomes one file: turns, levels, music, captions."""
