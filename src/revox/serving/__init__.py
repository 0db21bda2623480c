"""The HTTP API over `revox.synthesis`: the engine that batches, the endpoints, voices and keys."""
