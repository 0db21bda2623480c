"""Text and a voice -> audio: the prompt, the frame loop, streaming, several texts at once."""
