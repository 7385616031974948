"""Training of the memory indexer: data, capture, labels, training, calibration, evaluation, export."""
