"""Text: where it comes from, as which tokens networks read it, and the contexts that they learn from."""
