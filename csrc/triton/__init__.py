"""Triton kernels: LSA's operations on a CUDA device. Each has a naive PyTorch twin in `vllm_lsa.ops`."""
