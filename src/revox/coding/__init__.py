"""Sound to codes: the encoder, inversion of the frozen decoder, refinement, the student encoder."""
