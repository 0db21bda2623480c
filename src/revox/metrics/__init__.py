"""Scores of audio, words, codes and voice embeddings."""
