"""Training: what the encoder's restoration, the adaptation and the lab's own build share."""
