"""Kinds of phase: the networks that they train, how one is run, weights from elsewhere, what a step costs here."""
