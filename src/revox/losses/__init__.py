"""Distances between sounds and between codes: the STFT front end, code losses, discriminators."""
