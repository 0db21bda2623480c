"""The same folder under vllm-omni: the files it needs, and the known traps of servers."""
