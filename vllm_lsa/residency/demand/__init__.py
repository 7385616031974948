"""Demand: which chunks that are not resident a layer reads for the query of this very step."""
