"""The demo: a local vLLM server, one long document, one question. ``python -m vllm_lsa.demo MODEL``."""
