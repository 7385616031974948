"""vllm-lsa: long contexts in vLLM with the KV cache in host memory (Lookahead Sparse Attention)."""

__version__ = "0.1.0"
