"""The network, in PyTorch and nothing else: no files, no command line, no globals."""
