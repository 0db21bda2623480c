"""A checkpoint as released becomes one that clones: train, measure, adapt if that helps, inject, examine."""
