"""The release on disk: a folder of params.json, weights, tokenizer and voices (imported without torch)."""
