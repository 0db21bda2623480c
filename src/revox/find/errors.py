"""What goes wrong while references are looked for."""


class FindError(Exception):
    """No reference can be found as asked; the message is a sentence."""
