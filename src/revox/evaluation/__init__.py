"""Tables about a checkpoint, from a folder of clips; reports and pictures."""
