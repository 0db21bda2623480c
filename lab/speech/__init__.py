"""Natural synthetic speech for the lab: the sentences, the speakers, and the synthesizer that reads them."""
