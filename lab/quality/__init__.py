"""Is the lab good enough? Lists and goals, speech to score, scores, and the table of both.

`speak` runs in revox's environment, `measures` in that of the recognizers; `benchmarks/lab_quality.py` starts
either. `words` and `tables` are plain functions.
"""
