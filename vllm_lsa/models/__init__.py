"""Models that LSA serves in a way of their own."""
