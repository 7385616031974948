"""Residency that lives on the CUDA device: sets, usage and slot tables in persistent buffers, changed by kernels."""
