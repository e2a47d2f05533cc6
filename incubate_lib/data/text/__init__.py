"""Text: where it comes from, as which tokens networks read it, and the contexts that they learn from."""

NOT_ASKED = -100  # in the place of a token that nobody asks for, as torch's cross_entropy has it
