"""Attention, copy and scoring kernels: public functions that pick the device's kernel, and their naive twins."""
