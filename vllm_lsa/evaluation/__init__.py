"""Evaluation of quality: the retrieval suite and what it is made of."""
