"""Numbers about audio and codes; `spectral` is differentiable, for losses too."""
