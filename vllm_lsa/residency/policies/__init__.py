"""Lookahead policies: which chunks the next cycle will attend to."""
