"""Training of the memory indexer: data, capture, labels, training, calibration, evaluation, export."""

import os

# Threads of torch that wait for each other by spinning make it up to a hundred times slower where something else takes
# a core (measured on two). It has to be said before torch is loaded; what the user says goes first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
