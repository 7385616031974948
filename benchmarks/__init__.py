"""Benchmarks: one script each, side by side with the peer in one run, CSV and PNG out."""
