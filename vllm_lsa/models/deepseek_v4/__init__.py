"""DeepSeek-V4: the compressed KV cache of its c4 layers in host memory, read by page."""
